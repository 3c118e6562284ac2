// Any CPU: four lanes (SSE2 on x86-64, NEON on ARM).
#define ASKEW_LANES 4
#define ASKEW_ISA baseline
#include "../loops.inl"
#include "../packed.inl"
