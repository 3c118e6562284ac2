"""The name until 0.2 of ``askew_kernels.deploy.to_torchao``."""

from .deploy.to_torchao import to_torchao, to_torchao_

__all__ = ["to_torchao", "to_torchao_"]
