// Runs a statement with the storage type T, or the type of the grid, that is known at run time. `Codebook` is what the
// room searches its levels with.
#pragma once
#include "types.h"

#define ASKEW_CASE(LABEL, DECLARATION, ...) \
  LABEL:                                    \
  {                                         \
    DECLARATION;                            \
    __VA_ARGS__;                            \
    break;                                  \
  }
#define ASKEW_BY_TYPE(TYPE, ...)                                         \
  switch (TYPE) {                                                        \
    ASKEW_CASE(case kFloat32, constexpr int T = kFloat32, __VA_ARGS__)   \
    ASKEW_CASE(case kBFloat16, constexpr int T = kBFloat16, __VA_ARGS__) \
    ASKEW_CASE(default, constexpr int T = kFloat16, __VA_ARGS__)         \
  }
#define ASKEW_BY_GRID(KIND, ...)                                     \
  switch (KIND) {                                                    \
    ASKEW_CASE(case kUniform, typedef UniformGrid Grid, __VA_ARGS__) \
    ASKEW_CASE(case kBinary, typedef BinaryGrid Grid, __VA_ARGS__)   \
    ASKEW_CASE(default, typedef Codebook Grid, __VA_ARGS__)          \
  }
// Of a mixture, which has no codebooks.
#define ASKEW_BY_CANDIDATE(KIND, ...)                              \
  switch (KIND) {                                                  \
    ASKEW_CASE(case kFloat, typedef FloatGrid Grid, __VA_ARGS__)   \
    ASKEW_CASE(case kBinary, typedef BinaryGrid Grid, __VA_ARGS__) \
    ASKEW_CASE(default, typedef UniformGrid Grid, __VA_ARGS__)     \
  }
