#include "output_pool.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../ops/tensors.h"
#include "../tuning.h"

namespace askew {
namespace {

constexpr size_t kAlign = 2 << 20;  // a huge page

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
};

struct Pool {
  std::mutex mutex;
  std::vector<Buffer> free;  // oldest first
  int64_t held = 0, limit = (int64_t)1 << 30;
};

Pool& pool() {
  static Pool* p = new Pool;  // never destroyed: tensors may outlive static destructors
  return *p;
}

// Changes the pool, then frees what is above its limit, the oldest first and outside the lock.
template <class F>
void change(const F& f) {
  std::vector<Buffer> drop;
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    f(pool());
    auto& free = pool().free;
    auto end = free.begin();
    while (end != free.end() && pool().held > pool().limit) pool().held -= end++->bytes;
    drop = std::vector<Buffer>(free.begin(), end);
    free.erase(free.begin(), end);
  }
  for (const Buffer& b : drop) std::free(b.data);
}

void release(Buffer b) {
  change([&](Pool& p) {
    p.free.push_back(b);
    p.held += b.bytes;
  });
}

// A kept buffer of `bytes` to 1.25 * bytes, or in as many huge pages, the most recently freed first; else a new one.
// Null if there is no memory or the pool is switched off.
Buffer acquire(int64_t bytes) {
  const int64_t rounded = (bytes + kAlign - 1) / kAlign * kAlign, most = std::max(rounded, bytes + bytes / 4);
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    if (pool().limit <= 0) return {};
    auto& free = pool().free;
    for (size_t i = free.size(); i-- > 0;)
      if (free[i].bytes >= bytes && free[i].bytes <= most) {
        const Buffer b = free[i];
        free.erase(free.begin() + i);
        pool().held -= b.bytes;
        return b;
      }
  }
  void* p = std::aligned_alloc(kAlign, rounded);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (p) madvise(p, rounded, MADV_HUGEPAGE);
#endif
  return {p, rounded};
}

}  // namespace

Tensor pooled_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  int64_t bytes = type_size(storage_type(like, "out"));
  for (int64_t size : sizes) bytes *= size;
  const Buffer b = bytes < tuning.pooled_bytes ? Buffer{} : acquire(bytes);  // below, malloc reuses its own memory
  if (!b.data) return torch::stable::new_empty(like, sizes);                 // or throws torch's out-of-memory error
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  return torch::stable::from_blob(b.data, sizes, {strides.data(), strides.size()}, like.device(), like.scalar_type(),
                                  [b](void*) { release(b); });
}

KeptMemory::KeptMemory(int64_t bytes) {
  const Buffer b = bytes < tuning.pooled_bytes ? Buffer{} : acquire(bytes);
  data_ = b.data;
  kept_ = b.data ? b.bytes : 0;
  if (!data_) data_ = std::aligned_alloc(64, (bytes / 64 + 1) * 64);
  if (!data_) throw std::bad_alloc();
}

KeptMemory::~KeptMemory() {
  if (kept_)
    release({data_, kept_});
  else
    std::free(data_);
}

int64_t output_pool_bytes() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().held;
}

void set_output_pool_limit(int64_t bytes) {
  change([&](Pool& p) { p.limit = bytes; });
}

}  // namespace askew
