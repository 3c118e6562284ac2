// Sharpness-aware passes over a list of tensors on the CPU, each taken as one long row.
#include "run.h"

namespace askew {
namespace {

struct FlatList {
  struct Job {
    void* w;
    void* other[2];  // of the same type and size
    int type;
    bool adaptive;
    Tiling tiling;
    int64_t first_tile;
  };
  std::vector<Job> jobs;
  int64_t tiles = 0, elements = 0, bytes = 0;

  void add(const Tensor& w, const Tensor& a, const char* a_name, const Tensor* b, const char* b_name, bool adaptive) {
    check_dense(w, "params");
    Job job{w.data_ptr(), {a.data_ptr(), nullptr}, storage_type(w, "params"), adaptive, Tiling({1, w.numel()}), tiles};
    check_like(a, w, a_name);
    STD_TORCH_CHECK(storage_type(a, a_name) == job.type, a_name, ": expected the dtype of its parameter");
    if (b) {
      check_like(*b, w, b_name);
      STD_TORCH_CHECK(storage_type(*b, b_name) == job.type, b_name, ": expected the dtype of its parameter");
      job.other[1] = b->data_ptr();
    }
    tiles += job.tiling.tiles;
    elements += w.numel();
    bytes += w.numel() * (job.type == kFloat32 ? 4 : 2);
    jobs.push_back(job);
  }
  bool past_caches(int written) const {  // -1: w, else other[written]
    if (bytes < tuning.streaming_bytes) return false;
    for (const Job& j : jobs)
      if ((uintptr_t)(written < 0 ? j.w : j.other[written]) % 64) return false;
    return true;
  }
  template <class F>
  void run(const F& body) const {  // body(job, tile, number of the tile)
    for_tiles(tiles, elements, [&](int64_t begin, int64_t end) {
      size_t j = 0;
      for (int64_t i = begin; i < end; ++i) {
        while (i >= jobs[j].first_tile + jobs[j].tiling.tiles) ++j;
        body(jobs[j], jobs[j].tiling[i - jobs[j].first_tile], i);
      }
    });
  }
};

Tensor sam_norm(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<int64_t> adaptive, double eta) {
  const size_t n = params.size();
  STD_TORCH_CHECK(n > 0 && grads.size() == n && adaptive.size() == n, "grads, adaptive: expected ", n, " of each");
  FlatList list;
  for (size_t i = 0; i < n; ++i) list.add(params[i], grads[i], "grads", nullptr, "", adaptive[i] != 0);
  std::vector<double> partial(list.tiles);
  list.run([&](const FlatList::Job& job, Tile tile, int64_t i) {
    partial[i] = loops().sam_norm(job.w, job.other[0], job.type, {job.adaptive, (float)eta, 0, 0}, tile);
  });
  const int64_t shape[1] = {};
  Tensor out = torch::stable::new_empty(params[0], {shape, (size_t)0}, ScalarType::Double);
  double sum = 0;
  for (const double p : partial) sum += p;
  *static_cast<double*>(out.data_ptr()) = sum;
  return out;
}

void sam_perturb(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> kept, Tensor coefficients,
                 std::vector<int64_t> adaptive, double eta) {
  const size_t n = params.size();
  STD_TORCH_CHECK(grads.size() == n && kept.size() == n && adaptive.size() == n, "grads, kept, adaptive: expected ", n,
                  " of each");
  check_coefficients(coefficients, true);
  FlatList list;
  for (size_t i = 0; i < n; ++i) list.add(params[i], grads[i], "grads", &kept[i], "kept", adaptive[i] != 0);
  const float* c = static_cast<const float*>(coefficients.data_ptr());
  const SamArg arg{false, (float)eta, c[0], c[1]};
  const bool past_caches = list.past_caches(1);
  list.run([&](const FlatList::Job& job, Tile tile, int64_t) {
    SamArg own = arg;
    own.adaptive = job.adaptive;
    loops().sam_perturb(job.w, job.other[0], job.other[1], job.type, own, past_caches, tile);
  });
}

void sam_restore(std::vector<Tensor> params, std::vector<Tensor> kept) {
  STD_TORCH_CHECK(kept.size() == params.size(), "kept: expected ", params.size(), " tensors");
  FlatList list;
  for (size_t i = 0; i < params.size(); ++i) list.add(params[i], kept[i], "kept", nullptr, "", false);
  const bool past_caches = list.past_caches(-1);
  list.run([&](const FlatList::Job& job, Tile tile, int64_t) {
    loops().sam_restore(job.w, job.other[0], job.type, past_caches, tile);
  });
}

void sam_average(std::vector<Tensor> grads, std::vector<Tensor> firsts, Tensor coefficients) {
  STD_TORCH_CHECK(firsts.size() == grads.size(), "firsts: expected ", grads.size(), " tensors");
  check_coefficients(coefficients, true);
  const float* c = static_cast<const float*>(coefficients.data_ptr());
  FlatList list;
  for (size_t i = 0; i < grads.size(); ++i) list.add(grads[i], firsts[i], "firsts", nullptr, "", false);
  if (c[0] == 0.f && c[1] == 0.f) return;  // nothing was perturbed: the first gradients were zero, inf or NaN
  list.run(
      [&](const FlatList::Job& job, Tile tile, int64_t) { loops().sam_average(job.w, job.other[0], job.type, tile); });
}

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) {
  m.impl("sam_norm", TORCH_BOX(&askew::sam_norm));
  m.impl("sam_perturb_", TORCH_BOX(&askew::sam_perturb));
  m.impl("sam_restore_", TORCH_BOX(&askew::sam_restore));
  m.impl("sam_average_", TORCH_BOX(&askew::sam_average));
}
