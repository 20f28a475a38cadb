"""What makes training fast on MLX's CPU backend, where some of MLX's own operations are slow or keep too much. GPUs need none of it."""
