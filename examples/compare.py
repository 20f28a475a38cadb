"""What `make compare-demo` shows: methods beside each other on the embedded model, as tables of Markdown like those in docs/compare.md.

    python examples/compare.py            # both tables
    python examples/compare.py ranks      # full fine-tuning beside LoRA of rank 8, 16 and 32
    python examples/compare.py methods    # every method

Each trains on the 300 chats of `examples/chats.jsonl` and is asked the 60 questions of `held_out.jsonl`, about facts that no chat mentions.
Forgetting is measured on prose like that from which the model was made.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from mlx_sft import compare_methods
from mlx_sft.compare.page import write_page
from mlx_sft.compare.table import markdown, verdict

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
COMPARED = {
    "ranks": ("full,lora:r=8,lora:r=16,lora:r=32", 2),
    "methods": ("lora,dora,pissa,olora,bottleneck,prefix,p-tuning,prompt", 4),
}
"""What is compared, and for how many epochs: vectors in front of a conversation want more steps than weights do."""


def main() -> None:
    for name in sys.argv[1:] or COMPARED:
        methods, epochs = COMPARED[name]
        folder = ROOT / "comparisons" / name
        shutil.rmtree(folder, ignore_errors=True)
        comparison = compare_methods(
            methods,
            train={
                "model": "tiny",
                "data": str(EXAMPLES / "chats.jsonl"),
                "valid_fraction": 0.1,
                "epochs": epochs,
                "batch_size": 8,
                "warmup": 0.03,
            },
            out=folder,
            test=str(EXAMPLES / "held_out.jsonl"),
            general_data=str(EXAMPLES / "prose.jsonl"),
        )
        print(markdown(comparison))
        print("\n".join(verdict(comparison)))
        print(f"\n{write_page(comparison)}\n")


if __name__ == "__main__":
    main()
