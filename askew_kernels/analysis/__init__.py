"""Why a training run converges or does not: curvature, certificates of decrease, reports (docs/analysis.md).

``smoothness`` and ``hessian_trace`` need SciPy or a few Hessian–vector products and look at the loss itself;
``Certificate`` and ``Secant`` follow a training run; ``report`` makes a page of a log (``ASkewSGD(telemetry_log=…)``).
"""

from .certificate import Certificate, CertificateWarning, Secant, feasibility_limit
from .hessian import Smoothness, hessian_eigenvalues, hessian_trace, loss_slice, smoothness
from .report import read_log, report

__all__ = [
    "Certificate", "CertificateWarning", "Secant", "Smoothness", "feasibility_limit", "hessian_eigenvalues",
    "hessian_trace", "loss_slice", "read_log", "report", "smoothness",
]  # fmt: skip
