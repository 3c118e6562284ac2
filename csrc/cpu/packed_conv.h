#pragma once
#include "../math/types.h"

namespace askew {

void convolve_bands(const ConvArg& a, const BandsArg& w);
// taps: (kernel, channels); x and y float32, channels last.
void convolve_depthwise(const ConvArg& a, const float* taps);

}  // namespace askew
