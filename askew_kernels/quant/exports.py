"""What a weight must be trained as so that a format of others holds it bit for bit: ``QuantConfig.for_export``."""

from __future__ import annotations

from dataclasses import dataclass

from .grids import FP4, Binary, Codebook, Grid, Ternary, Uniform

# the levels of llama.cpp's type of that name, public in the format
IQ4_NL = Codebook((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))


@dataclass(frozen=True)
class Target:
    """grid: the levels. block: the weights that share a scale in the format, groups may be multiples of it; 0: any.
    group_size: where nothing is said; None: a scale for each channel. scale_dtype: what the format keeps scales in.
    rule: that of the scales where nothing is said; None: the grid's."""

    grid: Grid
    block: int
    group_size: int | None
    scale_dtype: str
    rule: str | None = None


TARGETS = {
    "gguf:q8_0": Target(Uniform(8), 32, 32, "float16"),
    "gguf:q6_k": Target(Uniform(6), 256, 256, "float16"),
    "gguf:q5_0": Target(Uniform(5), 32, 32, "float16"),
    "gguf:q4_0": Target(Uniform(4), 32, 32, "float16"),
    "gguf:iq4_nl": Target(IQ4_NL, 32, 32, "float16"),
    "gguf:mxfp4": Target(FP4(), 32, 32, "float8_e8m0fnu", "ocp"),
    "gguf:tq2_0": Target(Ternary(), 256, 256, "float16"),
    "gguf:tq1_0": Target(Ternary(), 256, 256, "float16"),
    "gguf:q2_0": Target(Ternary(), 64, 64, "float16"),
    "gguf:q1_0": Target(Binary(), 128, 128, "float16"),
    **{f"compressed-tensors:{k}": Target(Uniform(k), 0, 128 if k < 8 else None, "bfloat16") for k in range(2, 9)},
    "compressed-tensors:mxfp4": Target(FP4(), 32, 32, "float8_e8m0fnu", "ocp"),
    "compressed-tensors:nvfp4": Target(FP4(), 16, 16, "float8_e4m3fn"),
    **{f"metal:{k}": Target(Uniform(k), 32, 64, "bfloat16") for k in (2, 4, 8)},
    **{f"onnx:{k}": Target(Uniform(k), 16, 32, "float32") for k in (2, 4, 8)},
    **{f"torchao:{k}": Target(Uniform(k), 0, 32, "bfloat16") for k in range(2, 9)},
}

ALIASES = {name: f"compressed-tensors:{name}" for name in ("mxfp4", "nvfp4")}  # types that are known by themselves


def target(name: str) -> Target:
    """Raises TypeError/ValueError with the names that there are."""
    if not isinstance(name, str):
        raise TypeError(f"target: expected a name such as 'gguf:q4_0', got {name!r:.80}")
    known = ALIASES.get(name.lower(), name.lower())
    if known not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[known]
