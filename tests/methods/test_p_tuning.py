"""P-tuning: the encoder is torch's, its output is PEFT's file, and a checkpoint keeps the encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PromptEncoderConfig, get_peft_model
from safetensors.numpy import load_file

from mlx_sft import evaluate_run, export, generate_text, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.errors import UserError
from mlx_sft.generate import prompt_tokens
from mlx_sft.load import load_adapter
from mlx_sft.methods.adapter_check import check_adapter
from mlx_sft.methods.p_tuning import PTuning, PTuningSettings
from mlx_sft.methods.prompt_files import PROMPT
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.training.memory import Footprint
from tests.methods.runs import ROWS, WORDS, logits_of
from tests.parity import (
    assert_close,
    loss_and_gradients,
    loss_of_rows,
    losses_of_run,
    losses_of_steps,
    told_by_peft,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),  # PEFT, of its own call in `generate`
]

LSTM = {"virtual_tokens": 5, "encoder": "lstm", "encoder_hidden_size": 16}
VECTORS = "adapter/adapter_model.safetensors"


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    return {
        "method": "p-tuning", "dtype": "float32", "batch_size": 4, "lr": 0.01, "scheduler": "constant", "warmup": 0,
        "max_steps": 10, "weight_decay": 0.1, "max_grad_norm": 1.0, "out": str(tmp_path / "run"),
    } | LSTM  # fmt: skip


@pytest.fixture(scope="module")
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen3")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with an LSTM, with a checkpoint after each second, and evaluated on the rows themselves."""
    place = tmp_path_factory.mktemp("runs")
    (place / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    config = TrainConfig(
        method="p-tuning", model=str(base), data=str(place / "rows.jsonl"), valid=str(place / "rows.jsonl"), dtype="float32",
        batch_size=2, lr=0.01, max_steps=6, save_every=2, keep=9, out=str(place / "run"), **LSTM,
    )  # fmt: skip
    return train(config).run_dir


def _as_peft(model: torch.nn.Module, settings: PTuningSettings) -> Any:
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=settings.virtual_tokens, encoder_hidden_size=settings.encoder_hidden_size,
        encoder_reparameterization_type=settings.encoder.upper(), encoder_num_layers=settings.encoder_layers,
    )  # fmt: skip
    return get_peft_model(model, config)


@pytest.mark.parametrize(
    ("family", "encoder", "layers"), [("qwen3", "lstm", 2), ("llama", "mlp", 2), ("gemma", "lstm", 1)]
)
def test_a_run_is_that_of_peft_and_opens_there(
    family: str,
    encoder: Any,
    layers: int,
    given: dict[str, Any],
    make_base: Callable[..., Path],
    torch_model: Callable,
    tmp_path: Path,
) -> None:
    base = make_base(family, tied=family == "gemma")
    settings = PTuningSettings(virtual_tokens=5, encoder=encoder, encoder_hidden_size=16, encoder_layers=layers)
    run = train(TrainConfig(**given | settings.model_dump() | {"model": str(base), "seed": 3}), data=ROWS)
    theirs = _as_peft(torch_model(base), settings)
    start = PTuning(settings).attach(load_model(str(base), "float32").model, seed=3)
    theirs.prompt_encoder["default"].load_state_dict(
        {name: torch.tensor(np.array(value)) for name, value in start.items()}
    )
    expected = losses_of_steps(theirs, lambda: loss_of_rows(theirs, ROWS), 10, lr=0.01)
    np.testing.assert_allclose(losses_of_run(run.run_dir), expected, atol=1e-4)
    assert expected[-1] < expected[0] - 0.05
    made = theirs.get_prompt_embedding_to_save("default")
    np.testing.assert_allclose(load_file(run.run_dir / VECTORS)[PROMPT], made, atol=1e-3)

    export(run.run_dir, tmp_path / "peft", format="peft")
    opened = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "peft").eval()
    loaded = load_run(run.run_dir)
    asked = prompt_tokens(loaded, WORDS)
    with torch.no_grad():
        logits = opened(input_ids=torch.tensor([asked]), attention_mask=torch.ones(1, len(asked))).logits
    assert_close(logits_of(loaded, asked), logits[0, 5:])
    assert generate_text(loaded, WORDS, max_tokens=12) == told_by_peft(opened, loaded.tokenizer, asked, 12)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_it_starts_as_torch_starts(encoder: Any, base: Path, torch_model: Callable) -> None:
    settings = PTuningSettings(virtual_tokens=300, encoder=encoder, encoder_hidden_size=48)
    ours = PTuning(settings).attach(load_model(str(base), "float32").model, seed=1)
    theirs = _as_peft(torch_model(base), settings).prompt_encoder["default"].state_dict()
    assert {name: value.shape for name, value in ours.items()} == {n: tuple(v.shape) for n, v in theirs.items()}
    for name, value in theirs.items():
        drawn, expected = np.array(ours[name]), value.numpy()
        assert drawn.std() == pytest.approx(expected.std(), rel=0.25)
        if name != "embedding.weight":
            assert abs(drawn).max() == pytest.approx(abs(expected).max(), rel=0.1)
    assert len({np.array(value).ravel()[0].item() for value in ours.values()}) == len(ours)


def test_the_cut_and_the_way_of_computing_change_nothing(base: Path) -> None:
    """Micro-batches of any size, compiled or not, recomputed or not."""
    rows = Examples.of(
        Example(f"row {n}", np.array(row["input_ids"], np.int32), np.array(row["labels"]) != -100)
        for n, row in enumerate(ROWS * 2)
    )

    def found(**options: Any) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = loss_and_gradients(
            base, PTuning(PTuningSettings(**LSTM | {"virtual_tokens": 2})), None, rows, **options
        )
        return loss.item(), {name: np.array(value) for name, value in gradients.items()}

    loss, gradients = found()
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())
    for options in ({"token_budget": 1}, {"token_budget": 1000}, {"compiled": True}, {"mode": "blocks"}):
        again = found(**options)
        assert again[0] == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(again[1][name], gradient, atol=2e-6 * np.abs(gradient).max(), err_msg=name)


def test_killed_and_resumed_it_ends_with_the_same_bytes(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    names = [VECTORS, "adapter/adapter_config.json", "checkpoints/step-00000006/parameters.safetensors"]
    assert "lstm_head.weight_hh_l1_reverse" in load_file(run / names[-1])
    for step in (4, 6):
        shutil.rmtree(copy / "checkpoints" / f"step-{step:08}")
    shutil.rmtree(copy / "adapter")
    (copy / "README.md").unlink()
    train(TrainConfig(resume=str(copy)))
    assert [(copy / name).read_bytes() for name in names] == [(run / name).read_bytes() for name in names]


def test_a_checkpoint_is_what_its_encoder_makes(run: Path, tmp_path: Path) -> None:
    """Evaluated, generated with and exported from its last checkpoint, and from the result, which has no encoder, a run is one."""
    export(run, tmp_path / "last", format="peft", step="6")
    assert (tmp_path / "last" / "adapter_model.safetensors").read_bytes() == (run / VECTORS).read_bytes()
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    in_training = [record["loss"] for record in records if record["kind"] == "evaluation"]
    rows = str(run.parent / "rows.jsonl")
    of_result, of_checkpoint = (evaluate_run(run, rows, step=step).loss for step in (None, "6"))
    assert of_result == of_checkpoint == pytest.approx(in_training[-1], rel=1e-6)
    texts = [generate_text(load_run(run, step=step), WORDS, max_tokens=6) for step in (None, "6")]
    assert texts[0] == texts[1] != generate_text(load_run(run, base=True), WORDS, max_tokens=6)


def test_a_run_from_a_file_of_peft_trains_its_vectors(
    base: Path, given: dict[str, Any], torch_model: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = _as_peft(torch_model(base), PTuningSettings(**LSTM | {"virtual_tokens": 7}))
    theirs.save_pretrained(tmp_path / "theirs")
    start = theirs.get_prompt_embedding_to_save("default").numpy()
    loaded = load_adapter(tmp_path / "theirs", str(base))
    asked = prompt_tokens(loaded, WORDS)
    assert generate_text(loaded, WORDS, max_tokens=8) == told_by_peft(theirs, loaded.tokenizer, asked, 8)
    from_theirs = given | {"model": str(base), "init_adapter": str(tmp_path / "theirs"), "max_steps": 2, "lr": 1e-9}
    with pytest.raises(UserError, match=r"--virtual-tokens 5 differs from the adapter's 7"):
        train(TrainConfig(**from_theirs), data=ROWS)
    del from_theirs["virtual_tokens"]
    with pytest.raises(UserError, match=r"--encoder lstm differs from the adapter's none"):
        train(TrainConfig(**from_theirs), data=ROWS)
    del from_theirs["encoder"], from_theirs["encoder_hidden_size"]
    run = train(TrainConfig(**from_theirs), data=ROWS).run_dir
    assert "without an encoder: the virtual tokens themselves are trained" in capfd.readouterr().err
    np.testing.assert_allclose(load_file(run / VECTORS)[PROMPT], start, atol=1e-6)
    assert TrainConfig.resolve(run / "config.yaml").encoder == "none"
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    before = (run / VECTORS).read_bytes()
    train(TrainConfig(resume=str(run)), data=ROWS)
    assert (run / VECTORS).read_bytes() == before
    again, _ = PTuning.read(run / "adapter")
    assert again.settings.encoder == "none"
    opened = peft.PeftModel.from_pretrained(torch_model(base), run / "adapter")
    np.testing.assert_allclose(opened.prompt_encoder["default"].embedding.weight.detach(), start, atol=1e-6)


def test_what_a_run_says_of_itself_and_where_it_cannot_go(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--method p-tuning changes no weight of the model") as error:
        export(run, tmp_path / "merged")
    assert "peft" in str(error.value.hint)
    card = (run / "README.md").read_text()
    assert (
        "5 virtual tokens in front of each conversation, made by a bidirectional LSTM of 2 layers of width 16" in card
    )
    assert "--out merged" not in card
    check = check_adapter(run)
    assert [name for name, problems in check.problems.items() if not problems] == ["mlx-sft", "PEFT"]
    stated = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (stated["encoder_reparameterization_type"], stated["encoder_hidden_size"]) == ("LSTM", 16)


def test_a_foreign_file_and_settings_of_another_encoder_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "other")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for changes, why in (
        ({"encoder_reparameterization_type": "GRU"}, "encoder_reparameterization_type"),
        ({"num_virtual_tokens": 6}, r"not prompt_embeddings of \[6, width\]"),
        ({"peft_type": "PROMPT_TUNING"}, "its peft_type is 'PROMPT_TUNING', and --method p-tuning reads P_TUNING"),
    ):
        (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=why):
            PTuning.read(tmp_path / "other")
    for settings, why in (
        ({"encoder_layers": 3}, "encoder_layers is of an LSTM, and the encoder is mlp"),
        ({"encoder": "none", "encoder_hidden_size": 64}, "encoder_hidden_size is of an encoder, and there is none"),
    ):
        with pytest.raises(UserError, match=why):
            TrainConfig(data="-", method="p-tuning", **settings)


def test_memory_and_disk_count_the_encoder_where_it_is(base: Path) -> None:
    split = SplitModel(load_model(str(base), "float32").model)
    method = PTuning(PTuningSettings(**LSTM))
    parameters = method.attach(split.model, 0)
    config = TrainConfig(data="-", method="p-tuning")
    footprint = Footprint.of(config, split, method, parameters, 264, head="tiles", fused=False)
    theirs = torch.nn.LSTM(64, 16, num_layers=2, bidirectional=True)
    lstm = sum(weight.numel() for weight in theirs.parameters())
    assert footprint.trainable == 5 * 64 + lstm + (32 * 32 + 32) + (32 * 64 + 64)
    assert footprint.virtual_tokens == 5
    assert not footprint.trains_head
    assert method.written_bytes(parameters) == 4 * 5 * 64


def test_it_trains_on_a_quantized_base_in_half_precision(base: Path, given: dict[str, Any]) -> None:
    changes = {"model": str(base), "quantize": "4", "dtype": "bfloat16", "encoder": "mlp"}
    run = train(TrainConfig(**given | changes), data=ROWS).run_dir
    losses = losses_of_run(run)
    assert losses[-1] < losses[0] - 0.05
    assert load_file(run / VECTORS)[PROMPT].dtype == np.float32
    assert generate_text(load_run(run), WORDS, max_tokens=4)
