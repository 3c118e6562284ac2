"""What ``bench`` measures. A suite is a module: its cases (``ENTRIES``), what their rows are held against (``GOALS``)
and their lines of the README's table (``HEADLINES``). Adding any of these is one entry there; a suite one name here."""

from ..goals import Goal, Headline
from ..harness import Entry
from . import around, fake_quant, linear, models, packed, sam, search, startup, step, train

MODULES = {"step": step, "fake_quant": fake_quant, "linear": linear, "packed": packed, "models": models, "train": train,
           "around": around, "sam": sam, "search": search, "startup": startup}  # fmt: skip
SUITES: dict[str, list[Entry]] = {name: module.ENTRIES for name, module in MODULES.items()}
GOALS: dict[str, list[Goal]] = {name: module.GOALS for name, module in MODULES.items()}
HEADLINES: dict[str, list[Headline]] = {name: module.HEADLINES for name, module in MODULES.items()}
