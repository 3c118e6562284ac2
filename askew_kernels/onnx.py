"""The name until 0.2 of ``askew_kernels.deploy.to_onnx``."""

from .deploy.to_onnx import export_onnx

__all__ = ["export_onnx"]
