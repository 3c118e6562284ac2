"""Fused kernels for annealed interval-constrained training of quantized networks (ASkewSGD) in PyTorch.

import askew_kernels as ak

ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=4)))
optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9)
recipe = ak.Recipe(model, optimizer, steps)
"""

import os as _os
import signal as _signal
import sys as _sys

# python -m askew_kernels: importing torch takes seconds, in which Ctrl-C is to end it too
if _sys.argv[:1] == ["-m"] and ("-m", "askew_kernels") in zip(_sys.orig_argv, _sys.orig_argv[1:], strict=False):
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, lambda *_: _os._exit(130))  # until __main__ is there to catch it

from . import analysis, nn, ops, optim, quant, runtime, search
from .annealing import RECIPES, EpsilonAnnealing
from .deploy import hf as _hf  # noqa: F401  # transformers learns of its quantizer there
from .deploy.export import export_packed
from .deploy.files import load_packed, save_packed
from .deploy.inspect import inspect
from .distillation import distill
from .nn import dequantize_, hard_quantize_, pack_, param_groups, quantize_, unpack_
from .quant import QuantConfig
from .recipe import Recipe

__version__ = "0.2.0"

__all__ = [
    "RECIPES", "EpsilonAnnealing", "QuantConfig", "Recipe", "__version__", "analysis", "dequantize_", "distill",
    "export_packed", "hard_quantize_", "inspect", "load_packed", "nn", "ops", "optim", "pack_", "param_groups", "quant",
    "quantize_", "runtime", "save_packed", "search", "unpack_",
]  # fmt: skip
