"""askew_kernels"""
from . import ops, quant, reference, runtime
