"""Tokenized rows, kept on disk and mapped into memory: what a source's rows become once, and are read from ever after.

workers ─► packing ─► cache (key) ─► tokenized ─► examples
"""

from mlx_sft.data.store.examples import Examples, check_vocabulary

__all__ = ["Examples", "check_vocabulary"]
