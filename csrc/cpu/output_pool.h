// Outputs of large CPU passes come from a pool of kept buffers.
//
// glibc returns a freed buffer of this size to the kernel and gets it back as fresh pages, whose faults cost more
// than the pass that fills them (docs/notes.md). The pool keeps what is freed, as torch's CUDA allocator does,
// up to a limit that bounds what it holds.
#pragma once
#include <cstddef>
#include <cstdint>

#include <torch/csrc/stable/tensor.h>

namespace askew {

// Uninitialised, contiguous, in the type of `like`; from the pool where that pays.
torch::stable::Tensor pooled_empty(const torch::stable::Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes);

// Uninitialised memory for the time of a call, from the pool as well.
class KeptMemory {
 public:
  explicit KeptMemory(int64_t bytes);
  KeptMemory(const KeptMemory&) = delete;
  ~KeptMemory();
  void* get() const { return data_; }

 private:
  void* data_;
  int64_t kept_;  // what goes back to the pool; 0: not from there
};

int64_t output_pool_bytes();                // held and not in use
void set_output_pool_limit(int64_t bytes);  // frees what is above; 0 switches the pool off

}  // namespace askew
