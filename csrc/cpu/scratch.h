// Memory and threads of the products with packed weights.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "../tuning.h"
#include "loops.h"
#include "run.h"

namespace askew {

constexpr int64_t kGrain = 1 << 16;  // weights times inputs that are worth a thread

// Uninitialised memory, aligned to cache lines.
template <class T>
struct Scratch : std::unique_ptr<T, void (*)(void*)> {
  explicit Scratch(int64_t count)
      : Scratch::unique_ptr((T*)std::aligned_alloc(64, rounded_up(count * sizeof(T) + 64, 64)), std::free) {
    if (!this->get()) throw std::bad_alloc();
  }
};

// What a thread needs to round rows to int8: as float32 where they are of another type, and the bytes of one.
struct RowRoom {
  Scratch<float> wide;
  Scratch<int8_t> bytes;
  RowRoom(int64_t cols, int type) : wide(type == kFloat32 ? 0 : kMostPatches * cols + kPadding), bytes(cols) {}
};

// Whether products (rows, n) in float32 at y are so many that they are stored past the caches, in whole lines.
inline bool goes_past_caches(const float* y, int64_t rows, int64_t n) {
  const bool lines = n % kBandRows == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  return lines && rows * n * (int64_t)sizeof(float) >= tuning.streaming_bytes;
}
// Behind such stores, before another thread is told that they are done.
inline void finish_stores() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// f(begin, end) on rows [0, n) in whole bands, in as many threads as the work is worth.
template <class F>
void for_rows(int64_t n, int64_t band, int64_t work_of_row, const F& f) {
  const int64_t bands = (n + band - 1) / band;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(work_of_row * band, 1));
  const auto rows = [&](int64_t begin, int64_t end) { f(begin * band, std::min(end * band, n)); };
  if (bands <= grain)
    rows(0, bands);
  else
    torch::stable::parallel_for(0, bands, grain, rows);
}

}  // namespace askew
