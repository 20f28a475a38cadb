"""The settings that an adapter is written with name what was trained, and nothing else of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from mlx_sft import TrainConfig, evaluate_run, export, load_run, train
from mlx_sft.errors import UserError
from mlx_sft.load import load_adapter
from mlx_sft.methods.lora_settings import GROUPS, LoraSettings
from mlx_sft.methods.lora_targets import adapted_modules
from mlx_sft.methods.peft_files import CONFIG, read_adapter, write_adapter
from mlx_sft.methods.peft_rules import PeftBase, target_modules
from mlx_sft.model.names import CAUSAL_LM, EXPERTS_PART, Opening, expert_name, transformers_name
from tests.families import FAMILIES, tiny_model

TARGETS = [*GROUPS, "q_proj", "o_proj", "mlp.up_proj", "down_proj", "layers.2.self_attn.o_proj"]
BESIDE = {
    "alone": (),
    "with further layers": ("model.layers.9.self_attn.{}", "model.layers.9.mlp.{}"),
    "with convolutions": ("model.layers.0.conv.{}",),
    "with a tower": (
        "model.vision_tower.layers.0.self_attn.{}",
        "model.vision_tower.layers.0.mlp.{}",
        "model.projector.{}",
    ),
}
"""Modules of the same names in other places."""


def with_those_above(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {".".join(part[:length]) for part in parts for length in range(1, len(part) + 1)}


def each(modules: set[str]) -> set[str]:
    """Of experts each one's module."""
    return {
        one
        for name in modules
        for one in ([expert_name(name, n) for n in range(4)] if EXPERTS_PART in name else [name])
    }


def matched_by_peft(targets: list[str], modules: set[str]) -> set[str]:
    config = LoraConfig(target_modules=targets)
    return {module for module in modules if check_target_module_exists(config, module)}


@pytest.mark.parametrize("begins", ["model.", "model.language_model."])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_pefts_rule_matches_is_what_was_trained(family: str, beside: str, begins: str) -> None:
    model = tiny_model(family)
    opening = Opening(CAUSAL_LM, family, begins)
    own = {transformers_name(name.rpartition(".")[0]) for name, _ in tree_flatten(model.parameters())}
    others = {place.format(name.rpartition(".")[2]) for place in BESIDE[beside] for name in own}
    modules = with_those_above({opening.name(name) for name in own if EXPERTS_PART not in name} | others)
    experts = {opening.name(name).rpartition(".")[0] for name in own if EXPERTS_PART in name}
    base = PeftBase(opening, frozenset(modules), frozenset(experts))
    seen = 0
    for target in TARGETS:
        try:
            trained = adapted_modules(model, LoraSettings(target=target))
        except UserError:
            continue  # this family has no module of that name
        if experts and beside != "alone" and any(EXPERTS_PART in name for name in trained):
            continue  # whose experts PEFT takes by their last part alone
        targets = target_modules(base, trained)
        matched = matched_by_peft(targets, modules | each({opening.name(name) for name in own}))
        assert matched == each({opening.name(name) for name in trained}), target
        assert base.attached(targets) == {base.place(name) for name in trained}, target
        seen += 1
    assert seen > 3


def test_the_names_are_the_shortest_that_say_it() -> None:
    trained = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "out_proj")]

    def names(*others: str) -> list[str]:
        modules = frozenset(with_those_above({*trained, *others}))
        return target_modules(PeftBase(Opening(CAUSAL_LM, "some"), modules), trained)

    assert names() == ["out_proj", "q_proj"]
    assert names("model.layers.3.conv.out_proj") == ["self_attn.out_proj", "self_attn.q_proj"]
    assert names("model.tower.0.self_attn.q_proj") == sorted(trained)
    assert target_modules(PeftBase(None), trained) == sorted(trained)


def test_attention_of_a_model_whose_convolutions_have_the_same_names(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, mlx_logits: Callable, token_ids: list
) -> None:
    base = make_base("lfm2", tied=True)
    run = train(TrainConfig(**settings | {"model": str(base), "target": "attention", "max_steps": 2})).run_dir
    names = {name.rpartition(".")[0] for name in read_adapter(run / "adapter")[1]}
    assert names == {f"model.layers.{n}.self_attn.{m}_proj" for n in (1, 3) for m in ("q", "k", "v", "out")}
    assert json.loads((run / "adapter" / CONFIG).read_text())["target_modules"] == [
        f"self_attn.{m}_proj" for m in ("k", "out", "q", "v")
    ]
    ours = mlx_logits(load_run(run).model, token_ids)
    assert evaluate_run(run, settings["data"]).evaluation.loss > 0
    for form in ("merged", "peft", "mlx-lm"):
        export(run, tmp_path / form, format=form)
    assert (mlx_logits(load_adapter(tmp_path / "peft", dtype="float32").model, token_ids) == ours).all()
    again = train(TrainConfig(**settings | {"model": str(base), "out": str(tmp_path / "again"), "max_steps": 1, "lr": 0.0,
                                            "init_adapter": str(run / "adapter")} | {"rank": 2})).run_dir  # fmt: skip
    assert (mlx_logits(load_run(again).model, token_ids) == ours).all()


@pytest.mark.parametrize("targets", [["q_proj", "out_proj"], ["layers.1.self_attn.q_proj", "self_attn.out_proj"]])
def test_a_setting_that_means_more_than_the_file_has_is_read_as_what_it_has(
    make_base: Callable[..., Path], tmp_path: Path, targets: list[str]
) -> None:
    base = make_base("lfm2", tied=True)
    module = "model.layers.{}.self_attn.{}_proj"
    shapes = {"q": (64, 64), "out": (64, 64)}
    parameters = {
        f"{module.format(layer, name)}.{half}": mx.ones((2, into) if half == "lora_A" else (out, 2))
        for layer, name in ((1, "q"), (1, "out"), (3, "out"))
        for half, (out, into) in zip(("lora_A", "lora_B"), (shapes[name], shapes[name]), strict=True)
    }
    settings = TrainConfig(data="-", rank=2).settings(LoraSettings)
    write_adapter(tmp_path, settings, parameters, str(base))
    written = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(written | {"target_modules": targets}))
    if targets[0] == "q_proj":  # which says that layer 3 has one
        with pytest.raises(UserError, match=r"such as model\.layers\.3\.self_attn\.q_proj"):
            load_adapter(tmp_path)
    else:
        assert load_adapter(tmp_path).method is not None
