"""The training run: loss, step, optimizer, memory, checkpoints and the loop. Knows nothing of the command line."""
