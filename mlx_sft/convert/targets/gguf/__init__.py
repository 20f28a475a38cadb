"""The export formats `gguf` and `gguf-adapter`: files for llama.cpp, by its own converters, and a Modelfile for Ollama beside them."""

from mlx_sft.convert.targets.gguf.adapter import GgufAdapter
from mlx_sft.convert.targets.gguf.target import Gguf

__all__ = ["Gguf", "GgufAdapter"]
