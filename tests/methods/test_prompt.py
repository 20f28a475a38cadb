"""Prompt tuning: the virtual tokens are PEFT's, from the first step to the last generated token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from safetensors.numpy import load_file

from mlx_sft import evaluate_run, export, generate_text, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import PADDED, cut
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.errors import UserError
from mlx_sft.generate import prompt_tokens
from mlx_sft.load import load_adapter
from mlx_sft.methods.adapter_check import check_adapter
from mlx_sft.methods.prompt import Prompt, PromptSettings
from mlx_sft.methods.prompt_files import PROMPT
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model, load_tokenizer
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.memory import Footprint
from tests.methods.runs import ROWS, WORDS, check_refused, check_resumes, check_talk, logits_of
from tests.parity import (
    assert_close,
    loss_and_gradients,
    loss_of_rows,
    losses_of_run,
    losses_of_steps,
    told_by_peft,
)
from tests.wrappers import make_wrapper

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),  # PEFT, of its own call in `generate`
]

FAMILIES = ["qwen3", "llama", "gemma", "gemma3_text"]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    return {
        "method": "prompt", "virtual_tokens": 5, "dtype": "float32", "batch_size": 4, "lr": 0.3, "scheduler": "constant",
        "warmup": 0, "max_steps": 10, "weight_decay": 0.1, "max_grad_norm": 1.0, "out": str(tmp_path / "run"),
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_that_of_peft_and_opens_there(
    family: str, given: dict[str, Any], make_base: Callable[..., Path], torch_model: Callable, tmp_path: Path
) -> None:
    base = make_base(family, tied=family.startswith("gemma"))
    text = given | {"model": str(base), "prompt_init": f"text:{WORDS}", "virtual_tokens": 9, "seed": 3}
    run = train(TrainConfig(**text), data=ROWS)
    theirs = get_peft_model(
        torch_model(base),
        PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=9, prompt_tuning_init="TEXT", prompt_tuning_init_text=WORDS,
            tokenizer_name_or_path=str(base),
        ),
    )  # fmt: skip
    expected = losses_of_steps(theirs, lambda: loss_of_rows(theirs, ROWS), 10, lr=0.3)
    np.testing.assert_allclose(losses_of_run(run.run_dir), expected, atol=1e-4)
    assert expected[-1] < expected[0]
    export(run.run_dir, tmp_path / "peft", format="peft")
    opened = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "peft").eval()
    loaded = load_run(run.run_dir)
    asked = prompt_tokens(loaded, WORDS)
    with torch.no_grad():
        logits = opened(input_ids=torch.tensor([asked]), attention_mask=torch.ones(1, len(asked))).logits
    assert_close(logits_of(loaded, asked), logits[0, 9:])
    assert generate_text(loaded, WORDS, max_tokens=12) == told_by_peft(opened, loaded.tokenizer, asked, 12)


@pytest.fixture(scope="module")
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen3")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of a prompt of five."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(
        method="prompt",
        virtual_tokens=5,
        model=str(base),
        dtype="float32",
        batch_size=2,
        lr=0.1,
        max_steps=3,
        out=str(out),
    )
    return train(config, data=ROWS).run_dir


def test_it_starts_as_peft_starts(make_base: Callable[..., Path], torch_model: Callable) -> None:
    """Drawn tokens are rows of what `embed_tokens` gives, Gemma's scale included; a text is cut to their number."""
    folder = make_base("gemma3_text", tied=True)
    model, embed = load_model(str(folder), "float32").model, torch_model(folder).get_input_embeddings()
    every = embed(torch.arange(264)).detach().numpy()
    drawn = np.array(Prompt(PromptSettings(prompt_init="vocabulary")).attach(model, seed=1)[PROMPT])
    assert np.abs(drawn[:, None] - every[None]).max(-1).min(-1).max() < 1e-5
    assert len(np.unique(drawn, axis=0)) > 1
    method = Prompt(PromptSettings(prompt_init=f"text:{WORDS}", virtual_tokens=4))
    tokenizer = load_tokenizer(folder)
    method.read_tokenizer(tokenizer)
    np.testing.assert_allclose(method.attach(model, 0)[PROMPT], every[tokenizer(WORDS)["input_ids"][:4]], atol=1e-5)
    random = np.array(Prompt(PromptSettings(virtual_tokens=2000)).attach(model, seed=0)[PROMPT])
    assert (abs(random.mean()), random.std()) == pytest.approx((0, 1), abs=0.02)


def test_the_cut_and_the_way_of_computing_change_nothing(base: Path) -> None:
    """Micro-batches of any size, compiled or not, recomputed or not; rows of one row and of several."""
    rows = _examples()

    def found(**options: Any) -> tuple[float, np.ndarray]:
        method = Prompt(PromptSettings(virtual_tokens=3))
        loss, gradients = loss_and_gradients(base, method, None, rows, **options)
        return loss.item(), np.array(gradients[PROMPT])

    loss, gradient = found()
    for options in ({"token_budget": 1}, {"token_budget": 1000}, {"compiled": True}, {"mode": "blocks"}):
        again = found(**options)
        assert again[0] == pytest.approx(loss, rel=1e-6)
        np.testing.assert_allclose(again[1], gradient, atol=1e-6 * np.abs(gradient).max())


def _examples() -> Examples:
    return Examples.of(
        Example(
            f"row {n}", np.array(row["input_ids"], np.int32), np.array([x != -100 for x in row["labels"]], np.float32)
        )
        for n, row in enumerate(ROWS * 2)
    )


def test_killed_and_resumed_it_ends_with_the_same_bytes(base: Path, given: dict[str, Any], tmp_path: Path) -> None:
    settings = given | {"model": str(base), "save_every": 2, "keep": 9, "batch_size": 2, "max_steps": 6}
    settings |= {"prompt_init": f"text:{WORDS}"}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    run = train(TrainConfig(**settings, data=str(data))).run_dir
    files = [run / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    files.append(run / "checkpoints" / "step-00000006" / "parameters.safetensors")
    check_resumes(run, files, 4, 6)


def test_an_adapter_of_peft_goes_on_here(
    base: Path, given: dict[str, Any], torch_model: Callable, tmp_path: Path
) -> None:
    theirs = get_peft_model(torch_model(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7))
    theirs.save_pretrained(tmp_path / "theirs")
    start = theirs.prompt_encoder["default"].embedding.weight.detach().numpy()
    wrong = {"model": str(base), "init_adapter": str(tmp_path / "theirs"), "max_steps": 1, "out": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"this is an adapter of --method prompt"):
        train(TrainConfig(**wrong), data=ROWS)
    with pytest.raises(UserError, match=r"--virtual-tokens 5 differs from the adapter's 7"):
        train(TrainConfig(**given | wrong), data=ROWS)
    del given["virtual_tokens"]
    run = train(TrainConfig(**given | wrong | {"lr": 1e-9}), data=ROWS)
    np.testing.assert_allclose(
        load_file(run.run_dir / "adapter" / "adapter_model.safetensors")[PROMPT], start, atol=1e-6
    )
    assert TrainConfig.resolve(run.run_dir / "config.yaml").virtual_tokens == 7
    loaded = load_adapter(tmp_path / "theirs", str(base))
    asked = prompt_tokens(loaded, WORDS)
    assert generate_text(loaded, WORDS, max_tokens=8) == told_by_peft(theirs, loaded.tokenizer, asked, 8)


def test_it_is_evaluated_as_it_was_trained(
    base: Path, given: dict[str, Any], torch_model: Callable, tmp_path: Path
) -> None:
    """During training, by `eval`, and by PEFT."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    settings = given | {"model": str(base), "max_steps": 3, "eval_every": 1, "format": "tokenized"}
    run = train(TrainConfig(**settings, valid=str(held_out)), data=ROWS[3:]).run_dir
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    measured = [record["loss"] for record in records if record["kind"] == "evaluation"]
    theirs = peft.PeftModel.from_pretrained(torch_model(base), RunFolder(run).adapter).eval()
    with torch.no_grad():
        expected = float(loss_of_rows(theirs, ROWS[:3]))
    assert len(set(measured)) == 3
    np.testing.assert_allclose([min(measured), evaluate_run(run, str(held_out)).loss], expected, atol=1e-5)
    assert evaluate_run(run, str(held_out), base=True).loss != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_it_stands_in_front_of_the_text_of_a_model_that_sees(
    kind: str, given: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_wrapper(kind, make_base, tmp_path / "base")
    run = train(TrainConfig(**given | {"model": str(base), "max_steps": 2}), data=ROWS).run_dir
    export(run, tmp_path / "peft", format="peft")
    alone = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    opened = peft.PeftModel.from_pretrained(alone, tmp_path / "peft").eval()
    loaded, asked = load_run(run), ROWS[1]["input_ids"]
    split = SplitModel(loaded.model)
    states = loaded.method.run_body(split.body, mx.array([asked]))
    with torch.no_grad():
        logits = opened(input_ids=torch.tensor([asked]), attention_mask=torch.ones(1, len(asked))).logits
    assert_close(split.logits(states[0]), logits[0, 5:])


def test_a_talk_takes_the_prompt_off_and_puts_it_on(run: Path) -> None:
    check_talk(run)


def test_what_a_run_says_of_itself_and_where_it_cannot_go(run: Path, tmp_path: Path) -> None:
    refused = {
        "merged": "--method prompt changes no weight of the model",
        "mlx": "--method prompt changes no weight of the model",
        "gguf": "--method prompt changes no weight of the model",
        "mlx-lm": "mlx-lm has no form for what --method prompt trains",
        "gguf-adapter": "llama.cpp has no form for what --method prompt trains",
        "trl": "a run of --method prompt has no adapter that starts there",
    }
    check_refused(run, refused, "peft", tmp_path)
    card = (run / "README.md").read_text()
    assert "5 virtual tokens in front of each conversation" in card
    assert "--out merged" not in card
    check = check_adapter(run)
    assert [name for name, problems in check.problems.items() if not problems] == ["mlx-sft", "PEFT"]
    assert "prompt tuning in PEFT's files" in check.describe()
    assert "rank" not in check.describe()


def test_a_damaged_or_foreign_file_is_refused_with_what_is_wrong(
    run: Path, make_base: Callable, tmp_path: Path
) -> None:
    shutil.copytree(run / "adapter", tmp_path / "other")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for changes, why in (
        ({"num_virtual_tokens": 6}, r"not prompt_embeddings of \[6, width\]"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens"),
    ):
        (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=why):
            Prompt.read(tmp_path / "other")
    with pytest.raises(UserError, match=r"prompt_embeddings is \[5, 64\], and the model asks for \[5, 32\]"):
        load_adapter(run / "adapter", str(make_base("qwen3", hidden_size=32)))
    assert not check_adapter(run, str(make_base("qwen3", hidden_size=32))).is_taken


def test_a_model_that_needs_more_of_a_token_than_its_embedding_is_refused(base: Path) -> None:
    model = load_model(str(base), "float32").model

    class OfIds(type(model.model)):
        """Computes with the ids of all tokens before each, as Gemma 3n does with an embedding of its own for each layer."""

        def __call__(self, token_ids: mx.array, *args: Any) -> mx.array:
            return super().__call__(token_ids, *args) + token_ids.cumsum(1)[..., None]

    model.model.__class__ = OfIds
    with pytest.raises(UserError, match="more of a token than its embedding"):
        Prompt().attach(model, seed=0)


def test_virtual_tokens_count_in_memory_and_not_in_max_length(base: Path, given: dict[str, Any]) -> None:
    split = SplitModel(load_model(str(base), "float32").model)
    config = TrainConfig(data="-", method="prompt")

    def footprint(number: int) -> Footprint:
        method = Prompt(PromptSettings(virtual_tokens=number))
        parameters = method.attach(split.model, 0)
        found = Footprint.of(config, split, method, parameters, 264, head="tiles", fused=False)
        return replace(found, trainable=0, trained_bytes=0, optimizer_state_bytes=0)

    long, short = footprint(40), footprint(10)
    assert not long.trains_head
    assert long.predict("off", 20, width=10, supervised=4) == short.predict("off", 80, width=40, supervised=4)
    lengths = [10] * 12
    of_few = [len(found.rows) for found in cut(range(12), lengths, 60, replace(PADDED, in_front=10, call_cost=1000))]
    assert of_few == [3, 3, 3, 3]
    run = train(TrainConfig(**given | {"model": str(base), "max_length": 12, "max_steps": 1}), data=ROWS)
    assert json.loads((run.run_dir / "data_report.json").read_text())["totals"]["truncated"] == 0


@pytest.mark.parametrize("start", ["text:", "words", ""])
def test_an_unknown_start_is_named(start: str) -> None:
    with pytest.raises(UserError, match="write random, vocabulary, or text: with words behind it"):
        TrainConfig(data="-", method="prompt", prompt_init=start)


def test_it_trains_on_a_quantized_base_in_half_precision(base: Path, given: dict[str, Any]) -> None:
    run = train(TrainConfig(**given | {"model": str(base), "quantize": "8", "dtype": "bfloat16"}), data=ROWS).run_dir
    losses = losses_of_run(run)
    assert losses[-1] < losses[0] - 0.3
    assert load_file(run / "adapter" / "adapter_model.safetensors")[PROMPT].dtype == np.float32
    assert generate_text(load_run(run), WORDS, max_tokens=4)
