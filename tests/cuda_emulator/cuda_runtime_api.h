// Stands for the CUDA runtime's header when csrc/cuda is compiled for the emulator.
#include "emulator.h"
