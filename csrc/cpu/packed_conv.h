#pragma once
#include "../math/types.h"

namespace askew {

void convolve_bands(const ConvArg& a, const BandsArg& w);

}  // namespace askew
