// The library's own functions, in C, so that it knows nothing of Python: askew_kernels/library.py calls them by ctypes.
// The operators register themselves as torch loads it (static initialisers of cpu/*.cpp, cuda/*.cpp); what it was built
// of is told by askew_build_facts, which setup.py writes.
#include <iterator>

#include "cpu/loops.h"
#include "cpu/output_pool.h"
#include "tuning.h"

namespace {
struct Parameter {
  const char* name;
  int64_t askew::Tuning::* member;
};
const Parameter kParameters[] = {
    {"prefetch_columns", &askew::Tuning::prefetch_columns},
    {"piece_columns", &askew::Tuning::piece_columns},
    {"serial_elements", &askew::Tuning::serial_elements},
    {"streaming_bytes", &askew::Tuning::streaming_bytes},
    {"pooled_bytes", &askew::Tuning::pooled_bytes},
    {"panel_inputs", &askew::Tuning::panel_inputs},
    {"pair_inputs", &askew::Tuning::pair_inputs},
    {"bit_table_inputs", &askew::Tuning::bit_table_inputs},
    {"table_inputs", &askew::Tuning::table_inputs},
    {"table_rows", &askew::Tuning::table_rows},
    {"trit_table_rows", &askew::Tuning::trit_table_rows},
    {"library_inputs", &askew::Tuning::library_inputs},
    {"shared_blocks", &askew::Tuning::shared_blocks},
    {"shared_bytes", &askew::Tuning::shared_bytes},
    {"slots", &askew::Tuning::slots},
};
}  // namespace

#define ASKEW_PUBLIC extern "C" __attribute__((visibility("default")))

// Instruction set in use: baseline, avx2 or avx512.
ASKEW_PUBLIC const char* askew_cpu_capability() { return askew::capability(); }
// The same for products of packed weights: avx512_vnni or avx2_vnni where those with int8 activations use VNNI.
ASKEW_PUBLIC const char* askew_packed_capability() { return askew::packed_capability(); }
// The best one that this CPU runs.
ASKEW_PUBLIC const char* askew_best_cpu_capability() { return askew::best_capability(); }
// Whether products with bfloat16 inputs use AVX512_BF16.
ASKEW_PUBLIC int askew_bfloat16_products() { return askew::panel_loops(true) != nullptr; }
// Use this one from now on; 0 where it is not built or the CPU lacks it.
ASKEW_PUBLIC int askew_force_cpu_capability(const char* name, int vnni, int bf16) {
  return askew::force_capability(name, vnni, bf16);
}

// Launch parameters (tuning.h) by number; null beyond the last. They change while no operator runs.
ASKEW_PUBLIC const char* askew_parameter_name(int64_t i) {
  return i >= 0 && i < (int64_t)std::size(kParameters) ? kParameters[i].name : nullptr;
}
ASKEW_PUBLIC int64_t askew_parameter(int64_t i) { return askew::tuning.*kParameters[i].member; }
ASKEW_PUBLIC void askew_set_parameter(int64_t i, int64_t value) { askew::tuning.*kParameters[i].member = value; }

// Bytes that the CPU output pool holds for reuse, and the most it may; 0 switches it off.
ASKEW_PUBLIC int64_t askew_output_pool_bytes() { return askew::output_pool_bytes(); }
ASKEW_PUBLIC void askew_set_output_pool_limit(int64_t bytes) { askew::set_output_pool_limit(bytes); }
