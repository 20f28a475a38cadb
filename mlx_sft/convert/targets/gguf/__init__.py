"""A tokenizer's chat template → a Modelfile for Ollama, whose template writes the same text, or a refusal that says what differs.

pieces ─► modelfile ─► rendering + go_template (as Ollama reads it), compared with the chat template
"""

from mlx_sft.convert.ollama.modelfile import Modelfile, make_modelfile

__all__ = ["Modelfile", "make_modelfile"]
