"""Typed public functions over the operators ``askew::…``: every argument is checked before anything is written.

Shapes: a tensor is seen as (rows, cols), one scale a row; ``scale`` has shape () or (1,) per tensor, (shape[0],) per
channel, (shape[0] * groups,) per group. Storage is float32, bfloat16 or float16 (float64 runs on the reference);
arithmetic is float32. In-place functions accept any dense layout; where it is not contiguous they work on a copy.
"""

from __future__ import annotations

from . import checks, lowbit, mix, packed, prepared, quantize, rules, sam, scales, schema, update
from .checks import *  # noqa: F403
from .lowbit import *  # noqa: F403
from .mix import *  # noqa: F403
from .packed import *  # noqa: F403
from .prepared import *  # noqa: F403
from .quantize import *  # noqa: F403
from .rules import *  # noqa: F403
from .sam import *  # noqa: F403
from .scales import *  # noqa: F403
from .update import *  # noqa: F403

__all__ = ["schema"]
for _stem in (checks, lowbit, mix, packed, prepared, quantize, rules, sam, scales, update):
    __all__ += _stem.__all__

lowbit_linear, lowbit_dequantize = packed.packed_linear, packed.packed_dequantize  # their names until 0.2
schema.count_flops()
