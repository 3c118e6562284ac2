// Convolutions with a filter for each channel, in float32, channels last. Threads share the lines of the output. Where
// zeros stand beside the image its lines are copied between them, as many as a filter reaches over.
#include <algorithm>
#include <cstring>
#include <vector>

#include "packed_conv.h"
#include "scratch.h"

namespace askew {
namespace {

class Depthwise {
 public:
  Depthwise(const ConvArg& a, const float* taps)
      : a_(a),
        taps_(taps),
        line_(a.in[1] * a.channels),
        reach_((a.out[1] - 1) * a.stride[1] + (a.kernel[1] - 1) * a.dilation[1] + 1),
        copied_(a.before[1] > 0 || reach_ > a.in[1]) {}

  void run() const {
    const int64_t work = a_.out[1] * a_.channels * a_.kernel[0] * a_.kernel[1] / 8;  // a line's, in those of int8
    for_rows(a_.images * a_.out[0], 1, work, [&](int64_t begin, int64_t end) { lines(begin, end); });
  }

 private:
  // Lines [begin, end) of the output, of all images.
  void lines(int64_t begin, int64_t end) const {
    const int64_t span = (a_.kernel[0] - 1) * a_.dilation[0] + 1;  // lines under a filter
    Scratch<float> copies(copied_ ? span * reach_ * a_.channels : 0);
    std::vector<int64_t> held(span, -1);  // which line of which image stands in each copy
    std::vector<const float*> under(a_.kernel[0]);
    DepthwiseLine l{};
    l.lines = under.data();
    l.bias = static_cast<const float*>(a_.bias);
    l.channels = a_.channels;
    l.stride = a_.stride[1];
    l.dilation = a_.dilation[1];
    std::copy_n(a_.kernel, 2, l.kernel);
    float* const y = static_cast<float*>(a_.y);
    l.past_caches = goes_past_caches(y, a_.images * a_.out[0] * a_.out[1], a_.channels);
    for (int64_t o = begin; o < end; ++o) {
      const int64_t image = o / a_.out[0], top = o % a_.out[0] * a_.stride[0] - a_.before[0];
      for (int64_t i = 0; i < a_.kernel[0]; ++i) {
        const int64_t at = top + i * a_.dilation[0];
        under[i] = at < 0 || at >= a_.in[0] ? nullptr : line(image * a_.in[0] + at, copies.get(), held);
      }
      depthwise_(l, taps_, a_.out[1], y + o * a_.out[1] * a_.channels);
    }
    if (l.past_caches) finish_stores();
  }

  // Line `at` of all images, from where the first position's filter begins.
  const float* line(int64_t at, float* copies, std::vector<int64_t>& held) const {
    const float* const from = static_cast<const float*>(a_.x) + at * line_;
    if (!copied_) return from;
    const int64_t slot = at % (int64_t)held.size(), low = std::min(a_.before[1], reach_) * a_.channels;
    float* const to = copies + slot * reach_ * a_.channels;
    if (held[slot] == at) return to;
    held[slot] = at;
    const int64_t whole = reach_ * a_.channels, count = std::min(line_, whole - low);
    std::memset(to, 0, low * sizeof(float));
    std::memcpy(to + low, from, count * sizeof(float));
    std::memset(to + low + count, 0, (whole - low - count) * sizeof(float));
    return to;
  }

  const ConvArg& a_;
  const float* const taps_;
  const int64_t line_, reach_;  // numbers of an input line; pixels that a line of the output reads
  const bool copied_;
  decltype(PackedLoops::depthwise_line) const depthwise_ = packed_loops().depthwise_line;
};

}  // namespace

void convolve_depthwise(const ConvArg& a, const float* taps) { Depthwise(a, taps).run(); }

}  // namespace askew
