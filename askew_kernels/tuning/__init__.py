"""Launch parameters for each kind of device: what they are, the values in use, and the tables of tuned ones.

They decide how fast a result comes, never its bits (a test sets odd values and compares), but for ``SUMS``: products of
packed weights are float32 sums in an order that depends on the kernel. A table is a JSON file::

    {"device": {"type": "cpu", "name": "AMD EPYC 9654", "capability": "avx512", "cores": 8},
     "parameters": {"cpu": {"prefetch_columns": 1024}},
     "found": {"time": "2026-11-21T12:00:00+00:00", "torch": "2.13.0", …}}

``device`` is what it was made for; ``parameters`` names the sections ``cpu``, ``cpu_packed``, ``cuda`` (C++),
``cpu_convolution``, ``triton`` (elementwise) and ``triton_packed`` with those values that differ from the built-in
ones; ``found`` says how it came about and is not read. ``bench tune`` makes such tables, ``runtime.use_tuning`` and
``ASKEW_TUNING`` choose one by hand; those of this folder serve the devices that they were made for.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Parameter:
    """A whole number in [low, high]; ``tried``: what ``bench tune`` compares with the built-in value; ``choice``: all
    of a section that share one are tried together; ``built_in``: None where the compiled module has it."""

    low: int
    high: int
    tried: tuple[int, ...]
    power_of_two: bool = False
    choice: str = ""
    built_in: int | None = None

    def check(self, name: str, value: object) -> None:
        whole = isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high
        if not whole or (self.power_of_two and value & (value - 1)):  # type: ignore[operator]
            what = "a power of two" if self.power_of_two else "an integer"
            raise ValueError(f"{name}: expected {what} from {self.low} to {self.high}, got {value!r}")


NEVER = 1 << 60  # bytes that no list has
LARGE = 1 << 20  # weights of a convolution that leave a core's cache as floats

# Section -> name -> parameter. What each one does, and the built-in values: csrc/tuning.h for C++ (``cpu_packed``: how
# many inputs each kernel serves), here for the others. Packed convolutions with float activations on a CPU: the output
# positions below which products come from the codes, the same of weights of ``LARGE`` and more, and where patches are
# pixels as they stand. Triton:
# elements of an elementwise program (four 16-byte vectors of fp32 a thread) and its warps; for products from packed
# codes the rows of the weight that a program takes, words or columns in a step, and warps, for few inputs and, in
# tiles, for many.
PARAMETERS: dict[str, dict[str, Parameter]] = {
    "cpu": {
        "prefetch_columns": Parameter(0, 1 << 16, (32, 64, 128, 256, 512, 1024)),
        "piece_columns": Parameter(16, 1 << 30, (4096, 16384, 65536)),
        "serial_elements": Parameter(0, 1 << 40, (8192, 16384, 32768, 65536, 131072)),
        "streaming_bytes": Parameter(0, NEVER, (1 << 20, 4 << 20, 16 << 20, 64 << 20, NEVER)),
        "pooled_bytes": Parameter(1, NEVER, (1 << 18, 1 << 20, 4 << 20, NEVER)),
    },
    "cpu_packed": {
        "panel_inputs": Parameter(1, NEVER, (2, 3, 4, 5, 6, 8, 12)),
        "pair_inputs": Parameter(1, NEVER, (2, 3, 4, 5, 8)),
        "bit_table_inputs": Parameter(0, NEVER, (0, 4, 8, 12, 16)),
        "table_inputs": Parameter(0, 1 << 30, (0, 1, 2, 3, 4)),
        "table_rows": Parameter(0, NEVER, (128, 256, 512, 1024, 2048)),
        "trit_table_rows": Parameter(0, NEVER, (16, 32, 64, 128, 256)),
        "library_inputs": Parameter(1, NEVER, (32, 64, 96, 128, 256, NEVER)),
        "shared_blocks": Parameter(1, 1 << 30, (1, 2, 4, 8, 16)),
        "shared_bytes": Parameter(0, NEVER, (0, 5 << 15, 5 << 16, 5 << 17, 5 << 18)),
    },
    "cpu_convolution": {
        "positions": Parameter(0, NEVER, (0, 4, 8, 16, 32, 64), built_in=16),
        "large_positions": Parameter(0, NEVER, (16, 32, 64, 128, 256), built_in=32),
        "points": Parameter(0, NEVER, (256, 512, 1024, 2048, 4096), built_in=1024),
    },
    "cuda": {"slots": Parameter(1, 64, (4, 8, 16, 32))},
    "triton": {
        "block": Parameter(16, 1 << 14, (512, 1024, 2048, 4096, 8192), True, "launch", 2048),
        "warps": Parameter(1, 16, (2, 4, 8), True, "launch", 4),
    },
    "triton_packed": {
        "few_rows": Parameter(1, 64, (2, 4, 8), True, "few", 4),
        "few_words": Parameter(32, 1024, (64, 128, 256), True, "few", 128),
        "few_warps": Parameter(1, 16, (2, 4, 8), True, "few", 4),
        "tile_rows": Parameter(16, 256, (32, 64, 128), True, "tile", 64),
        "tile_columns": Parameter(16, 256, (32, 64, 128), True, "tile", 64),
        "tile_warps": Parameter(1, 16, (4, 8), True, "tile", 4),
    },
}
SUMS = ("cpu_packed", "cpu_convolution", "triton_packed")  # whose values change the order of float32 sums
COMPILED = ("cpu", "cpu_packed", "cuda")  # whose built-in values the compiled library has
SECTIONS = {  # of a type of devices
    device: tuple(section for section in PARAMETERS if (section.split("_")[0] == "cpu") == (device == "cpu"))
    for device in ("cpu", "cuda")
}

Values = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Device:
    """What a table is keyed by. capability: the CPU loops' instruction set, or "9.0" for sm_90; cores: of a CPU."""

    type: str
    name: str
    capability: str
    cores: int = 0

    def __str__(self) -> str:
        return f"{self.name}, {self.capability}" + (f", {self.cores} cores" if self.type == "cpu" else "")


@dataclass(frozen=True)
class Table:
    name: str
    device: Device | None
    parameters: Values
    found: dict[str, Any] = field(default_factory=dict)


def check_values(parameters: object, where: str) -> Values:
    """``parameters`` as sections of values. Raises ValueError that begins with ``where`` and names the key."""
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{where}: parameters: expected an object with the sections {', '.join(PARAMETERS)}")
    for section, values in parameters.items():
        if section not in PARAMETERS:
            raise ValueError(f"{where}: parameters: expected the sections {', '.join(PARAMETERS)}, got {section!r}")
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: {section}: expected an object of names and integers, got {values!r}")
        for name, value in values.items():
            if name not in PARAMETERS[section]:
                raise ValueError(f"{where}: {section}: expected {', '.join(PARAMETERS[section])}, got {name!r}")
            PARAMETERS[section][name].check(f"{where}: {section}.{name}", value)
    return {section: dict(values) for section, values in parameters.items()}


def _device(found: object, where: str) -> Device:
    wanted = {"type": str, "name": str, "capability": str, "cores": int}
    if not isinstance(found, Mapping) or not {"type", "name", "capability"} <= set(found) <= set(wanted):
        raise ValueError(f"{where}: device: expected an object with type, name, capability and, for a CPU, cores")
    for key, value in found.items():
        if not isinstance(value, wanted[key]) or isinstance(value, bool):
            raise ValueError(f"{where}: device.{key}: expected {wanted[key].__name__}, got {value!r}")
    return Device(**found)


def read_table(path: Path) -> Table:
    """Raises ValueError, one line that names the file and the key."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(document, dict) or "parameters" not in document:
        raise ValueError(f"{path}: parameters: missing")
    if unknown := sorted(document.keys() - {"device", "parameters", "found"}):
        raise ValueError(f"{path}: expected device, parameters and found, got {unknown[0]!r}")
    device = _device(document["device"], str(path)) if "device" in document else None
    return Table(path.name, device, check_values(document["parameters"], str(path)), document.get("found", {}))


def shipped(folder: Path = FOLDER) -> list[Table]:
    """The tables of the package, by name."""
    return [read_table(path) for path in sorted(folder.glob("*.json"))]


def choose(device: Device, tables: list[Table]) -> tuple[Table | None, str]:
    """(the table made for this device, why this one). Name and capability decide; of several the one whose number of
    cores is nearest."""
    key = (device.type, device.name, device.capability)
    fitting = [(t, d) for t in tables if (d := t.device) and (d.type, d.name, d.capability) == key]
    if not fitting:
        return None, f"no table for {device}"
    table, made_for = min(fitting, key=lambda found: abs(found[1].cores - device.cores))
    return table, f"made for {made_for}"


built_in: Values = {  # and those of the compiled module (``runtime``)
    section: {name: p.built_in for name, p in parameters.items() if p.built_in is not None}
    for section, parameters in PARAMETERS.items()
    if section not in COMPILED
}
by_hand: Table | None = None  # chosen by ``use``: serves every device
the_shipped = functools.cache(shipped)


def use(table: Table | None) -> None:
    """The table that serves every device from now on; None: each device's own."""
    global by_hand
    by_hand = table
    on_gpu.cache_clear()


def serving(device: Device) -> tuple[Table | None, str]:
    """(the table that serves a device, None for the built-in values; why)."""
    return (by_hand, "chosen by ASKEW_TUNING or use_tuning") if by_hand is not None else choose(device, the_shipped())


def values(section: str, device: Device) -> dict[str, int]:
    """The launch parameters of a section on a device; empty where there is no such kernel."""
    table, _ = serving(device)
    own = built_in.get(section, {})
    return own | table.parameters.get(section, {}) if table is not None and own else dict(own)


def gpu(device: torch.device | str | int) -> Device:
    """What the table of a GPU is looked up by."""
    major, minor = torch.cuda.get_device_capability(device)
    return Device("cuda", torch.cuda.get_device_name(device), f"{major}.{minor}")


@functools.cache
def on_gpu(section: str, index: int | None) -> dict[str, int]:
    """``values`` on GPU number ``index``, kept; None: Triton's interpreter, which no table is made for."""
    return values(section, Device("cpu", "", "") if index is None else gpu(index))
