// AVX-512 with VNNI, which only products of packed codes with int8 activations use: no other loops here, and products
// of floats are AVX-512's.
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#include "../loops.h"
#define ASKEW_LANES 16
#define ASKEW_ISA avx512_vnni
#define ASKEW_FLOATS avx512
namespace askew {
namespace avx512 {
void multiply(const PackedWeight&, int64_t row0, int64_t row1, const float* x, int64_t batch, const float* bias,
              float* y, char* scratch);
void multiply_tables(const PackedWeight&, int64_t row0, int64_t row1, const float* tables, int64_t batch,
                     const float* bias, float* y);
}  // namespace avx512
}  // namespace askew
#include "../packed.inl"
#endif
