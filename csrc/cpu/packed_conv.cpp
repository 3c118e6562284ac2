// Convolutions from codes in bands, inputs rounded to int8 patch by patch, without patches in memory: a few dozen at a
// time are quantized straight from the image and multiplied while they are in the caches. Threads share the output
// positions, or the rows of the weight where there are few, so that their number changes no result.
#include "packed_conv.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"

namespace askew {
namespace {

constexpr int64_t kChunk = 64;        // output positions that are quantized and multiplied together
constexpr int64_t kFewChunks = 4;     // with fewer of them threads share the rows of the weight
constexpr int64_t kImages = 1 << 19;  // numbers of laid-out images that stand in memory at a time

// An image as the loops read it: zeros around it, in float32, the columns of a row that a stride puts side by side one
// after the other. Channels are `plane` numbers apart, lines `line`.
struct Layout {
  bool in_place;  // the input itself
  int64_t lines, columns, phase, line, plane;
  explicit Layout(const ConvArg& a) {
    lines = (a.out[0] - 1) * a.stride[0] + (a.kernel[0] - 1) * a.dilation[0] + 1;
    columns = (a.out[1] - 1) * a.stride[1] + (a.kernel[1] - 1) * a.dilation[1] + 1;
    in_place = a.type == kFloat32 && !a.channels_last && a.stride[1] == 1 && !a.before[0] && !a.before[1] &&
               lines <= a.in[0] && columns <= a.in[1];
    phase = in_place ? a.in[1] : (columns + a.stride[1] - 1) / a.stride[1];
    line = in_place ? a.in[1] : phase * a.stride[1];
    plane = in_place ? a.in[0] * a.in[1] : lines * line;
  }
  int64_t column(int64_t c, int64_t stride) const { return stride == 1 ? c : c % stride * phase + c / stride; }
};

class Convolution {
 public:
  Convolution(const ConvArg& a, const BandsArg& w)
      : a_(a), w_(w), at_(a), positions_(a.out[0] * a.out[1]), offsets_(w.cols), bias_(a.bias ? w.n : 0) {
    if (a.bias) loops_.load(a.bias, w.n, a.type, bias_.get());
    if (pixels()) return;
    int32_t* to = offsets_.get();
    for (int64_t c = 0; c < a.channels; ++c)
      for (int64_t i = 0; i < a.kernel[0]; ++i)
        for (int64_t j = 0; j < a.kernel[1]; ++j)
          *to++ = (int32_t)(c * at_.plane + i * a.dilation[0] * at_.line + at_.column(j * a.dilation[1], a.stride[1]));
  }

  void run() const {
    if (pixels()) return multiply(nullptr, nullptr, 0, a_.images * positions_);
    const int64_t size = a_.channels * at_.plane;
    const int64_t together = at_.in_place ? a_.images : std::max<int64_t>(1, kImages / std::max<int64_t>(size, 1));
    Scratch<float> laid_out(at_.in_place ? 0 : std::min(together, a_.images) * size);
    Scratch<float> peaks(shares_peaks() ? std::min(together, a_.images) * at_.plane : 0);
    for (int64_t first = 0; first < a_.images; first += together) {
      const int64_t count = std::min(together, a_.images - first);
      const float* images = static_cast<const float*>(a_.x);
      if (!at_.in_place) {
        lay_out(first, count, laid_out.get());
        images = laid_out.get();
      }
      if (shares_peaks()) find_peaks(images, count, peaks.get());
      multiply(images, peaks.get(), first * positions_, count * positions_);
    }
  }

 private:
  // ---- images ----

  // Element (line, column 0) of a channel of the input, or of all of its channels where they stand together.
  const char* source(int64_t image, int64_t channel, int64_t line) const {
    const int64_t first = a_.channels_last ? (image * a_.in[0] + line) * a_.in[1] * a_.channels
                                           : ((image * a_.channels + channel) * a_.in[0] + line) * a_.in[1];
    return static_cast<const char*>(a_.x) + first * type_size(a_.type);
  }

  void lay_out(int64_t first, int64_t count, float* to) const {
    const int64_t parts = a_.channels_last ? at_.lines : a_.channels;  // of an image
    for_rows(count * parts, 1, a_.channels * at_.plane / parts, [&](int64_t begin, int64_t end) {
      Scratch<float> wide(a_.channels_last ? a_.in[1] * a_.channels : a_.in[1]);
      for (int64_t p = begin; p < end; ++p) {
        float* image = to + p / parts * a_.channels * at_.plane;
        if (a_.channels_last) {
          lay_out_line(first + p / parts, 0, a_.channels, p % parts, wide.get(), image);
        } else {
          for (int64_t line = 0; line < at_.lines; ++line)
            lay_out_line(first + p / parts, p % parts, 1, line, wide.get(), image + p % parts * at_.plane);
        }
      }
    });
  }

  // A line of `channels` channels, which stand side by side in the input; image: of the first of them.
  void lay_out_line(int64_t image, int64_t channel, int64_t channels, int64_t line, float* wide, float* to) const {
    if (!read(0, line % a_.stride[0])) return;
    const int64_t from_line = line - a_.before[0];
    float* const out = to + line * at_.line;
    const int64_t low = std::min(a_.before[1], at_.columns);
    const int64_t high = std::max(low, std::min(at_.columns, a_.before[1] + a_.in[1]));
    const bool outside = from_line < 0 || from_line >= a_.in[0];
    if (outside || low > 0 || high < at_.line)
      for (int64_t c = 0; c < channels; ++c) std::memset(out + c * at_.plane, 0, at_.line * sizeof(float));
    if (outside) return;
    const char* source_line = source(image, channel, from_line);
    const float* from = reinterpret_cast<const float*>(source_line);
    if (a_.type != kFloat32) {
      loops_.load(source_line, a_.in[1] * channels, a_.type, wide);
      from = wide;
    }
    const int64_t step = a_.stride[1];
    if (channels == 1 && step == 1) {
      std::memcpy(out + low, from + low - a_.before[1], (high - low) * sizeof(float));
      return;
    }
    for (int64_t phase = 0; phase < step; ++phase) {
      if (!read(1, phase)) continue;
      const int64_t first = low + ((phase - low) % step + step) % step;
      float* const column = out + phase * at_.phase + first / step;
      const float* const pixel = from + (first - a_.before[1]) * channels;
      const int64_t count = first < high ? (high - first + step - 1) / step : 0;
      if (channels == 1)
        for (int64_t x = 0; x < count; ++x) column[x] = pixel[x * step];
      else
        loops_.transpose(pixel, step * channels, count, channels, column, at_.plane);
    }
  }

  // Whether a patch has lines or columns that leave this rest when divided by the stride.
  bool read(int d, int64_t rest) const {
    for (int64_t k = 0; k < a_.kernel[d]; ++k)
      if (k * a_.dilation[d] % a_.stride[d] == rest) return true;
    return false;
  }

  // Whether patches share so many pixels that their channels' largest magnitudes are found once for all.
  bool shares_peaks() const { return a_.channels > 1 && a_.kernel[0] * a_.kernel[1] > a_.stride[0] * a_.stride[1]; }

  void find_peaks(const float* images, int64_t count, float* peaks) const {
    constexpr int64_t kPiece = 1024;
    const int64_t pieces = (at_.plane + kPiece - 1) / kPiece;
    for_rows(count * pieces, 1, kPiece * a_.channels, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t image = p / pieces, from = p % pieces * kPiece;
        loops_.channel_peaks(images + image * a_.channels * at_.plane, a_.channels, at_.plane, from,
                             std::min(from + kPiece, at_.plane), peaks + image * at_.plane);
      }
    });
  }

  // ---- products ----

  // Quantized patches of `count` positions.
  struct Quantized {
    Scratch<int8_t> q;
    Scratch<float> scale;
    Scratch<int32_t> offsets;
    Quantized(const BandsArg& w, int64_t count) : q(count * band_width(w)), scale(count), offsets(count * w.groups) {}
    BandInput input(bool past_caches) const { return {q.get(), scale.get(), offsets.get(), past_caches}; }
  };

  // Whether patches are pixels of the input whose channels stand together: rows, wherever a stride puts them.
  bool pixels() const {
    const auto inside = [&](int d) {
      return a_.kernel[d] == 1 && !a_.before[d] && (a_.out[d] - 1) * a_.stride[d] < a_.in[d];
    };
    return a_.channels_last && inside(0) && inside(1);
  }

  RowRoom room() const { return pixels() ? RowRoom(a_.channels, a_.type) : RowRoom(0, kFloat32); }

  void quantize_pixels(int64_t begin, int64_t end, int64_t first, const Quantized& to, const RowRoom& room) const {
    const float* rows[kMostPatches];
    for (int64_t t = begin, count; t < end; t += count) {
      count = loops_.band_tokens(end - t);
      for (int64_t l = 0; l < count; ++l) {
        const int64_t line = (t + l) / a_.out[1], place = (t + l) % a_.out[1] * a_.stride[1];
        const char* const pixel =
            source(line / a_.out[0], 0, line % a_.out[0] * a_.stride[0]) + place * a_.channels * type_size(a_.type);
        rows[l] = reinterpret_cast<const float*>(pixel);
        if (a_.type == kFloat32) continue;
        float* const wide = room.wide.get() + l * a_.channels;
        loops_.load(pixel, a_.channels, a_.type, wide);
        rows[l] = wide;
      }
      const int64_t i = t - first;
      loops_.quantize_rows(w_, rows, count, to.q.get() + i * band_width(w_), to.scale.get() + i,
                           to.offsets.get() + i * w_.groups, room.bytes.get());
    }
  }

  // Positions [begin, end) of these images; `first` is where they begin in `to`.
  void quantize(const float* images, const float* peaks, int64_t begin, int64_t end, int64_t first, const Quantized& to,
                const RowRoom& room) const {
    if (pixels()) return quantize_pixels(begin, end, first, to, room);
    Patches p{};
    p.image = p.peaks = images;
    p.offsets = offsets_.get();
    p.peak_columns = w_.cols;
    if (shares_peaks()) p.peaks = peaks, p.peak_columns = a_.kernel[0] * a_.kernel[1];
    for (int64_t t = begin, count; t < end; t += count) {
      count = loops_.band_tokens(end - t);
      for (int64_t l = 0; l < count; ++l) {
        const int64_t image = (t + l) / positions_, place = (t + l) % positions_;
        const int64_t in_plane = place / a_.out[1] * a_.stride[0] * at_.line + place % a_.out[1];
        p.at[l] = image * a_.channels * at_.plane + in_plane;
        p.peak_at[l] = shares_peaks() ? image * at_.plane + in_plane : p.at[l];
      }
      const int64_t i = t - first;
      loops_.quantize_patches(w_, p, (int)count, to.q.get() + i * band_width(w_), to.scale.get() + i,
                              to.offsets.get() + i * w_.groups);
    }
  }

  void multiply(const float* images, const float* peaks, int64_t first, int64_t count) const {
    const int64_t bands = (w_.n + kBandRows - 1) / kBandRows, chunks = (count + kChunk - 1) / kChunk;
    const float* bias = a_.bias ? bias_.get() : nullptr;
    const bool past = direct() && goes_past_caches(static_cast<float*>(a_.y), a_.images * positions_, w_.n);
    if (chunks >= kFewChunks) {
      for_rows(chunks, 1, kChunk * w_.cols * w_.n, [&](int64_t begin, int64_t end) {
        const Quantized part(w_, kChunk);
        const RowRoom room = this->room();
        Scratch<float> y(kChunk * w_.n);
        for (int64_t c = begin; c < end; ++c) {
          const int64_t from = c * kChunk, to = std::min(from + kChunk, count);
          quantize(images, peaks, from, to, from, part, room);
          float* const out = direct() ? static_cast<float*>(a_.y) + (first + from) * w_.n : y.get();
          loops_.multiply_bands(w_, 0, bands, part.input(past), 0, to - from, bias, out);
          if (!direct()) write(out, first + from, to - from, 0, w_.n);
        }
        if (past) finish_stores();
      });
      return;
    }
    const Quantized all(w_, count);
    Scratch<float> y(direct() ? 0 : count * w_.n);
    for_rows(count, kMostPatches, w_.cols * 4,
             [&](int64_t begin, int64_t end) { quantize(images, peaks, begin, end, 0, all, room()); });
    float* const out = direct() ? static_cast<float*>(a_.y) + first * w_.n : y.get();
    for_rows(bands, 1, kBandRows * w_.cols * count, [&](int64_t begin, int64_t end) {
      loops_.multiply_bands(w_, begin, end, all.input(past), 0, count, bias, out);
      if (!direct() && !a_.channels_last) write(out, first, count, begin * kBandRows, std::min(end * kBandRows, w_.n));
      if (past) finish_stores();
    });
    if (!direct() && a_.channels_last) write(out, first, count, 0, w_.n);
  }

  // Whether the products are the result as they come: (positions, n) in float32.
  bool direct() const { return a_.channels_last && a_.type == kFloat32; }

  // Rows [row0, row1) of products (positions, n) from position `first` on, in the order and type of the result.
  void write(const float* from, int64_t first, int64_t count, int64_t row0, int64_t row1) const {
    char* const y = static_cast<char*>(a_.y);
    const int size = type_size(a_.type);
    if (a_.channels_last) return loops_.store(from, count * w_.n, y + first * w_.n * size, a_.type);
    const int64_t rows = row1 - row0;
    Scratch<float> wide(a_.type == kFloat32 ? 0 : count * rows);
    for (int64_t t = 0, part; t < count; t += part) {  // by image
      const int64_t image = (first + t) / positions_, place = (first + t) % positions_;
      part = std::min(count - t, positions_ - place);
      char* const to = y + ((image * w_.n + row0) * positions_ + place) * size;
      const float* const products = from + t * w_.n + row0;
      if (a_.type == kFloat32) {
        loops_.transpose(products, w_.n, part, rows, reinterpret_cast<float*>(to), positions_);
        continue;
      }
      loops_.transpose(products, w_.n, part, rows, wide.get(), part);
      for (int64_t r = 0; r < rows; ++r) loops_.store(wide.get() + r * part, part, to + r * positions_ * size, a_.type);
    }
  }

  const ConvArg& a_;
  const BandsArg& w_;
  const Layout at_;
  const int64_t positions_;
  const PackedLoops& loops_ = packed_loops();
  Scratch<int32_t> offsets_;  // of a patch's columns
  Scratch<float> bias_;
};

}  // namespace

void convolve_bands(const ConvArg& a, const BandsArg& w) { Convolution(a, w).run(); }

}  // namespace askew
