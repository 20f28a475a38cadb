"""`python -m mlx_sft`: the command line where the script `mlx-sft` is not on the path."""

from __future__ import annotations

from mlx_sft.cli import main

if __name__ == "__main__":
    main(prog_name="mlx-sft")
