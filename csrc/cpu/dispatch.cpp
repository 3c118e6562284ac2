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
namespace avx2_vnni {
extern const PackedLoops packed;
bool runs_here();  // what compilers know of it differs
}  // namespace avx2_vnni
ASKEW_SET(avx512)
ASKEW_SET(avx512_vnni)
namespace avx512 {
extern const PanelLoops singles;
}
namespace avx512_bf16 {
extern const PanelLoops singles, pairs;
}

namespace {

struct InstructionSet {
  const char *name, *packed_name;  // VNNI matters to packed products alone: all other loops are those without it
  bool (*runs_here)();
  const Loops* loops;
  const PackedLoops* packed;
  const PanelLoops *singles, *pairs;  // null: none
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx2_vnni() { return has_avx2() && avx2_vnni::runs_here(); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() {
  return has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}
#endif

const InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512", "avx512_vnni", has_avx512_bf16, &avx512::loops, &avx512_vnni::packed, &avx512_bf16::singles,
     &avx512_bf16::pairs},
    {"avx512", "avx512_vnni", has_avx512_vnni, &avx512::loops, &avx512_vnni::packed, &avx512::singles, nullptr},
    {"avx512", "avx512", has_avx512, &avx512::loops, &avx512::packed, &avx512::singles, nullptr},
    {"avx2", "avx2_vnni", has_avx2_vnni, &avx2::loops, &avx2_vnni::packed, nullptr, nullptr},
    {"avx2", "avx2", has_avx2, &avx2::loops, &avx2::packed, nullptr, nullptr},
#endif
    {"baseline", "baseline", [] { return true; }, &baseline::loops, &baseline::packed, nullptr, nullptr},
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
const PanelLoops* panel_loops(bool pairs) { return pairs ? in_use().pairs : in_use().singles; }
const char* capability() { return in_use().name; }
const char* packed_capability() { return in_use().packed_name; }
const char* best_capability() { return best().name; }

bool force_capability(const char* name, bool vnni, bool bf16) {
  for (const InstructionSet& set : kSets)
    if (!std::strcmp(set.name, name) && (vnni || !std::strstr(set.packed_name, "vnni")) && (bf16 || !set.pairs) &&
        set.runs_here()) {
      current().store(&set);
      return true;
    }
  return false;
}

}  // namespace askew
