"""`--add-tokens` and `--train-new-tokens`: rows of new tokens are PEFT's `trainable_token_indices`, in training and in every export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from mlx_lm.utils import load_model as load_in_mlx_lm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlx_sft import TrainConfig, UserError, evaluate_run, export, load_run, train
from mlx_sft.convert.model_card import Published, model_card, read_run_summary
from mlx_sft.data.new_tokens import NewTokens
from mlx_sft.data.prepare import prepare
from mlx_sft.generate import prompt_tokens
from mlx_sft.inspection import inspect
from mlx_sft.load import load_adapter, put_adapter
from mlx_sft.methods.compose import merge_adapters
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.peft_files import read_adapter
from mlx_sft.model.load import load_model, load_tokenizer
from mlx_sft.run_folder import RunFolder
from tests.parity import assert_close, loss_and_gradients, losses_of_steps
from tests.wrappers import make_wrapper

pytestmark = [
    # PEFT asks a transformers model in a way that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True. as the embedding layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:ensure_weight_tying=True but the model:UserWarning"),
]

VOCABULARY = 264
EMBEDDINGS = "model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = "lm_head.token_adapter.trainable_tokens_delta"
IDS = [3, 260, 17]
BOTH = {"embed_tokens": IDS, "lm_head": IDS}

CASES = [
    (True, BOTH, {EMBEDDINGS}),
    (True, {"embed_tokens": IDS}, {EMBEDDINGS}),
    (False, {"embed_tokens": IDS, "lm_head": [5, 3]}, {EMBEDDINGS, HEAD}),
    (False, {"embed_tokens": IDS}, {EMBEDDINGS}),
    (False, {"lm_head": IDS}, {HEAD}),
]
"""Whether the model is tied, the tokens of which rows are trained, and the parameters that this makes."""


def _settings(rows: Any, **changes: Any) -> LoraSettings:
    return LoraSettings(rank=4, alpha=8.0, train_new_tokens=rows, **changes)


def _write_start(folder: Path, base: Path, settings: LoraSettings, rows: int = VOCABULARY) -> dict[str, mx.array]:
    """An adapter in which nothing is as the base has it."""
    new = NewTokens(tuple(range(VOCABULARY, rows)), (), VOCABULARY, rows)
    method = Lora(settings)
    start = method.attach(load_model(str(base), "float32", new_tokens=new).model, seed=1)
    random = np.random.default_rng(2)
    drawn = {
        name: value + mx.array(random.normal(0, 0.1, value.shape).astype(np.float32)) for name, value in start.items()
    }
    method.write(folder, drawn, str(base))
    return drawn


def _in_torch(folder: Path, rows: int | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if rows is not None:
        model.resize_token_embeddings(rows)
    return model.eval()


def _peft_names(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """PEFT's trainable parameters by our names."""
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    names = (name.removeprefix("base_model.model.").replace(".default.weight", "") for name in found)
    return dict(zip((name.removesuffix(".default") for name in names), found.values(), strict=True))


@pytest.fixture
def with_tokens(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run whose rows have two new tokens in them."""
    tokens, data = tmp_path / "tokens.json", tmp_path / "chats.jsonl"
    tokens.write_text(json.dumps(["<call>", {"content": "<|done|>", "normalized": False}]))
    rows = Path(settings["data"]).read_text().replace(" the ", " <call> ").replace(" and ", " <|done|> ")
    data.write_text(rows)
    return settings | {"data": str(data), "add_tokens": str(tokens), "train_new_tokens": True, "dtype": "float32"}


# Training


@pytest.mark.parametrize(("tied", "rows", "names"), CASES)
def test_loss_and_every_gradient_are_pefts(
    tied: bool,
    rows: Any,
    names: set[str],
    make_base: Callable[..., Path],
    tmp_path: Path,
    examples: Any,
    torch_loss: Callable,
) -> None:
    base = make_base("qwen3", tied=tied)
    parameters = _write_start(tmp_path, base, _settings(rows))
    assert names == {name for name in parameters if ".lora_" not in name}
    adapted = peft.PeftModel.from_pretrained(_in_torch(base), tmp_path, is_trainable=True)
    expected = torch_loss(adapted, examples)
    expected.backward()
    method = Lora(_settings(rows))
    loss, gradients = loss_and_gradients(
        base, method, parameters, examples, mode="blocks" if tied else "off", compiled=len(rows) > 1
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = _peft_names(adapted)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, theirs[name].grad)


@pytest.mark.parametrize("family", ["gemma3_text", "falcon_h1"])
def test_they_are_where_embeddings_or_logits_are_scaled(
    family: str, make_base: Callable[..., Path], tmp_path: Path, examples: Any, torch_loss: Callable
) -> None:
    base = make_base(family, tied=True)
    settings = _settings(BOTH, target="attention")
    parameters = _write_start(tmp_path, base, settings)
    adapted = peft.PeftModel.from_pretrained(_in_torch(base), tmp_path, is_trainable=True)
    expected = torch_loss(adapted, examples)
    expected.backward()
    loss, gradients = loss_and_gradients(base, Lora(settings), parameters, examples)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients[EMBEDDINGS], _peft_names(adapted)[EMBEDDINGS].grad, 5e-5)


def test_a_run_with_new_tokens_follows_pefts_trajectory(
    with_tokens: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, torch_loss: Callable
) -> None:
    base, start = make_base("qwen3"), tmp_path / "start"
    _write_start(start, base, _settings({"embed_tokens": [264, 265], "lm_head": [264, 265]}), 266)
    given = {name: value for name, value in with_tokens.items() if name not in ("rank", "epochs")}
    config = TrainConfig(**given | {
        "model": str(base), "init_adapter": str(start), "batch_size": 10, "max_steps": 6, "shuffle": False, "lr": 2e-3,
        "scheduler": "constant", "warmup": 0, "weight_decay": 0.1, "micro_batch_tokens": 150,
    })  # fmt: skip
    run = train(config).run_dir
    records = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]

    model = peft.PeftModel.from_pretrained(_in_torch(base, 266), start, is_trainable=True)
    examples = prepare(config, load_tokenizer(base, None, with_tokens["add_tokens"])).train
    assert {264, 265} <= {int(token) for example in examples for token in example.token_ids}
    losses = losses_of_steps(model, lambda: torch_loss(model, examples), 6, lr=2e-3)
    np.testing.assert_allclose([r["loss"] for r in records if r["kind"] == "train"], losses, rtol=1e-5)
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_as_those_of_transformers(tied: bool, make_base: Callable[..., Path]) -> None:
    base = make_base("qwen3", tied=tied)
    model = load_model(str(base), "float32", new_tokens=NewTokens((264, 270), (), 264, 271)).model
    theirs = _in_torch(base, 271)
    ours = [model.model.embed_tokens.weight, *([] if tied else [model.lm_head.weight])]
    for weight, expected in zip(ours, (theirs.get_input_embeddings(), theirs.get_output_embeddings()), strict=False):
        # It draws them with a variance of 1e-9 of the old rows' around their mean.
        np.testing.assert_allclose(np.array(weight), expected.weight.detach().numpy(), rtol=0, atol=5e-5)


def test_what_is_trained_is_no_more_than_these_rows(with_tokens: dict[str, Any], cli: Callable[..., Any]) -> None:
    options = ["--data", with_tokens["data"], "--model", with_tokens["model"], "--machine", "M2 16GB", "--json"]
    new = ["--add-tokens", with_tokens["add_tokens"], "--train-new-tokens"]
    trained = [json.loads(cli("plan", *options, *more).stdout)["trainable"] for more in ([], new)]
    assert trained[1] - trained[0] == 2 * 64


# What cannot be


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_new_tokens": False}, "nothing would train the embeddings"),
        ({"train_new_tokens": False, "also_train": "norm"}, "nothing would train the embeddings"),
        ({"add_tokens": None}, "there are no new tokens"),
        ({"add_tokens": ["<|im_end|>"]}, "there are no new tokens"),
        ({"also_train": "embed_tokens,lm_head"}, "trained in full, and its rows besides"),
        ({"train_new_tokens": {"embed_tokens": [999]}}, "there is no row for the token 999"),
        ({"train_new_tokens": {"embed_tokens": [3], "lm_head": [4]}}, "has one weight for embed_tokens and lm_head"),
        ({"train_new_tokens": {"q_proj": [3]}}, "rows are those of embed_tokens and lm_head"),
        ({"train_new_tokens": {"embed_tokens": [3, 3]}}, "or one twice"),
    ],
)
def test_what_would_train_nothing_is_refused(changes: Any, told: str, with_tokens: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        train(TrainConfig(**with_tokens | changes))
    assert told in str(refused.value)
    assert refused.value.hint
    assert not Path(with_tokens["out"]).exists()


@pytest.mark.parametrize("form", ["mlx-lm", "trl"])
def test_a_form_that_cannot_carry_them_refuses(form: str, with_tokens: dict[str, Any], tmp_path: Path) -> None:
    run = train(TrainConfig(**with_tokens | {"max_steps": 1})).run_dir
    with pytest.raises(UserError, match=r"new tokens") as refused:
        export(run, tmp_path / "out", format=form)
    assert "merged" in refused.value.hint
    with pytest.raises(UserError, match=r"cannot be added up"):
        merge_adapters([str(RunFolder(run).adapter)] * 2, tmp_path / "sum")


def test_a_model_with_embeddings_in_each_layer_does_not_grow(
    with_tokens: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_wrapper("gemma4", make_base, tmp_path / "base")
    with pytest.raises(UserError, match=r"embeddings of its own, which would not grow"):
        train(TrainConfig(**with_tokens | {"model": str(base)}))


def test_a_head_whose_bias_peft_would_lose_goes_out_merged(
    with_tokens: dict[str, Any],
    make_base: Callable[..., Path],
    tmp_path: Path,
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    base = make_base("phi", num_key_value_heads=4)
    run = train(TrainConfig(**with_tokens | {"model": str(base), "max_steps": 1})).run_dir
    with pytest.raises(UserError, match=r"leaves out the bias of the head"):
        export(run, tmp_path / "peft", format="peft")
    merged, token_ids = export(run, tmp_path / "merged").path, [[5, 264, 3, 265, 8]]
    assert_close(mlx_logits(load_run(run).model, token_ids), torch.tensor(torch_logits(_in_torch(merged), token_ids)))


# In and out


@pytest.mark.parametrize("tied", [True, False])
def test_peft_and_transformers_open_what_a_run_leaves(
    tied: bool,
    with_tokens: dict[str, Any],
    make_base: Callable[..., Path],
    tmp_path: Path,
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    base = make_base("qwen3", tied=tied)
    run = train(TrainConfig(**with_tokens | {"model": str(base)})).run_dir
    Path(with_tokens["add_tokens"]).unlink()  # a run has them in itself
    token_ids = [[5, 264, 3, 265, 8]]
    loaded = load_run(run)
    ours = mlx_logits(loaded.model, token_ids)
    assert ours.shape[-1] == 266

    merged, adapter = (export(run, tmp_path / form, format=form) for form in ("merged", "peft"))
    expected = [f"before PEFT opens it, the base needs its rows: base.resize_token_embeddings({266})"]
    assert list(adapter.notes) == expected
    assert json.loads((merged.path / "config.json").read_text())["vocab_size"] == 266
    theirs = _in_torch(merged.path)
    adapted = peft.PeftModel.from_pretrained(_in_torch(base, 266), adapter.path).eval()
    opened, _ = load_in_mlx_lm(merged.path)
    for found in (torch_logits(theirs, token_ids), torch_logits(adapted, token_ids), mlx_logits(opened, token_ids)):
        assert_close(ours, torch.tensor(found))
    text = "the <call> sat<|done|>"
    for folder in (merged.path, adapter.path):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
        assert tokenizer.chat_template == loaded.tokenizer.chat_template
    for folder in (adapter.path, run / "adapter"):  # beside the second there is no tokenizer
        again = load_adapter(folder, str(base), "float32")
        assert_close(mlx_logits(again.model, token_ids), torch.tensor(ours))
        assert again.tokenizer(text).input_ids == loaded.tokenizer(text).input_ids

    stated = json.loads((adapter.path / "adapter_config.json").read_text())["trainable_token_indices"]
    assert stated == ([264, 265] if tied else {"embed_tokens": [264, 265], "lm_head": [264, 265]})
    tensors = load_file(adapter.path / "adapter_model.safetensors")
    rows = {name.removeprefix("base_model.model.") for name in tensors if "lora" not in name}
    assert rows == ({EMBEDDINGS} if tied else {EMBEDDINGS, HEAD})
    card = model_card(read_run_summary(RunFolder(run)), Published("me/it", merged=False))
    assert "base.resize_token_embeddings(266)  # for the new tokens" in card
    assert "| New tokens | `<call>`, " in card
    assert 'tokenizer = AutoTokenizer.from_pretrained("me/it")' in card


def test_a_language_model_inside_of_one_that_sees_has_them_too(
    with_tokens: dict[str, Any],
    make_base: Callable[..., Path],
    tmp_path: Path,
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    base, token_ids = make_wrapper("gemma3", make_base, tmp_path / "base"), [[5, 264, 3, 265, 8]]
    run = train(TrainConfig(**with_tokens | {"model": str(base), "max_steps": 2})).run_dir
    merged, adapter = (export(run, tmp_path / form, format=form).path for form in ("merged", "peft"))
    adapted = peft.PeftModel.from_pretrained(_in_torch(base, 266), adapter).eval()
    ours = mlx_logits(load_run(run).model, token_ids)
    for model in (_in_torch(merged), adapted):
        assert_close(ours, torch.tensor(torch_logits(model, token_ids)), 2e-5)


@pytest.mark.parametrize(
    ("tied", "form", "grown"), [(True, list, True), (True, dict, True), (False, dict, True), (False, list, False)]
)
def test_an_adapter_made_by_peft_gives_pefts_logits_and_goes_on(
    tied: bool,
    form: type,
    grown: bool,
    make_base: Callable[..., Path],
    tmp_path: Path,
    with_tokens: dict[str, Any],
    torch_logits: Callable,
    mlx_logits: Callable,
) -> None:
    base = make_base("qwen3", tied=tied)
    ids = [264, 265] if grown else [3, 17]
    indices = ids if form is list else {"embed_tokens": ids, "lm_head": ids}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(_in_torch(base, 266 if grown else None), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path / "theirs"
    adapted.save_pretrained(folder)
    if grown:
        load_tokenizer(base, None, with_tokens["add_tokens"]).save_pretrained(folder)
    token_ids = [[5, 3, 17, *ids, 8]]
    theirs = torch.tensor(torch_logits(adapted, token_ids))
    ours = load_adapter(folder, str(base), "float32")
    assert_close(mlx_logits(ours.model, token_ids), theirs)

    given = {name: value for name, value in with_tokens.items() if name not in ("rank", "train_new_tokens")}
    given |= {"model": str(base), "init_adapter": str(folder), "max_steps": 1, "lr": 0.0}
    run = train(TrainConfig(**given)).run_dir
    logits = mlx_logits(load_run(run).model, token_ids)
    assert_close(logits if grown else logits[..., :264], theirs)


def test_an_adapter_for_a_larger_vocabulary_tells_the_way_out(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen3", tied=True)
    _write_start(tmp_path, base, _settings({"embed_tokens": [264]}), 265)
    with pytest.raises(UserError, match=r"there is no row for the token 264") as refused:
        load_adapter(tmp_path, str(base))
    assert "--add-tokens" in refused.value.hint


@pytest.mark.parametrize(
    ("indices", "told"),
    [
        ([], "no place"),
        ([1, 2], "names 2 tokens"),
        ([1, 1, 2], "twice"),
        (["a"], "names no tokens"),
        (None, "unknown tensor"),
    ],
)
def test_indices_that_do_not_fit_their_rows_are_damage(
    indices: Any, told: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    _write_start(tmp_path, make_base("qwen3", tied=True), _settings(BOTH))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": indices}))
    with pytest.raises(UserError):
        read_adapter(tmp_path)


@pytest.mark.parametrize("how", [{"method": "full"}, {"also_train": "embed_tokens,lm_head"}])
def test_new_rows_are_trained_with_all_others(
    how: dict[str, Any], with_tokens: dict[str, Any], tmp_path: Path, torch_logits: Callable, mlx_logits: Callable
) -> None:
    left_out = ("train_new_tokens", "rank") if "method" in how else ("train_new_tokens",)
    given = {name: value for name, value in with_tokens.items() if name not in left_out}
    run = train(TrainConfig(**given | how)).run_dir
    merged = export(run, tmp_path / "merged").path
    token_ids = [[5, 264, 3, 265, 8]]
    ours = mlx_logits(load_run(run).model, token_ids)
    assert_close(ours, torch.tensor(torch_logits(_in_torch(merged), token_ids)))
    assert np.abs(ours[..., 264] - ours[..., 265]).max() > 1e-3


def test_on_a_quantized_base_these_rows_alone_are_plain_numbers(
    with_tokens: dict[str, Any], tmp_path: Path, torch_logits: Callable, mlx_logits: Callable
) -> None:
    run = train(TrainConfig(**with_tokens | {"quantize": "mxfp4", "max_steps": 2})).run_dir
    token_ids = [[5, 264, 3, 265, 8]]
    model = load_run(run).model
    assert "scales" in model.model.embed_tokens.frozen
    merged = export(run, tmp_path / "merged", base="dequantized").path
    assert_close(mlx_logits(model, token_ids), torch.tensor(torch_logits(_in_torch(merged), token_ids)), 1e-4)
    assert export(run, tmp_path / "original").verification is not None


def test_a_base_that_is_quantized_already_grows(
    with_tokens: dict[str, Any], tmp_path: Path, torch_logits: Callable, mlx_logits: Callable
) -> None:
    from mlx_sft.convert.targets.mlx import convert

    packed = convert(with_tokens["model"], tmp_path / "packed", quantize="4")
    run = train(TrainConfig(**with_tokens | {"model": str(packed), "max_steps": 2})).run_dir
    merged = export(run, tmp_path / "merged", base="dequantized").path
    token_ids = [[5, 264, 3, 265, 8]]
    ours = mlx_logits(load_run(run).model, token_ids)
    assert_close(ours, torch.tensor(torch_logits(_in_torch(merged), token_ids)), 1e-4)
    assert export(run, tmp_path / "original", base_model=with_tokens["model"]).verification is not None


def test_ids_in_the_padding_need_no_new_rows(
    with_tokens: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base("qwen3", tied=True, vocab_size=288)
    run = train(TrainConfig(**with_tokens | {"model": str(base), "max_steps": 1})).run_dir
    assert load_run(run).model.model.embed_tokens.weight.shape[0] == 288
    assert export(run, tmp_path / "peft", format="peft").notes == ()
    assert json.loads((export(run, tmp_path / "merged").path / "config.json").read_text())["vocab_size"] == 288


def test_they_come_off_a_model_and_go_back_on(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen3")
    _write_start(tmp_path, base, _settings(BOTH))
    model = load_model(str(base), "float32").model
    token_ids = mx.array([IDS])
    plain = model(token_ids)
    method = put_adapter(model, tmp_path)
    with_rows = model(token_ids)
    again = Lora.detach(model)
    assert mx.array_equal(model(token_ids), plain)
    again()
    assert mx.array_equal(model(token_ids), with_rows)
    put_adapter(model, None, method)
    assert mx.array_equal(model(token_ids), plain)


# The run


def test_a_run_goes_on_exactly_and_stands_alone(with_tokens: dict[str, Any], tmp_path: Path) -> None:
    shape = with_tokens | {"max_steps": 4, "scheduler": "constant", "warmup": 0}
    straight = train(TrainConfig(**shape)).run_dir
    half = train(TrainConfig(**shape | {"out": str(tmp_path / "half"), "max_steps": 2})).run_dir
    tokens = Path(with_tokens["add_tokens"])
    train(TrainConfig(resume=str(half), max_steps=3, quiet=True, add_tokens=str(tokens), train_new_tokens=True))
    tokens.write_text('["<call>", "<|other|>"]')
    with pytest.raises(UserError, match=r"--add-tokens"):
        train(TrainConfig(resume=str(half), add_tokens=str(tokens), quiet=True))
    tokens.unlink()
    train(TrainConfig(resume=str(half), max_steps=4, quiet=True))
    files = [RunFolder(run).adapter / "adapter_model.safetensors" for run in (straight, half)]
    assert files[0].read_bytes() == files[1].read_bytes()
    moved = half.rename(tmp_path / "moved")
    assert 264 in prompt_tokens(load_run(moved), "what is <call>?")
    assert evaluate_run(moved, with_tokens["data"]).loss > 0


def test_inspect_sees_them_as_tokens(with_tokens: dict[str, Any]) -> None:
    config = TrainConfig(**with_tokens)
    more = sum(example["tokens"] for example in json.loads(inspect(config).to_json())["rows"])
    fewer = sum(
        example["tokens"]
        for example in json.loads(inspect(config.model_copy(update={"add_tokens": None})).to_json())["rows"]
    )
    assert more < fewer
