"""Prefix tuning: the keys and values are PEFT's, from the first step to the last generated token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from mlx_lm.models.cache import KVCache
from peft import CartridgeConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from safetensors.numpy import load_file

from mlx_sft import export, generate_text, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import JOINED
from mlx_sft.errors import UserError
from mlx_sft.evaluate import evaluate_run
from mlx_sft.generate import prompt_tokens
from mlx_sft.load import load_adapter
from mlx_sft.methods.peft_files import CONFIG, WEIGHTS
from mlx_sft.methods.prefix import Prefix, PrefixSettings
from mlx_sft.methods.prompt_files import PROMPT
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model, load_tokenizer
from mlx_sft.training.memory import Footprint
from tests.methods.runs import ROWS, WORDS, check_resumes, check_talk, logits_of
from tests.methods.test_prompt import _examples
from tests.parity import assert_close, loss_and_gradients, loss_of_rows, losses_of_run, losses_of_steps

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),  # PEFT, of its own calls
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

FAMILIES = ["qwen3", "llama", "gemma", "gemma3_text"]
N = 5


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    return {
        "method": "prefix", "dtype": "float32", "batch_size": 4, "lr": 0.1, "scheduler": "constant",
        "warmup": 0, "max_steps": 10, "weight_decay": 0.1, "max_grad_norm": 1.0, "out": str(tmp_path / "run"),
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_that_of_peft_and_opens_there(
    family: str, given: dict[str, Any], make_base: Callable[..., Path], torch_model: Callable, tmp_path: Path
) -> None:
    """It goes on from a prefix that PEFT wrote, and PEFT opens what it comes to."""
    window = {"sliding_window": 32} if family == "gemma3_text" else {}
    base = make_base(family, tied=family.startswith("gemma"), **window)
    torch.manual_seed(1)
    theirs = get_peft_model(torch_model(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N))
    theirs.save_pretrained(tmp_path / "theirs")
    run = train(TrainConfig(**given | {"model": str(base), "init_adapter": str(tmp_path / "theirs")}), data=ROWS)
    expected = losses_of_steps(theirs, lambda: loss_of_rows(theirs, ROWS), 10, lr=0.1)
    np.testing.assert_allclose(losses_of_run(run.run_dir), expected, atol=1e-4)
    assert expected[-1] < expected[0] - 0.1
    export(run.run_dir, tmp_path / "peft", format="peft")
    opened = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "peft").eval()
    loaded = load_run(run.run_dir)
    asked = prompt_tokens(loaded, WORDS)
    with torch.no_grad():
        logits = opened(input_ids=torch.tensor([asked]), attention_mask=torch.ones(1, len(asked))).logits
    assert_close(logits_of(loaded, asked), logits[0])
    assert generate_text(loaded, WORDS, max_tokens=12) == _told_by(opened, loaded.tokenizer, asked, 12)


def _told_by(model: torch.nn.Module, tokenizer: Any, asked: list[int], most: int) -> str:
    """What transformers generates greedily with PEFT's prefix as its cache, as the model card does: PEFT's own `generate` leaves it out."""
    pad = torch.nn.functional.pad
    prompt = {"input_ids": torch.tensor([asked]), "attention_mask": torch.ones(1, len(asked), dtype=torch.long)}
    prompt = {
        name: pad(value, (model.active_peft_config.num_virtual_tokens, 0), value=1) for name, value in prompt.items()
    }
    told = model.get_base_model().generate(
        **prompt, max_new_tokens=most, do_sample=False, eos_token_id=[257], past_key_values=model.get_prompt(1)
    )
    return tokenizer.decode(told[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen3")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of a prefix of five."""
    config = TrainConfig(
        method="prefix", virtual_tokens=N, model=str(base), dtype="float32", batch_size=2, lr=0.1, max_steps=3,
        out=str(tmp_path_factory.mktemp("runs") / "run"),
    )  # fmt: skip
    return train(config, data=ROWS).run_dir


def test_the_cut_and_the_way_of_computing_change_nothing(base: Path) -> None:
    """Micro-batches of any size, compiled or not, recomputed in any way or not, and of rows that lie end to end."""
    rows = _examples()

    def found(**options: Any) -> tuple[float, np.ndarray]:
        method = Prefix(PrefixSettings(virtual_tokens=3))
        loss, gradients = loss_and_gradients(base, method, None, rows, **options)
        return loss.item(), np.array(gradients[PROMPT])

    loss, gradient = found()
    assert (np.abs(gradient).max(axis=(0, 2, 3)) > 0).all()  # keys and values of every layer
    for options in (
        {"token_budget": 1}, {"token_budget": 1000}, {"compiled": True}, {"mode": "light"}, {"mode": "layers"}, {"mode": "blocks"},
        {"mode": "light", "compiled": True}, {"layout": JOINED}, {"layout": JOINED, "mode": "blocks"},
    ):  # fmt: skip
        again = found(**options)
        assert again[0] == pytest.approx(loss, rel=1e-6), options
        np.testing.assert_allclose(again[1], gradient, atol=1e-6 * np.abs(gradient).max(), err_msg=str(options))


def test_a_cartridge_is_that_of_peft(base: Path, given: dict[str, Any], torch_model: Callable, tmp_path: Path) -> None:
    """It starts as the cache of a document, whose first entry stays as it is, with a decay of weights too; and it is resumed without it."""
    document = tmp_path / "document.txt"
    document.write_text("the cat sat on the mat, and the dog on the log")
    cartridge = {"prefix_init": f"cartridge:{document}", "virtual_tokens": N, "save_every": 5, "keep": 9}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    run = train(TrainConfig(**given | cartridge | {"model": str(base), "data": str(data)})).run_dir
    theirs = get_peft_model(torch_model(base), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=N))
    text = document.read_text()
    tokenizer = load_tokenizer(base)
    start = initialize_kv_prefix_from_text(theirs, tokenizer, text=text, use_chat_template=False).numpy()
    expected = losses_of_steps(theirs, lambda: loss_of_rows(theirs, ROWS), 10, lr=0.1)
    np.testing.assert_allclose(losses_of_run(run), expected, atol=1e-4)
    found = load_file(run / "adapter" / WEIGHTS)[PROMPT]
    np.testing.assert_allclose(found[0], start[0], atol=1e-5)
    assert np.abs(found[1:] - start[1:]).max() > 0.1
    opened = peft.PeftModel.from_pretrained(torch_model(base), run / "adapter").eval()
    assert_close(found, opened.get_prompt_embedding_to_save("default"), tolerance=0)
    loaded = load_adapter(run / "adapter")
    asked = prompt_tokens(loaded, WORDS)
    assert generate_text(loaded, WORDS, max_tokens=8) == _told_by(opened, loaded.tokenizer, asked, 8)

    files = [run / "adapter" / name for name in (WEIGHTS, CONFIG)]
    files.append(run / "checkpoints" / "step-00000010" / "parameters.safetensors")
    document.unlink()
    check_resumes(run, files, 10)
    again = given | {"model": str(base), "init_adapter": str(run / "adapter"), "out": str(tmp_path / "again")}
    on = train(TrainConfig(**again | {"lr": 1e-9}), data=ROWS).run_dir
    np.testing.assert_allclose(load_file(on / "adapter" / WEIGHTS)[PROMPT], found, atol=1e-6)


@pytest.mark.parametrize(("family", "hidden"), [("qwen3", 24), ("gemma", None)])
def test_a_projection_is_that_of_peft(
    family: str,
    hidden: int | None,
    given: dict[str, Any],
    make_base: Callable[..., Path],
    torch_model: Callable,
    tmp_path: Path,
) -> None:
    """It is trained as PEFT's encoder, which a checkpoint keeps; PEFT opens what it makes, and a run goes on from it."""
    base = make_base(family, tied=family == "gemma")
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    asked_for = {"virtual_tokens": N, "prefix_projection": True, "prefix_hidden": hidden, "lr": 0.01, "seed": 3}
    kept = {"save_every": 5, "keep": 9, "data": str(tmp_path / "rows.jsonl"), "model": str(base)}
    run = train(TrainConfig(**given | asked_for | kept)).run_dir
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=hidden
    )
    theirs = get_peft_model(torch_model(base), config)
    settings = PrefixSettings(virtual_tokens=N, prefix_projection=True, prefix_hidden=hidden)
    start = Prefix(settings).attach(load_model(str(base), "float32").model, seed=3)
    encoder = theirs.prompt_encoder["default"]
    encoder.load_state_dict(
        {name: torch.tensor(np.array(value)).reshape(encoder.state_dict()[name].shape) for name, value in start.items()}
    )
    expected = losses_of_steps(theirs, lambda: loss_of_rows(theirs, ROWS), 10, lr=0.01)
    np.testing.assert_allclose(losses_of_run(run), expected, atol=1e-4)
    assert expected[-1] < expected[0] - 0.05
    found = load_file(run / "adapter" / WEIGHTS)[PROMPT]
    np.testing.assert_allclose(found, theirs.get_prompt_embedding_to_save("default"), atol=1e-3)
    opened = peft.PeftModel.from_pretrained(torch_model(base), run / "adapter").eval()
    loaded = load_run(run)
    asked = prompt_tokens(loaded, WORDS)
    with torch.no_grad():
        logits = opened(input_ids=torch.tensor([asked]), attention_mask=torch.ones(1, len(asked))).logits
    assert_close(logits_of(loaded, asked), logits[0])
    assert generate_text(loaded, WORDS, max_tokens=12) == _told_by(opened, loaded.tokenizer, asked, 12)

    export(run, tmp_path / "last", format="peft", step="10")
    assert (tmp_path / "last" / WEIGHTS).read_bytes() == (run / "adapter" / WEIGHTS).read_bytes()
    assert "made by a projection" in (run / "README.md").read_text()
    files = [run / "adapter" / WEIGHTS, run / "checkpoints" / "step-00000010" / "parameters.safetensors"]
    check_resumes(run, files, 10)
    on = given | {"model": str(base), "init_adapter": str(run / "adapter"), "out": str(tmp_path / "on")}
    with pytest.raises(UserError, match=r"--prefix-projection True differs from the adapter's False"):
        train(TrainConfig(**on | {"prefix_projection": True}), data=ROWS)
    again = train(TrainConfig(**on | {"lr": 1e-9, "max_steps": 1}), data=ROWS).run_dir
    np.testing.assert_allclose(load_file(again / "adapter" / WEIGHTS)[PROMPT], found, atol=1e-6)


def test_a_projection_starts_as_torch_starts_it_and_is_cut_in_any_way(base: Path, torch_model: Callable) -> None:
    settings = PrefixSettings(virtual_tokens=300, prefix_projection=True, prefix_hidden=48)
    ours = Prefix(settings).attach(load_model(str(base), "float32").model, 0)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=300, prefix_projection=True, encoder_hidden_size=48
    )
    theirs = get_peft_model(torch_model(base), config).prompt_encoder["default"].state_dict()
    assert {name: value.size for name, value in ours.items()} == {name: v.numel() for name, v in theirs.items()}
    for name, value in theirs.items():
        drawn, expected = np.array(ours[name]), value.numpy()
        assert drawn.std() == pytest.approx(expected.std(), rel=0.25)
        if name != "embedding.weight":
            assert abs(drawn).max() == pytest.approx(abs(expected).max(), rel=0.1)

    def gradients(**options: Any) -> dict[str, np.ndarray]:
        method = Prefix(PrefixSettings(virtual_tokens=3, prefix_projection=True))
        _, found = loss_and_gradients(base, method, None, _examples(), **options)
        return {name: np.array(value) for name, value in found.items()}

    expected = gradients()
    for options in ({"token_budget": 1}, {"compiled": True}, {"mode": "blocks"}, {"layout": JOINED}):
        for name, gradient in gradients(**options).items():
            tolerance = 2e-6 * np.abs(expected[name]).max()
            np.testing.assert_allclose(gradient, expected[name], atol=tolerance, err_msg=f"{name} {options}")


def test_a_start_that_cannot_be_is_named(base: Path, given: dict[str, Any], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a cat")
    for settings, why in (
        ({"prefix_init": "zero"}, r"write random, or cartridge: with a file's name behind it"),
        ({"prefix_init": "cartridge:"}, r"a file's name behind it"),
        ({"prefix_init": "cartridge"}, r"a cartridge starts from a document"),
        ({"prefix_init": "cartridge:x", "virtual_tokens": 1}, r"a cartridge has 2 or more"),
        (
            {"prefix_init": "cartridge:x", "prefix_projection": True},
            r"a projection starts at random, and a cartridge from a document",
        ),
        ({"prefix_hidden": 8}, r"prefix_hidden: is of the projection; give prefix_projection too"),
        ({"prefix_init": f"cartridge:{tmp_path}/none"}, r"cannot be read"),
        ({"prefix_init": f"cartridge:{short}"}, r"this document has \d+ tokens, and the prefix 20 entries"),
    ):
        with pytest.raises(UserError, match=why):
            train(TrainConfig(**given | settings | {"model": str(base)}), data=ROWS)


def test_it_starts_at_random_as_peft_starts(base: Path) -> None:
    start = np.array(
        Prefix(PrefixSettings(virtual_tokens=200)).attach(load_model(str(base), "float32").model, 0)[PROMPT]
    )
    assert start.shape == (200, 4, 2, 16)
    assert (abs(start.mean()), start.std()) == pytest.approx((0, 1), abs=0.02)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("lfm2", "layer 0 keeps no keys and values of all positions"),
        ("qwen3_5_text", "linear attention"),
        ("gemma3_text", "a sliding window of this model has no more than 8"),
    ],
)
def test_a_model_without_a_place_for_it_is_refused(
    family: str, why: str, given: dict[str, Any], make_base: Callable[..., Path]
) -> None:
    base = make_base(family, tied=family.startswith("gemma"))
    with pytest.raises(UserError, match=why):
        train(TrainConfig(**given | {"model": str(base), "virtual_tokens": N}), data=ROWS)


def test_a_model_that_shares_or_misplaces_keys_is_refused(base: Path) -> None:
    model = load_model(str(base), "float32").model

    class Sharing(type(model)):
        """Has a cache for its first layer alone."""

        def make_cache(self) -> list[Any]:
            return [KVCache()]

    model.__class__ = Sharing
    with pytest.raises(UserError, match="of its 2 layers only 1 have keys and values of their own"):
        Prefix().attach(model, 0)
    model = load_model(str(base), "float32").model
    attention = type(model.model.layers[0].self_attn)

    class WithoutPositions(attention):
        """Rotates each key as if nothing were in front of it."""

        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            if cache is not None:
                cache.offset = 0
            return super().__call__(x, mask, cache)

    model.model.layers[1].self_attn.__class__ = WithoutPositions
    with pytest.raises(UserError, match="as another one"):
        Prefix().attach(model, 0)


def test_a_talk_takes_the_prefix_off_and_puts_it_on(run: Path) -> None:
    check_talk(run)


def test_what_a_run_says_of_itself_and_where_it_cannot_go(run: Path, tmp_path: Path) -> None:
    for form in ("merged", "mlx", "gguf", "mlx-lm", "gguf-adapter", "trl"):
        with pytest.raises(
            UserError, match=r"--method prefix (changes no weight|trains)|no adapter that starts"
        ) as error:
            export(run, tmp_path / form, format=form)
        assert "peft" in str(error.value.hint)
    card = (run / "README.md").read_text()
    assert "5 keys and values in front of each conversation" in card
    assert "--out merged" not in card
    assert json.loads(evaluate_run(run, _file(tmp_path)).describe(as_json=True))["loss"] == pytest.approx(
        _loss_of(run), rel=1e-5
    )


def _file(folder: Path) -> str:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return str(folder / "rows.jsonl")


def _loss_of(run: Path) -> float:
    """Of the rows, one at a time, by a cache that holds the prefix."""
    loaded = load_run(run)
    losses = []
    for row in ROWS:
        logits = loaded.model(mx.array([row["input_ids"]]), cache=loaded.method.generation_cache(loaded.model))
        picked = mx.take_along_axis(mx.log(mx.softmax(logits[0, :-1], -1)), mx.array(row["input_ids"])[1:, None], -1)
        losses += [-float(picked[i - 1, 0].item()) for i, label in enumerate(row["labels"]) if label != -100]
    return float(np.mean(losses))


def test_a_damaged_or_foreign_file_is_refused_with_what_is_wrong(
    run: Path, make_base: Callable, tmp_path: Path
) -> None:
    shutil.copytree(run / "adapter", tmp_path / "other")
    config = json.loads((run / "adapter" / CONFIG).read_text())
    for changes, why in (
        ({"num_virtual_tokens": 6}, r"not prompt_embeddings of \[6, width\]"),
        ({"num_layers": 3}, r"a prefix of 128 numbers is not that of 3 layers, 2 heads and 32"),
        ({"num_attention_heads": 3}, r"not that of 2 layers, 3 heads"),
        ({"token_dim": None}, "token_dim"),
        ({"peft_type": "CARTRIDGE", "num_frozen_tokens": 2}, "num_frozen_tokens"),
    ):
        (tmp_path / "other" / CONFIG).write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=why):
            Prefix.read(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"prompt_embeddings is \[5, 4, 2, 16\], and the model asks for \[5, 4, 1, 16\]"
    ):
        load_adapter(run / "adapter", str(make_base("qwen3", num_key_value_heads=1)))


def test_its_keys_count_in_memory_and_not_in_max_length(base: Path, given: dict[str, Any]) -> None:
    split = SplitModel(load_model(str(base), "float32").model)

    def peak(number: int, mode: Any, rows: int = 1, **settings: Any) -> int:
        method = Prefix(PrefixSettings(virtual_tokens=number, **settings))
        config, parameters = TrainConfig(data="-", method="prefix"), method.attach(split.model, 0)
        found = Footprint.of(config, split, method, parameters, 264, head="tiles", fused=False)
        assert not found.trains_head
        return found.predict(mode, 10 * rows, width=10).kept

    copies = (
        400 * split.body.layers[0].self_attn.n_kv_heads * 16 * 2 * 2 * 4
    )  # of 400 entries in each of two layers, in float32
    for settings in ({}, {"prefix_projection": True}):
        assert peak(401, "off", 8, **settings) - peak(1, "off", 8, **settings) >= 8 * copies
    assert peak(401, "off", 8, prefix_projection=True) - peak(401, "off", 8) == pytest.approx(2 * copies, rel=0.1)
    run = train(TrainConfig(**given | {"model": str(base), "max_length": 12, "max_steps": 1}), data=ROWS)
    assert json.loads((run.run_dir / "data_report.json").read_text())["totals"]["truncated"] == 0


def test_it_trains_on_a_quantized_base_in_half_precision(base: Path, given: dict[str, Any]) -> None:
    run = train(TrainConfig(**given | {"model": str(base), "quantize": "4", "dtype": "bfloat16"}), data=ROWS).run_dir
    losses = losses_of_run(run)
    assert losses[-1] < losses[0] - 0.3
    assert load_file(run / "adapter" / WEIGHTS)[PROMPT].dtype == np.float32
    assert generate_text(load_run(run), WORDS, max_tokens=4)
