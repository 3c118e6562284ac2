"""GGUF, the one file of llama.cpp and Ollama: every packed layer in the narrowest block type that holds it bit for bit.

A model with a config.json of an architecture that is known (``architectures``) gets that one's names, numbers and
tokenizer, and llama.cpp runs it; any other model keeps the names of its modules (``general.architecture`` "askew").
What the format does not say of a model stands as JSON under the key ``askew_kernels``; a reader may do without.
"""

from .container import is_gguf as is_one
from .reading import dequantized, read
from .writing import export

__all__ = ["dequantized", "export", "is_one", "read"]
