"""The export format `gguf`: one file for llama.cpp, written by llama.cpp's own converter, and a Modelfile for Ollama beside it."""

from mlx_sft.convert.targets.gguf.target import Gguf

__all__ = ["Gguf"]
