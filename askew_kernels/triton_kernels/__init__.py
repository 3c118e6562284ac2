"""The operators of ``ops`` in Triton, as ``reference`` has them; ``__all__`` of a module names those that it holds.

Imported by ``runtime`` when Triton is chosen, never by ``import askew_kernels``. Under ``TRITON_INTERPRET=1`` (set
before this import) every kernel runs on CPU tensors.
"""

from .lowbit import *  # noqa: F403
from .mix import *  # noqa: F403
from .packed import *  # noqa: F403
from .quantize import *  # noqa: F403
from .sam import *  # noqa: F403
from .scales import *  # noqa: F403
from .update import *  # noqa: F403
