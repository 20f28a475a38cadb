"""What the `adapters` library computes. Run by a Python that has it, with a list of tasks in a file of JSON as its argument.

It imports nothing of this package, and runs with transformers 4.57. What it finds lies beside the file: `logits-0.npy`, ... and, for
each task, its losses on standard output.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

_INTERFACE = {
    "adapter_methods": ["bottleneck"], "model_embeddings": "embed_tokens", "model_layers": "layers", "layer_self_attn": "self_attn",
    "layer_cross_attn": None, "attn_q_proj": "q_proj", "attn_k_proj": "k_proj", "attn_v_proj": "v_proj", "attn_o_proj": "o_proj",
    "layer_intermediate_proj": "mlp.up_proj", "layer_output_proj": "mlp.down_proj", "layer_pre_self_attn": "input_layernorm",
    "layer_pre_ffn": "post_attention_layernorm",
}  # fmt: skip
"""For Gemma 1, which the library does not know by itself."""


def main() -> None:
    place = Path(sys.argv[1])
    found = [run(number, task, place.parent) for number, task in enumerate(json.loads(place.read_text()))]
    print(json.dumps(found))


def run(number: int, task: dict[str, Any], folder: Path) -> list[float]:
    """Load `adapter`, or make one of a `preset`; save the logits of `asked`; train `steps` steps on `rows`; save what came out."""
    import adapters  # which the usual tests, that take `loss_of` from here, do not have

    model = AutoModelForCausalLM.from_pretrained(task["base"], dtype=torch.float32, attn_implementation="eager")
    own = task["family"] == "gemma"
    adapters.init(model, interface=adapters.AdapterModelInterface(**_INTERFACE) if own else None)
    told: dict[str, Any] = {"missing_keys": [], "unexpected_keys": []}
    name = "own"
    if "preset" in task:
        model.add_adapter(name, config=task["preset"])
    else:
        name = model.load_adapter(task["adapter"], use_safetensors=True, loading_info=told)
    if told["missing_keys"] or told["unexpected_keys"]:
        raise ValueError(told)
    model.train_adapter(name)
    save_logits(model.eval(), task["asked"], folder / f"logits-{number}.npy")
    parameters = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    decayed = [value for name, value in parameters if not name.endswith("bias")]
    others = [value for name, value in parameters if name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=task["lr"])
    losses = []
    for _ in range(task["steps"]):
        loss = loss_of(model, task["rows"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*decayed, *others], 1.0)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    model.save_adapter(str(folder / f"trained-{number}"), name, use_safetensors=True)
    save_logits(model, task["asked"], folder / f"after-{number}.npy")
    return losses


def save_logits(model: torch.nn.Module, asked: list[int], file: Path) -> None:
    with torch.no_grad():
        np.save(file, model(torch.tensor([asked])).logits[0].numpy())


def loss_of(model: torch.nn.Module, rows: list[dict[str, Any]]) -> torch.Tensor:
    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], batch_first=True, padding_value=fill)

    ids, labels = ([row[key] for row in rows] for key in ("input_ids", "labels"))
    mask = padded([[1] * len(row) for row in ids], 0)
    return model(input_ids=padded(ids, 0), attention_mask=mask, labels=padded(labels, -100)).loss


if __name__ == "__main__":
    main()
