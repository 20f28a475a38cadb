"""What is said of a run is what its folder holds; what is not certain is left out, and what cannot be is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, export, train
from mlx_sft.convert.base_info import Facts, read_facts
from mlx_sft.files import to_json
from mlx_sft.run_folder import RunFolder

COMMIT = "abc0" * 10


@pytest.fixture
def run(settings: dict[str, Any]) -> RunFolder:
    """A finished run with validation."""
    return RunFolder(train(TrainConfig(**settings, valid_fraction=0.2)).run_dir)


@pytest.fixture
def cached(tmp_path: Path, make_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of some/base in a Hub cache of its own."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    folder = cache / "models--some--base"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    shutil.copytree(make_base("qwen3", tied=True), snapshot)
    return snapshot


def edit(file: Path, **changes: Any) -> None:
    file.write_text(to_json(json.loads(file.read_text()) | changes))


def base_of(settings: dict[str, Any], model: str) -> tuple[RunFolder, Facts]:
    run = RunFolder(train(TrainConfig(**settings | {"model": model, "max_steps": 1})).run_dir)
    return run, read_facts(run)


# --- the base -------------------------------------------------------------------------------------------------------------------


def test_a_base_from_the_hub_is_named_with_its_commit_and_licence(settings: dict[str, Any], cached: Path) -> None:
    (cached / "README.md").write_text("---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n# Base\n")
    _, facts = base_of(settings, "some/base")
    assert (facts.base.name, facts.base.on_hub, facts.base.revision) == ("some/base", True, COMMIT)
    assert facts.base.family == "qwen3"
    assert facts.base.licence == {
        "license": "other",
        "license_name": "qwen",
        "license_link": "https://huggingface.co/some/base/blob/main/LICENSE",
    }


def test_an_exported_adapter_names_the_commit_of_its_base(
    settings: dict[str, Any], cached: Path, tmp_path: Path
) -> None:
    run, _ = base_of(settings, "some/base")

    def revision(to: str) -> str | None:
        written = export(run.path, tmp_path / to, format="peft").path / "adapter_config.json"
        named: str | None = json.loads(written.read_text())["revision"]
        return named

    assert revision("adapter") == COMMIT
    edit(cached / "generation_config.json", temperature=0.7)
    assert revision("later") is None


def test_a_folder_of_the_cache_is_its_model_on_the_hub(settings: dict[str, Any], cached: Path) -> None:
    _, facts = base_of(settings, str(cached))
    assert (facts.base.name, facts.base.on_hub, facts.base.revision) == ("some/base", True, COMMIT)


def test_a_commit_that_may_be_another_than_was_trained_on_is_not_named(settings: dict[str, Any], cached: Path) -> None:
    run, _ = base_of(settings, "some/base")
    edit(cached / "generation_config.json", temperature=0.7)
    assert read_facts(run).base.revision is None


def test_a_base_that_is_gone_is_named_as_the_run_names_it(settings: dict[str, Any], cached: Path) -> None:
    run, _ = base_of(settings, "some/base")
    shutil.rmtree(cached.parents[1])
    base = read_facts(run).base
    assert (base.name, base.on_hub, base.revision, base.family, base.licence) == ("some/base", True, None, None, {})


def test_a_folder_has_its_name_alone(run: RunFolder, settings: dict[str, Any]) -> None:
    base = read_facts(run).base
    assert (base.name, base.on_hub, base.revision) == (Path(settings["model"]).name, False, None)


@pytest.mark.parametrize(
    ("card", "config", "licence"),
    [
        ("---\nlicense: mit\n---\n", None, {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", None, {"license": "mit"}),
        (None, "gemma", {"license": "gemma"}),
        ("---\nlicense: mit\n---\n", "gemma", {"license": "mit"}),
        ("# no metadata\n", None, {}),
        ("---\nlicense: [mit, gemma]\n---\n", None, {}),
        ("---\nlicense: 'mit) [x](http://e.vil)'\n---\n", None, {}),
        ("---\nlicense: {\n---\n", "gemma", {"license": "gemma"}),
        ("---\nlicense: other\nlicense_link: javascript:alert(1)\n---\n", None, {"license": "other"}),
        ("---\nlicense: other\nlicense_link: ../../etc/passwd\n---\n", None, {"license": "other"}),
        (
            "---\nlicense: other\nlicense_link: https://x.org/LICENSE\n---\n",
            None,
            {"license": "other", "license_link": "https://x.org/LICENSE"},
        ),
    ],
)
def test_a_licence_is_what_the_base_says(
    run: RunFolder, settings: dict[str, Any], tmp_path: Path, card: str | None, config: str | None, licence: object
) -> None:
    base = tmp_path / "base"
    shutil.copytree(settings["model"], base)
    if card is not None:
        (base / "README.md").write_bytes(card.encode())
    if config is not None:
        edit(base / "config.json", license=config)
    run.config.write_text(run.config.read_text().replace(settings["model"], str(base)))
    assert read_facts(run).base.licence == licence


# --- the data -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "public", "dataset"),
    [
        ("/home/jane/rows/chats.jsonl", "chats.jsonl", None),
        ("chats.jsonl", "chats.jsonl", None),
        ("hf:owner/rows", "hf:owner/rows", "owner/rows"),
        ("hf:owner/rows/en:train", "hf:owner/rows/en:train", "owner/rows"),
        ("hf:owner", "hf:owner", None),
        ("hf:o wner/x`y", "hf:o wner/x`y", None),
        ("\udcff.jsonl", "\udcff.jsonl", None),
    ],
)
def test_a_source_is_known_by_its_name_without_its_folder(
    run: RunFolder, name: str, public: str, dataset: str | None
) -> None:
    report = json.loads(run.data_report.read_text())
    run.data_report.write_text(json.dumps(report | {"sources": [{"name": name, "rows": 3}]}))
    (source,) = read_facts(run).data.sources
    assert (source.public_name, source.dataset) == (public, dataset)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"totals": {"rows": 1}}, "totals.kept"),
        ({"train": None}, "train"),
        ({"train": {"rows": "8`", "tokens": 1, "supervised_tokens": 1}}, "train.rows"),
        ({"train": {"rows": -1, "tokens": 1, "supervised_tokens": 1}}, "train.rows"),
        ({"train": {"rows": True, "tokens": 1, "supervised_tokens": 1}}, "train.rows"),
        ({"sources": [{"name": ["x"], "rows": 1}]}, "sources.0.name"),
        ({"sources": "x"}, "sources"),
    ],
)
def test_numbers_that_are_none_are_refused(run: RunFolder, changes: dict[str, Any], place: str) -> None:
    edit(run.data_report, **changes)
    with pytest.raises(UserError, match=f"^{run.data_report}: {place} is not what a run writes there") as caught:
        read_facts(run)
    assert caught.value.where == str(run.data_report)


def test_a_file_that_is_missing_is_named(run: RunFolder) -> None:
    run.metrics.unlink()
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_facts(run)
    assert caught.value.where == str(run.metrics)


# --- how it did -----------------------------------------------------------------------------------------------------------------


def lines(run: RunFolder, *records: dict[str, Any] | str) -> Facts:
    run.metrics.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return read_facts(run)


def trained(step: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "train", "step": step, "epoch": step / 4, "loss": loss}


def evaluated(step: int, loss: float | None, *, best: bool) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "epoch": step / 4, "loss": loss, "perplexity": 2.0, "best": best}


def test_the_result_is_of_the_best_evaluation(run: RunFolder) -> None:
    outcome = lines(
        run, trained(1, 3.0), evaluated(1, 2.5, best=True), trained(2, 2.0), evaluated(2, 2.6, best=False)
    ).outcome
    assert (outcome.steps, outcome.epochs, outcome.step, outcome.loss) == (2, 0.5, 1, 3.0)
    assert outcome.evaluation is not None
    assert outcome.evaluation.loss == 2.5


def test_without_validation_it_is_of_the_last_step(run: RunFolder) -> None:
    outcome = lines(run, trained(1, 3.0), trained(2, 2.0), {"kind": "rollback", "step": 1}, trained(3, None)).outcome
    assert (outcome.steps, outcome.step, outcome.loss, outcome.evaluation) == (3, 3, 2.0, None)


def test_lines_that_are_none_are_passed_over(run: RunFolder) -> None:
    hostile = {"kind": "train", "step": "9", "loss": "<script>"}
    outcome = lines(run, trained(1, 3.0), "{", "\x00", hostile, '{"kind": "train", "loss": 1e999}').outcome
    assert (outcome.steps, outcome.loss) == (1, 3.0)


def test_versions_are_those_with_which_the_run_began(run: RunFolder) -> None:
    edit(run.environment, packages={"mlx": "0.99", "x": 3}, identity=None)
    assert read_facts(run).versions == {"mlx": "0.99"}
