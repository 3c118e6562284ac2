"""What a layer is told about its quantization, and its JSON form."""

from __future__ import annotations

import json
import numbers
from dataclasses import dataclass, fields
from typing import Any

import torch

from .. import contract
from .exports import target as find_target
from .gradients import LUQ, check_gradient, gradient_from_dict
from .grids import Grid, Uniform, as_flag, grid_from_dict
from .scales import (
    LEARNED,
    SAWB_COEFFICIENTS,
    check_coefficients,
    check_rule,
    check_rule_type,
    check_scale_dtype,
    default_rule,
    num_rows,
)

LEVEL_TYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}  # forwards that multiply levels, and how they hold them
IN_STEP = "step"  # of ``ste_clip``
LEARNED_INPUTS = ("lsq", "lsq+")  # scales of inputs that are learned, and with an offset
FORWARDS = ("hard", "relaxed", *LEVEL_TYPES)
SCALE_FIELDS = ("scale", "granularity", "group_size", "sawb_coefficients", "scale_dtype")  # what a scale follows from


@dataclass(frozen=True)
class QuantConfig:
    """How one layer's weight, its inputs and its gradients are quantized.

    =====================  ===========================================================================================
    ``weight``             the grid
    ``scale``              a rule's name (``absmax``, ``sawb``, ``mean``, ``rms``, ``mse``; ``ocp`` with powers of
                           two); None (default) becomes the grid's own, ``quant.default_rule``; ``"lsq"``: the scale is
                           a Parameter of the layer, ``weight_scale``, and learned until it is frozen
                           (docs/pytorch.md)
    ``granularity``        what has one scale: ``per_tensor``, ``per_channel`` (each output) or ``per_group``:
    ``group_size``         … so many weights along the inputs of an output
    ``forward``            ``"hard"`` computes with s Q(w/s), straight-through for the gradient; ``"relaxed"`` with the
                           float weights in training and with s Q(w/s) in eval, as published; ``"fp8"`` and
                           ``"int8"`` (linear layers) multiply levels of a byte, those of the weight by those of the
                           input, which is quantized token by token (``ops.token_levels``), with the gradients of the
                           float product (docs/pytorch.md)
    ``sawb_coefficients``  another (c1, c2) than the rule's own
    ``ste_clip``           zero the gradient outside the hull: True (default) in each backward; ``"step"`` in the
                           optimizer's own pass, which zeroes the sum of a step's gradients (12 bytes a weight less to
                           move; by the scale that the step starts from, which is the forward's once it is frozen; a
                           gradient that is read before the step, as for its norm, is not zeroed yet; for ``ASkewSGD``
                           and its like, not with ``forward="relaxed"``); False never
    ``activation``         the grid of the layer's input, whose scale is its own largest magnitude, token by token
                           (nn.Linear) or image by image (nn.Conv2d); None (default): the input stays float, or, with
                           ``forward="fp8"`` and ``"int8"``, may be any number that these hold
    ``activation_scale``   how that scale is found; None (default) as above, ``"lsq"`` one learned for the layer,
                           ``"lsq+"`` one with an offset, for inputs that do not lie around 0 (``nn.inputs``)
    ``gradient``           what the gradient of the layer's output is rounded to, stochastically and without bias, by
                           numbers that torch's generator seeds: ``LUQ(bits=4)`` before both products of the backward;
                           ``"int8"`` (with ``forward="int8"``) token by token for the input's gradient, which is a
                           product of levels then (the weight's stays float); None (default): nothing
    ``scale_dtype``        "float32", or what the scales are rounded to wherever they are computed, so that a file can
                           keep them in it: "float16", "bfloat16", "float8_e8m0fnu" (powers of two), "float8_e4m3fn"
                           (E4M3 numbers times one power of two for the tensor, ``quant.scale_unit``); a torch.dtype
                           does, too
    =====================  ===========================================================================================

    Raises ValueError/TypeError naming the field. ``to_dict``/``from_dict`` and ``to_json``/``from_json`` round-trip.
    """

    weight: Grid = Uniform(bits=4)  # noqa: RUF009 (frozen, so it can be shared)
    scale: str = None  # type: ignore[assignment]  # a rule's name as soon as the object is made
    granularity: str = "per_channel"
    group_size: int | None = None
    forward: str = "hard"
    sawb_coefficients: tuple[float, float] | None = None
    ste_clip: bool | str = True
    activation: Grid | None = None
    scale_dtype: str = "float32"
    activation_scale: str | None = None
    gradient: LUQ | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Grid):
            raise TypeError(f"weight: expected a grid such as Uniform(bits=4), got {self.weight!r}")
        if self.activation is not None and not isinstance(self.activation, Grid):
            raise TypeError(f"activation: expected a grid such as Uniform(bits=8), or None, got {self.activation!r}")
        if self.forward not in FORWARDS:
            raise ValueError(f"forward: expected one of {', '.join(FORWARDS)}, got {self.forward!r}")
        if isinstance(self.group_size, numbers.Integral) and not isinstance(self.group_size, bool):
            object.__setattr__(self, "group_size", int(self.group_size))  # NumPy's, too
        if isinstance(self.ste_clip, str) and self.ste_clip != IN_STEP:
            raise ValueError(f"ste_clip: expected True, False or {IN_STEP!r}, got {self.ste_clip!r}")
        if not isinstance(self.ste_clip, str):
            object.__setattr__(self, "ste_clip", as_flag("ste_clip", self.ste_clip))
        elif self.forward == "relaxed":
            raise ValueError("ste_clip: 'step' takes the place of the clip in the backward of a quantized forward, "
                             "which forward='relaxed' has not; expected True or False")  # fmt: skip
        object.__setattr__(self, "sawb_coefficients", check_coefficients(self.sawb_coefficients))
        if self.scale is None:
            object.__setattr__(self, "scale", default_rule(self.weight, self.sawb_coefficients))
        check_rule(self.scale, self.weight, self.sawb_coefficients, "scale")
        if self.sawb_coefficients is not None and self.scale != "sawb":
            raise ValueError(f'sawb_coefficients: only with scale="sawb", got {self.scale!r}')
        if self.learns_scale:
            self._check_learned()
        if self.activation_scale is not None:
            self._check_inputs()
        object.__setattr__(self, "scale_dtype", check_scale_dtype("scale_dtype", self.scale_dtype))
        check_gradient(self.gradient, self.forward)
        check_rule_type(self.scale, self.scale_dtype, "scale")
        num_rows((1, self.group_size or 1), self.granularity, self.group_size)  # checks them
        if self.level_dtype is not None:
            self._check_levels(self.level_dtype)

    def _check_learned(self) -> None:
        if self.forward == "relaxed":
            raise ValueError("scale: 'lsq' is learned from the gradient of a quantized forward, and forward='relaxed' "
                             "trains with the float weights; expected forward='hard', or a rule")  # fmt: skip
        if self.ste_clip == IN_STEP:
            raise ValueError("ste_clip: 'step' leaves the clip to the optimizer, and scale='lsq' takes the scale's "
                             "gradient in the same pass of each backward; expected True or False")  # fmt: skip

    def _check_inputs(self) -> None:
        if self.activation_scale not in LEARNED_INPUTS:
            raise ValueError(f"activation_scale: expected None, {' or '.join(map(repr, LEARNED_INPUTS))}, got "
                             f"{self.activation_scale!r}")  # fmt: skip
        if self.activation is None:
            raise ValueError(f"activation_scale: {self.activation_scale!r} needs a grid of the input; expected "
                             "activation=Uniform(8), say")  # fmt: skip
        if self.level_dtype is not None:
            raise ValueError(f"activation_scale: forward={self.forward!r} quantizes inputs token by token, got "
                             f"{self.activation_scale!r}; expected forward='hard'")  # fmt: skip

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is learned; the rule then says where it starts."""
        return self.scale == LEARNED

    @property
    def clips_in_backward(self) -> bool:
        """Whether the backward itself zeroes the gradient outside the hull."""
        return self.ste_clip is True

    @property
    def clips_in_step(self) -> bool:
        """Whether that is left to the optimizer's pass."""
        return self.ste_clip == IN_STEP

    @property
    def level_dtype(self) -> torch.dtype | None:
        """What the levels that the forward multiplies are held in; None where it multiplies floats."""
        return LEVEL_TYPES.get(self.forward)

    def _check_levels(self, dtype: torch.dtype) -> None:
        if self.granularity == "per_group":
            raise ValueError(f"granularity: forward={self.forward!r} takes one scale for each tensor or output, "
                             "expected per_tensor or per_channel, got 'per_group'")  # fmt: skip
        for name, grid in (("weight", self.weight), ("activation", self.activation)):
            if grid is None or contract.holds_levels(dtype, grid.levels):
                continue
            others = [f for f, t in LEVEL_TYPES.items() if contract.holds_levels(t, grid.levels)]
            raise ValueError(f"forward: {self.forward!r} holds levels in {dtype}, which does not hold those of {name}="
                             f"{grid} exactly; {others[0] if others else 'hard'!r} does")  # fmt: skip

    @classmethod
    def for_export(cls, target: str, **options: Any) -> QuantConfig:
        """What to train with, so that a format of others holds the weights bit for bit: its grid, its groups, and
        scales that are rounded in training to the type that it keeps.

        target: ``gguf:q4_0``, ``compressed-tensors:4``, ``onnx:4``, ``mxfp4``, ``nvfp4``, … (all:
        ``quant.exports.TARGETS``). options: the other fields; ``group_size`` and ``granularity`` within what the format
        allows (a multiple of its block of weights with one scale; one scale for each channel or tensor serves every
        block).
        Raises ValueError for an unknown target, with those that are known, and for what the format does not hold.
        """
        wanted = find_target(target)
        fixed: dict[str, Any] = {"weight": wanted.grid, "scale_dtype": wanted.scale_dtype}
        if given := sorted(fixed.keys() & options.keys()):
            raise ValueError(f"{given[0]}: {target} sets it ({fixed[given[0]]}), got {options[given[0]]!r:.80}")
        if options.get("granularity") not in (None, "per_group"):
            size = options.get("group_size")
        else:
            size = options.get("group_size") or wanted.group_size
            options["granularity"] = "per_group" if size else "per_channel"
        if options.get("scale") is None and options.get("sawb_coefficients") is None:
            options["scale"] = wanted.rule
        config = cls(**fixed, **options | {"group_size": size})
        if wanted.block and config.group_size and config.group_size % wanted.block:
            raise ValueError(f"group_size: {target} keeps a scale for each {wanted.block} weights, expected a multiple "
                             f"of that, got {config.group_size}")  # fmt: skip
        return config

    def to_dict(self) -> dict[str, Any]:
        d = {f.name: getattr(self, f.name) for f in fields(self)}
        d = {name: value.to_dict() if isinstance(value, Grid | LUQ) else value for name, value in d.items()}
        if self.sawb_coefficients is not None:
            d["sawb_coefficients"] = list(self.sawb_coefficients)
        if self.activation is None:  # as before there was one
            del d["activation"]
        if self.scale_dtype == "float32":
            del d["scale_dtype"]
        if self.activation_scale is None:
            del d["activation_scale"]
        if self.gradient is None:
            del d["gradient"]
        return d

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> QuantConfig:
        arguments = dict(d)
        arguments["weight"] = grid_from_dict(arguments.get("weight", {}))
        if arguments.get("activation") is not None:
            arguments["activation"] = grid_from_dict(arguments["activation"])
        arguments["gradient"] = gradient_from_dict(arguments.get("gradient"))
        if arguments.get("scale") == "sawb" and not arguments["weight"].evenly_spaced:
            # earlier releases took the coefficients of evenly spaced levels without being told to
            arguments["sawb_coefficients"] = arguments.get("sawb_coefficients") or SAWB_COEFFICIENTS.get(
                arguments["weight"].bits
            )
        try:
            return cls(**arguments)
        except TypeError as error:
            raise ValueError(f"QuantConfig: {error}") from None

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> QuantConfig:
        return cls.from_dict(json.loads(text))
