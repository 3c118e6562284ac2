"""What ``bench`` measures: suite -> entries. Adding a benchmark is one ``Entry`` in its suite's module."""

from ..harness import Entry
from .fake_quant import FAKE_QUANT
from .linear import LINEAR
from .packed import PACKED
from .sam import SAM
from .search import SEARCH
from .startup import STARTUP
from .step import STEP
from .train import TRAIN

SUITES: dict[str, list[Entry]] = {
    "step": STEP,
    "fake_quant": FAKE_QUANT,
    "linear": LINEAR,
    "packed": PACKED,
    "train": TRAIN,
    "sam": SAM,
    "search": SEARCH,
    "startup": STARTUP,
}
