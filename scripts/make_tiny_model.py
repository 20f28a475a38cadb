"""Make the model that ships in the package: a Qwen3 of two million parameters, pre-trained by mlx-sft itself.

    python scripts/make_tiny_model.py                   # tokenizer, random weights, pre-training, cast: under an hour on 2 cores
    python scripts/make_tiny_model.py --only-examples   # rewrites examples/*.jsonl, byte for byte the same

It says how the tiny model came to be, in the order in which it came: a tokenizer learnt from the corpus, a checkpoint with
random weights, a full fine-tuning run of ours over plain text rows, and the exported folder in float16. Everything is seeded.
It doesn't know what the text says (``tiny_corpus.py``) nor how training works (``mlx_sft``).
"""

import argparse
import ctypes.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tiny_corpus import conversations, held_out_questions, paragraphs, preferences
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
SEED = 0

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "use_cache": True,
}
PRETRAINING: dict[str, Any] = {
    "method": "full",
    "epochs": 1,
    "lr": 3e-3,
    "batch_size": 16,
    "max_length": 128,
    "scheduler": "cosine",
    "warmup": 0.03,
    "dtype": "float32",
    "seed": SEED,
}
TRAIN_ROWS, VALID_ROWS = 28_000, 96
ROW_TOKENS = range(70, 120)
"""A row closes as soon as its paragraphs reach the lower number, and before they would pass the upper one."""
PARAGRAPH_BREAK = "\n\n"
"""A single line break stays within a subject: ChatML has one between a question and its answer."""

QWEN3_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
QWEN3_ORDINARY = frozenset(t for t in QWEN3_TOKENS if t.startswith(("<|fim", "<|repo", "<|file")) or "|" not in t)
"""Added tokens that Qwen3 doesn't mark as special: decoding keeps them even where it is asked to skip special tokens."""
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{#- ChatML, as Qwen writes it. Nothing is left out of a conversation and nothing earlier is rewritten by what comes later. -#}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'You may call these functions:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- if message.role == 'tool' %}
            {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- elif message.content %}
            {{- message.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<tool_call>\\n' + ({'name': function.name, 'arguments': function.arguments} | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# --- examples ------------------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


PROSE_ROWS = 40
"""About 1,500 tokens of what the model has read much of, and none of these very paragraphs."""


def write_examples(folder: Path) -> None:
    write_jsonl(folder / "chats.jsonl", conversations(SEED))
    write_jsonl(folder / "held_out.jsonl", held_out_questions(SEED))
    write_jsonl(folder / "prose.jsonl", [{"text": paragraph} for paragraph in islice(paragraphs(SEED + 3), PROSE_ROWS)])
    write_jsonl(folder / "preferences.jsonl", preferences(SEED))


# --- the checkpoint before training ----------------------------------------------------------------------------------------


def learn_tokenizer() -> Tokenizer:
    """A byte-level BPE with Qwen's way of splitting, learnt from prose and from the words of the conversations.

    The conversations are there so that "What" and "assistant" are one token each; the prose has no questions and no roles.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    text = [line for paragraph in islice(paragraphs(SEED), 20_000) for line in paragraph.splitlines()]
    text += [message["content"] for chat in conversations(SEED) for message in chat["messages"]]
    text += ["system", "user", "assistant", "tool"] * 1000
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"] - len(QWEN3_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t not in QWEN3_ORDINARY) for t in QWEN3_TOKENS])
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"]
    return tokenizer


def write_weights(path: Path, weights: dict[str, np.ndarray]) -> None:
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves the file readable by its owner alone


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def write_checkpoint(folder: Path, tokenizer: Tokenizer) -> None:
    """A complete Hugging Face checkpoint folder with random weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    write_json(folder / "config.json", CONFIG | special | {"dtype": "float32"})
    write_json(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False})
    write_weights(folder / "model.safetensors", random_weights())


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers' Qwen3 has them; the output head is the embedding."""
    hidden, inner, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (CONFIG["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def random_weights() -> dict[str, np.ndarray]:
    """Matrices from N(0, initializer_range), norms of one: transformers' initialisation, drawn by NumPy."""
    rng = np.random.default_rng(SEED)
    return {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.normal(0, CONFIG["initializer_range"], shape).astype(np.float32)
        for name, shape in weight_shapes().items()
    }


# --- pre-training --------------------------------------------------------------------------------------------------------


def text_rows(seed: int, tokenizer: Tokenizer) -> Iterator[dict[str, str]]:
    """Rows of a few paragraphs, of nearly equal length so that little is padded."""
    row: list[str] = []
    length = 0
    for paragraph in paragraphs(seed):
        tokens = len(tokenizer.encode(paragraph + PARAGRAPH_BREAK).ids)
        if length + tokens > ROW_TOKENS.stop:
            yield {"text": PARAGRAPH_BREAK.join(row)}
            row, length = [], 0
        row.append(paragraph)
        length += tokens
        if length >= ROW_TOKENS.start:
            yield {"text": PARAGRAPH_BREAK.join(row)}
            row, length = [], 0


def pretrain(base: Path, tokenizer: Tokenizer, work: Path) -> Path:
    """Train the random checkpoint on text rows; returns the exported float32 folder."""
    from mlx_sft import TrainConfig, export, train  # here, so that --only-examples runs without MLX

    write_jsonl(work / "train.jsonl", list(islice(text_rows(SEED + 1, tokenizer), TRAIN_ROWS)))
    write_jsonl(work / "valid.jsonl", list(islice(text_rows(SEED + 2, tokenizer), VALID_ROWS)))
    shutil.rmtree(work / "run", ignore_errors=True)
    config = TrainConfig(
        model=str(base),
        data=str(work / "train.jsonl"),
        valid=str(work / "valid.jsonl"),
        out=str(work / "run"),
        **PRETRAINING,
    )
    run = train(config)
    export(run=run.run_dir, to=work / "exported", overwrite=True)
    return work / "exported"


def ship(exported: Path, base: Path, to: Path) -> None:
    """The exported weights in float16, beside the files that training doesn't change."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(base, to)
    weights = load_file(exported / "model.safetensors")
    shapes = weight_shapes()
    if {name: tensor.shape for name, tensor in weights.items()} != shapes:
        raise SystemExit(f"error: {exported} doesn't hold the tensors of this model")
    half = {name: weights[name].astype(np.float16) for name in shapes}
    write_weights(to / "model.safetensors", half)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    write_json(to / "config.json", config | {"dtype": "float16"})


def with_fast_blas() -> None:
    """Start again with OpenBLAS loaded first, where there is one: MLX's wheel for Linux has the reference BLAS, ten times slower."""
    library = ctypes.util.find_library("openblas")
    if sys.platform == "linux" and library and "openblas" not in os.environ.get("LD_PRELOAD", ""):
        print(f"starting again with LD_PRELOAD={library}: MLX's wheel for Linux has a slow BLAS", file=sys.stderr)
        os.environ["LD_PRELOAD"] = f"{library} {os.environ.get('LD_PRELOAD', '')}".strip()
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the tiny model that ships in the package, and the example files."
    )
    parser.add_argument("--only-examples", action="store_true", help="write examples/*.jsonl and stop")
    parser.add_argument(
        "--only-base", action="store_true", help="stop before training, with random weights in WORK/base"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "tiny", help="folder for text rows and the run")
    parser.add_argument(
        "--to", type=Path, default=ROOT / "mlx_sft" / "model" / "tiny", help="folder for the finished checkpoint"
    )
    arguments = parser.parse_args()
    if not (arguments.only_examples or arguments.only_base):
        with_fast_blas()

    write_examples(ROOT / "examples")
    if arguments.only_examples:
        return
    tokenizer = learn_tokenizer()
    base = arguments.work / "base"
    write_checkpoint(base, tokenizer)
    if arguments.only_base:
        return
    ship(pretrain(base, tokenizer, arguments.work), base, arguments.to)


if __name__ == "__main__":
    main()
