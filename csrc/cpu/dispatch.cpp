// Which instruction set the CPU loops use: one table, the best one first.
#include <atomic>
#include <cstring>

#include "loops.h"

namespace askew {

#define ASKEW_SET(ISA)             \
  namespace ISA {                  \
  extern const Loops loops;        \
  extern const PackedLoops packed; \
  }
ASKEW_SET(baseline)
ASKEW_SET(avx2)
ASKEW_SET(avx512)
ASKEW_SET(avx512_vnni)

namespace {

struct InstructionSet {
  const char *name, *packed_name;  // VNNI matters to packed products alone: else these are AVX-512's loops
  bool (*runs_here)();
  const Loops* loops;
  const PackedLoops* packed;
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

const InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512", "avx512_vnni", has_avx512_vnni, &avx512::loops, &avx512_vnni::packed},
    {"avx512", "avx512", has_avx512, &avx512::loops, &avx512::packed},
    {"avx2", "avx2", has_avx2, &avx2::loops, &avx2::packed},
#endif
    {"baseline", "baseline", [] { return true; }, &baseline::loops, &baseline::packed},
};

const InstructionSet& best() {
  const InstructionSet* set = kSets;
  while (!set->runs_here()) ++set;
  return *set;
}

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> set{&best()};
  return set;
}

const InstructionSet& in_use() { return *current().load(std::memory_order_relaxed); }

}  // namespace

const Loops& loops() { return *in_use().loops; }
const PackedLoops& packed_loops() { return *in_use().packed; }
const char* capability() { return in_use().name; }
const char* packed_capability() { return in_use().packed_name; }
const char* best_capability() { return best().name; }

bool force_capability(const char* name, bool vnni) {
  for (const InstructionSet& set : kSets)
    if (!std::strcmp(set.name, name) && (vnni || !std::strstr(set.packed_name, "vnni")) && set.runs_here()) {
      current().store(&set);
      return true;
    }
  return false;
}

}  // namespace askew
