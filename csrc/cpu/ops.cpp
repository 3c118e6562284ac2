// The CPU implementations of the operators: checks, work division over torch's own threads, sums put together.
//
// Work is divided by the shapes alone (never by the thread count), and partial sums are added in the order of the
// pieces: results are the same bits for any number of threads.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../checks.h"
#include "../tuning.h"
#include "loops.h"
#include "output_pool.h"

namespace askew {
namespace {

constexpr int64_t kPiece = 16384;  // columns of a row whose sums are taken together; a multiple of the loops' band

// A (rows, cols) matrix cut into tiles: pieces of long rows, or bands of short rows, `piece` elements each or a little
// more. Where sums are taken the piece decides their bits and is kPiece.
struct Tiling {
  int64_t rows, cols, piece, pieces_per_row, rows_per_band, tiles;
  explicit Tiling(Matrix m, int64_t piece = kPiece) : rows(m.rows), cols(m.cols), piece(piece) {
    if (rows == 0 || cols == 0) rows = cols = 0;
    pieces_per_row = cols > 2 * piece ? (cols + piece - 1) / piece : 1;
    rows_per_band = pieces_per_row > 1 || cols == 0 ? 1 : (piece + cols - 1) / cols;
    tiles = pieces_per_row > 1 ? rows * pieces_per_row : (rows + rows_per_band - 1) / rows_per_band;
  }
  Tile operator[](int64_t i) const {
    if (pieces_per_row > 1) {
      const int64_t row = i / pieces_per_row, first = (i % pieces_per_row) * piece;
      return {row, row + 1, first, first + piece < cols ? first + piece : cols};
    }
    const int64_t first = i * rows_per_band;
    return {first, first + rows_per_band < rows ? first + rows_per_band : rows, 0, cols};
  }
};

template <class F>
void for_tiles(int64_t tiles, int64_t elements, const F& f) {
  if (elements <= tuning.serial_elements || tiles <= 1) {
    f(0, tiles);
    return;
  }
  torch::stable::parallel_for(0, tiles, 1, f);
}

template <class F>
void over_matrix(Matrix m, const F& body) {
  const Tiling tiling(m, tuning.piece_columns);
  for_tiles(tiling.tiles, m.rows * m.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(tiling[i]);
  });
}

Tensor fake_quantize(Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid, bool /*ste_clip: backward's*/,
                     bool stochastic, int64_t seed) {
  const Matrix m = as_matrix(x, scale);
  const GridArg g = grid_arg(grid, levels);
  const int type = storage_type(x, "x");
  Tensor y = pooled_empty_like(x);
  const void* in = x.data_ptr();
  void* out = y.data_ptr();
  const float* s = static_cast<const float*>(scale.data_ptr());
  over_matrix(m, [&](Tile t) {
    if (stochastic)
      loops().stochastic_quantize(in, type, out, type, s, g, m.cols, t, (uint64_t)seed);
    else
      loops().fake_quantize(in, type, out, type, s, g, m.cols, t);
  });
  return y;
}

void fake_quantize_out(Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid, Tensor out) {
  const Matrix m = as_matrix(x, scale);
  const GridArg g = grid_arg(grid, levels);
  const int type = storage_type(x, "x"), out_type = storage_type(out, "out");
  check_like(out, x, "out");
  over_matrix(m, [&](Tile t) {
    loops().fake_quantize(x.data_ptr(), type, out.data_ptr(), out_type, static_cast<const float*>(scale.data_ptr()), g,
                          m.cols, t);
  });
}

void clip_gradient(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& levels,
                   const std::vector<int64_t>& grid, const Tensor& out) {
  const Matrix m = as_matrix(x, scale);
  const GridArg g = grid_arg(grid, levels);
  const int type = storage_type(x, "x");
  check_like(grad, x, "grad");
  STD_TORCH_CHECK(storage_type(grad, "grad") == type, "grad: expected the dtype of x");
  over_matrix(m, [&](Tile t) {
    loops().ste_clip(grad.data_ptr(), x.data_ptr(), type, out.data_ptr(), static_cast<const float*>(scale.data_ptr()),
                     g, m.cols, t);
  });
}

Tensor fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid) {
  Tensor out = pooled_empty_like(grad);
  clip_gradient(grad, x, scale, levels, grid, out);
  return out;
}

void ste_clip(Tensor grad, Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid) {
  clip_gradient(grad, x, scale, levels, grid, grad);
}

void project_interval(Tensor w, Tensor scale, Tensor levels, std::vector<int64_t> grid, Tensor eps) {
  const Matrix m = as_matrix(w, scale);
  const GridArg g = grid_arg(grid, levels);
  const int type = storage_type(w, "w");
  const float e = (float)cpu_scalar(eps, "eps");
  over_matrix(m, [&](Tile t) {
    loops().project_interval(w.data_ptr(), type, static_cast<const float*>(scale.data_ptr()), g, e, m.cols, t);
  });
}

// Adds a tile's sums to those of its row, in the order of the pieces.
void gather_row_sums(const Tiling& tiling, const double* partial, float* out) {
  for (int64_t row = 0; row < tiling.rows; ++row, out += kRowSums) {
    double s[kRowSums] = {0, 0, 0};
    for (int64_t p = 0; p < tiling.pieces_per_row; ++p, partial += kRowSums) {
      s[kSumAbs] += partial[kSumAbs];
      s[kSumSquares] += partial[kSumSquares];
      if (!(partial[kMaxAbs] <= s[kMaxAbs])) s[kMaxAbs] = s[kMaxAbs] != s[kMaxAbs] ? s[kMaxAbs] : partial[kMaxAbs];
    }
    for (int j = 0; j < kRowSums; ++j) out[j] = (float)s[j];
  }
}

Tensor row_sums(Tensor x, int64_t rows) {
  check_dense(x, "x");
  const int64_t n = x.numel();
  STD_TORCH_CHECK(rows > 0 && n % rows == 0, "rows: ", rows, " rows do not divide ", n, " elements");
  const Matrix m{rows, n / rows};
  const int type = storage_type(x, "x");
  const int64_t shape[2] = {rows, (int64_t)kRowSums};
  Tensor out = torch::stable::new_empty(x, {shape, 2}, ScalarType::Float);
  float* result = static_cast<float*>(out.data_ptr());
  const Tiling tiling(m);
  if (n == 0) {
    std::memset(result, 0, rows * kRowSums * sizeof(float));
    return out;
  }
  std::vector<double> partial(tiling.pieces_per_row * rows * kRowSums);
  for_tiles(tiling.tiles, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tile t = tiling[i];
      loops().row_sums(x.data_ptr(), type, m.cols, t,
                       partial.data() + (tiling.pieces_per_row > 1 ? i : t.row0) * kRowSums);
    }
  });
  gather_row_sums(tiling, partial.data(), result);
  return out;
}

struct Lists {  // the tensor lists of one update
  const std::vector<Tensor>&params, &grads, &a, &b, &scales, &levels;
  const std::vector<int64_t>& grids;
  const std::vector<Tensor>&dequantized, &row_sums, &totals;
  const char *a_name, *b_name;
  Descent descent;
};

void update(const Lists& l, int rule, const Hyper& hyper) {
  const size_t n = l.params.size();
  for (const auto* list : {&l.grads, &l.scales, &l.levels})
    STD_TORCH_CHECK(list->size() == n, "grads, scales, levels: expected ", n, " tensors each");
  STD_TORCH_CHECK(l.grids.size() == 3 * n, "grids: expected ", 3 * n, " integers");

  struct Job {
    UpdateTensor t;
    Tiling tiling;
    int64_t first_tile;                   // in the numbering of all tiles
    float* row_sums;                      // may be null
    double* totals;                       // may be null
    size_t partial_rows, partial_totals;  // where its partial sums start
  };
  std::vector<Job> jobs;
  jobs.reserve(n);
  int64_t tiles = 0, elements = 0;
  size_t partial_rows = 0, partial_totals = 0;
  const float* const pair = l.descent.pair(true);
  for (size_t i = 0; i < n; ++i) {  // every check comes before the first write
    const Tensor &w = l.params[i], &g = l.grads[i], &s = l.scales[i];
    const Matrix m = as_matrix(w, s);
    UpdateTensor t{};
    t.type = storage_type(w, "params");
    check_like(g, w, "grads");
    STD_TORCH_CHECK(storage_type(g, "grads") == t.type, "grads: expected the dtype of the parameter");
    t.w = w.data_ptr();
    t.g = g.data_ptr();
    t.scale = static_cast<const float*>(s.data_ptr());
    t.rows = m.rows;
    t.cols = m.cols;
    t.grid = grid_arg(l.grids.data() + 3 * i, l.levels[i]);
    if (const Tensor* a = present(l.a, i, n, l.a_name)) {
      check_like(*a, w, l.a_name);
      STD_TORCH_CHECK(storage_type(*a, l.a_name) == t.type, l.a_name, ": expected the dtype of the parameter");
      t.a = a->data_ptr();
    }
    if (const Tensor* b = present(l.b, i, n, l.b_name)) {
      check_like(*b, w, l.b_name);
      STD_TORCH_CHECK(storage_type(*b, l.b_name) == t.type, l.b_name, ": expected the dtype of the parameter");
      t.b = b->data_ptr();
    }
    STD_TORCH_CHECK(rule == kSgd || w.numel() == 0 || (t.a && t.b),
                    "exp_avgs, exp_avg_sqs: expected for every parameter");
    if (const Tensor* kept = l.descent.beside(l.descent.kept, i, n, w, "kept")) t.kept = kept->data_ptr();
    const Tensor* first = l.descent.beside(l.descent.firsts, i, n, w, "firsts");
    if (first && (pair[0] != 0.f || pair[1] != 0.f)) t.first = first->data_ptr();
    if (const Tensor* copy = present(l.dequantized, i, n, "dequantized")) {
      check_like(*copy, w, "dequantized");
      t.dequantized = copy->data_ptr();
      t.dequantized_type = storage_type(*copy, "dequantized");
    }
    Job job{t, Tiling(m), tiles, nullptr, nullptr, partial_rows, partial_totals};
    if (const Tensor* r = present(l.row_sums, i, n, "row_sums")) {
      check_dense(*r, "row_sums");
      STD_TORCH_CHECK(r->scalar_type() == ScalarType::Float && r->numel() == m.rows * kRowSums,
                      "row_sums: expected float32 of shape (rows, 3)");
      job.row_sums = static_cast<float*>(r->data_ptr());
      partial_rows += job.tiling.rows * job.tiling.pieces_per_row * kRowSums;
    }
    if (const Tensor* totals = present(l.totals, i, n, "totals")) {
      check_dense(*totals, "totals");
      STD_TORCH_CHECK(totals->scalar_type() == ScalarType::Double && totals->numel() == kTotals,
                      "totals: expected float64 of shape (6,)");
      job.totals = static_cast<double*>(totals->data_ptr());
      partial_totals += job.tiling.tiles * kTotals;
    }
    tiles += job.tiling.tiles;
    elements += m.rows * m.cols;
    jobs.push_back(job);
  }

  std::vector<double> rows(partial_rows), totals(partial_totals);
  for_tiles(tiles, elements, [&](int64_t begin, int64_t end) {
    size_t j = 0;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= jobs[j].first_tile + jobs[j].tiling.tiles) ++j;
      const Job& job = jobs[j];
      const int64_t k = i - job.first_tile;
      const Tile tile = job.tiling[k];
      double* row_part =
          job.row_sums ? rows.data() + job.partial_rows + (job.tiling.pieces_per_row > 1 ? k : tile.row0) * kRowSums
                       : nullptr;
      loops().update(job.t, rule, hyper, tile, row_part,
                     job.totals ? totals.data() + job.partial_totals + k * kTotals : nullptr);
    }
  });
  for (const Job& job : jobs) {
    if (job.row_sums && !job.tiling.cols)  // rows without columns
      std::memset(job.row_sums, 0, job.t.rows * kRowSums * sizeof(float));
    else if (job.row_sums)
      gather_row_sums(job.tiling, rows.data() + job.partial_rows, job.row_sums);
    if (job.totals) {
      double s[kTotals] = {};
      const double* part = totals.data() + job.partial_totals;
      for (int64_t k = 0; k < job.tiling.tiles; ++k, part += kTotals)
        for (int c = 0; c < kTotals; ++c) s[c] += part[c];
      std::memcpy(job.totals, s, sizeof s);
    }
  }
}

void skew_sgd(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
              std::vector<Tensor> scales, std::vector<Tensor> levels, std::vector<int64_t> grids,
              std::vector<Tensor> dequantized, std::vector<Tensor> row_sums, std::vector<Tensor> totals, Tensor lr,
              Tensor eps, double alpha, double momentum, double dampening, double weight_decay, bool nesterov,
              bool direction, bool clamp, bool maximize, bool skip_nonfinite, std::optional<std::vector<Tensor>> kept,
              std::optional<std::vector<Tensor>> firsts, std::optional<Tensor> coefficients) {
  Hyper h{};
  set_rates(h, cpu_scalar(lr, "lr"), cpu_scalar(eps, "eps"));
  h.alpha = (float)alpha;
  h.weight_decay = (float)weight_decay;
  h.momentum = (float)momentum;
  h.one_minus_dampening = (float)(1 - dampening);
  h.nesterov = nesterov;
  h.direction = direction;
  h.clamp = clamp;
  h.maximize = maximize;
  h.skip_nonfinite = skip_nonfinite;
  update({params,
          grads,
          momentum_buffers,
          {},
          scales,
          levels,
          grids,
          dequantized,
          row_sums,
          totals,
          "momentum_buffers",
          "",
          Descent(kept, firsts, coefficients)},
         kSgd, h);
}

void skew_adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> scales, std::vector<Tensor> levels,
                std::vector<int64_t> grids, std::vector<Tensor> dequantized, std::vector<Tensor> row_sums,
                std::vector<Tensor> totals, Tensor step, Tensor lr, Tensor eps, double alpha, double beta1,
                double beta2, double adam_eps, double weight_decay, bool direction, bool clamp, bool maximize,
                bool skip_nonfinite, std::optional<std::vector<Tensor>> kept, std::optional<std::vector<Tensor>> firsts,
                std::optional<Tensor> coefficients) {
  Hyper h{};
  set_rates(h, cpu_scalar(lr, "lr"), cpu_scalar(eps, "eps"));
  set_betas(h, beta1, beta2, cpu_scalar(step, "step"));
  h.alpha = (float)alpha;
  h.weight_decay = (float)weight_decay;
  h.adam_eps = (float)adam_eps;
  h.direction = direction;
  h.clamp = clamp;
  h.maximize = maximize;
  h.skip_nonfinite = skip_nonfinite;
  update({params, grads, exp_avgs, exp_avg_sqs, scales, levels, grids, dequantized, row_sums, totals, "exp_avgs",
          "exp_avg_sqs", Descent(kept, firsts, coefficients)},
         kAdamW, h);
}

// ---- sharpness-aware passes over a list of tensors, each taken as one long row -----------------------------------

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
  m.impl("fake_quantize", TORCH_BOX(&askew::fake_quantize));
  m.impl("fake_quantize_out_", TORCH_BOX(&askew::fake_quantize_out));
  m.impl("fake_quantize_backward", TORCH_BOX(&askew::fake_quantize_backward));
  m.impl("ste_clip_", TORCH_BOX(&askew::ste_clip));
  m.impl("project_interval_", TORCH_BOX(&askew::project_interval));
  m.impl("row_sums", TORCH_BOX(&askew::row_sums));
  m.impl("skew_sgd_", TORCH_BOX(&askew::skew_sgd));
  m.impl("skew_adamw_", TORCH_BOX(&askew::skew_adamw));
  m.impl("sam_norm", TORCH_BOX(&askew::sam_norm));
  m.impl("sam_perturb_", TORCH_BOX(&askew::sam_perturb));
  m.impl("sam_restore_", TORCH_BOX(&askew::sam_restore));
  m.impl("sam_average_", TORCH_BOX(&askew::sam_average));
}
