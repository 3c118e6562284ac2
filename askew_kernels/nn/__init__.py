"""Quantized layers, and the calls that put them into a model."""

from . import convert, inputs, kinds, kv
from .convert import *  # noqa: F403  (their __all__)
from .inputs import *  # noqa: F403
from .kinds import *  # noqa: F403
from .kv import *  # noqa: F403

__all__ = convert.__all__ + inputs.__all__ + kinds.__all__ + kv.__all__
