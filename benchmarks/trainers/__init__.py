"""The trainers, a module each: `unavailable()` says why one cannot run here, and `run(task, began)` trains in this process.

Importing one is cheap: what it needs is imported by `run`. Each makes its own batches and its own loss: that is what is compared.
"""

from benchmarks.trainers import mlx_lm, ours, trl, unsloth

TRAINERS = {"ours": ours, "mlx-lm": mlx_lm, "trl": trl, "unsloth": unsloth}
