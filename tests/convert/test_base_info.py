"""What is said of a base is what this disk holds of it; what is not certain is left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, export, train
from mlx_sft.convert.base_info import BaseInfo, base_info
from mlx_sft.files import to_json
from mlx_sft.run_folder import RunFolder

COMMIT = "abc0" * 10


@pytest.fixture
def run(train_once: Callable[..., Path], settings: dict[str, Any]) -> RunFolder:
    """A finished run with validation."""
    return RunFolder(shutil.copytree(train_once(valid_fraction=0.2), settings["out"]))


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


def base_of(run: RunFolder) -> BaseInfo:
    return base_info(run, TrainConfig.resolve(run.config))


def run_on(settings: dict[str, Any], model: str) -> RunFolder:
    return RunFolder(train(TrainConfig(**settings | {"model": model, "max_steps": 1})).run_dir)


def test_a_base_from_the_hub_is_named_with_its_commit_and_licence(settings: dict[str, Any], cached: Path) -> None:
    (cached / "README.md").write_text("---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n# Base\n")
    base = base_of(run_on(settings, "some/base"))
    assert (base.name, base.on_hub, base.revision) == ("some/base", True, COMMIT)
    assert base.family == "qwen3"
    assert base.licence == {
        "license": "other",
        "license_name": "qwen",
        "license_link": "https://huggingface.co/some/base/blob/main/LICENSE",
    }


def test_an_exported_adapter_names_the_commit_of_its_base(
    settings: dict[str, Any], cached: Path, tmp_path: Path
) -> None:
    run = run_on(settings, "some/base")

    def revision(to: str) -> str | None:
        written = export(run.path, tmp_path / to, format="peft").path / "adapter_config.json"
        named: str | None = json.loads(written.read_text())["revision"]
        return named

    assert revision("adapter") == COMMIT
    edit(cached / "generation_config.json", temperature=0.7)
    assert revision("later") is None


def test_a_folder_of_the_cache_is_its_model_on_the_hub(settings: dict[str, Any], cached: Path) -> None:
    base = base_of(run_on(settings, str(cached)))
    assert (base.name, base.on_hub, base.revision) == ("some/base", True, COMMIT)


def test_a_commit_that_may_be_another_than_was_trained_on_is_not_named(settings: dict[str, Any], cached: Path) -> None:
    run = run_on(settings, "some/base")
    edit(cached / "generation_config.json", temperature=0.7)
    assert base_of(run).revision is None


def test_a_base_that_is_gone_is_named_as_the_run_names_it(settings: dict[str, Any], cached: Path) -> None:
    run = run_on(settings, "some/base")
    shutil.rmtree(cached.parents[1])
    base = base_of(run)
    assert (base.name, base.on_hub, base.revision, base.family, base.licence) == ("some/base", True, None, None, {})


def test_a_folder_has_its_name_alone(run: RunFolder, settings: dict[str, Any]) -> None:
    base = base_of(run)
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
    assert base_of(run).licence == licence
