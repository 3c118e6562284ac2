// Which instruction set the CPU loops use.
#include <atomic>
#include <initializer_list>
#include <cstring>

#include "loops.h"

namespace askew {

namespace {

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

const Loops* find(const char* name) {
  if (!std::strcmp(name, "baseline")) return loops_baseline();
  if (!std::strcmp(name, "avx2") && has_avx2()) return loops_avx2();
  if (!std::strcmp(name, "avx512") && has_avx512()) return loops_avx512();
  return nullptr;
}

const Loops* best() {
  for (const char* name : {"avx512", "avx2"})
    if (const Loops* l = find(name)) return l;
  return loops_baseline();
}

std::atomic<const Loops*>& current() {
  static std::atomic<const Loops*> loops{best()};
  return loops;
}

}  // namespace

const Loops& loops() { return *current().load(std::memory_order_relaxed); }
const char* best_capability() { return best()->name; }
bool force_capability(const char* name) {
  const Loops* l = find(name);
  if (l) current().store(l);
  return l != nullptr;
}

}  // namespace askew
