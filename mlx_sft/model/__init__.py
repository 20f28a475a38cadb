"""Checkpoints as MLX models: loading one, and splitting it into body and head."""

import os

import mlx.core as mx

# Before any array: what is loaded is computed there, in the precision of a CPU.
if os.environ.get("MLX_SFT_DEVICE") == "cpu":
    mx.set_default_device(mx.cpu)
