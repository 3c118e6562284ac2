// Any CPU: four lanes (SSE2 on x86-64, NEON on ARM).
#define ASKEW_LANES 4
#define ASKEW_ISA baseline
#define ASKEW_ISA_NAME "baseline"
#include "loops.inl"

const askew::Loops* askew::loops_baseline() { return &baseline::table; }
