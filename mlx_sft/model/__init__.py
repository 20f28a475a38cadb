"""Checkpoints as MLX models: loading one, and splitting it into body and head."""
