// AVX2 with AVX-VNNI, which only products of packed codes with int8 activations use: no other loops here, and products
// of floats are AVX2's. Compiled for AVX-512's VNNI and VL instead, these are the same loops with that encoding of the
// instruction, so that processors without AVX-VNNI can test them. Without either, the table is empty.
#include "../loops.h"
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#include <immintrin.h>
#define ASKEW_LANES 8
#define ASKEW_ISA avx2_vnni
#define ASKEW_FLOATS avx2
namespace askew {
namespace avx2 {
void multiply(const PackedWeight&, int64_t row0, int64_t row1, const float* x, int64_t batch, const float* bias,
              float* y, char* scratch);
}  // namespace avx2
namespace avx2_vnni {
bool runs_here() {
#if defined(__AVXVNNI__)
  return __builtin_cpu_supports("avxvnni");
#else
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
#endif
}
}  // namespace avx2_vnni
}  // namespace askew
#include "../packed.inl"
#else
namespace askew {
namespace avx2_vnni {
bool runs_here() { return false; }
extern const PackedLoops packed = {};
}  // namespace avx2_vnni
}  // namespace askew
#endif
