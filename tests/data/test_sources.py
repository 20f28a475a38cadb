from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlx_sft.data.readers import Row
from mlx_sft.data.sources import FileSource, Source, locate, split_weight
from mlx_sft.errors import USAGE, UserError

pytestmark = pytest.mark.fast


def read(path: Path | str, part: str = "all") -> list[Row | UserError]:
    return list(locate(str(path))[part].rows())


@pytest.mark.parametrize(("data", "module"), [("a.parquet", "pyarrow"), ("hf:owner/name", "datasets")])
def test_a_missing_reader_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, module: str
) -> None:
    (tmp_path / "a.parquet").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        read(data)
    assert "mlx-sft[data]" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.docx", "x", "`.docx` is not a known kind of file"),
        ("a", "x", "the file's name has no suffix"),
        ("a.docx.gz", "x", "`.gz` is not a known kind of file"),
        ("a.parquet.zst", "x", "`.zst` is not a known kind of file"),
    ],
)
def test_an_unknown_kind_of_file_is_refused(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        locate(str(tmp_path / name))
    assert ".jsonl" in caught.value.hint
    assert caught.value.exit_code == USAGE


def test_a_missing_file_names_its_like(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}")
    with pytest.raises(UserError, match="no such file") as caught:
        locate(str(tmp_path / "chat.jsonl"))
    assert "chats.jsonl" in caught.value.hint


@pytest.mark.parametrize(
    ("target", "told"),
    [("gone.jsonl", "a link that leads nowhere"), ("a.jsonl", "Too many levels of symbolic links")],
    ids=["gone", "itself"],
)
def test_a_link_that_leads_nowhere_is_named_as_one(tmp_path: Path, target: str, told: str) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=told):
        locate(str(tmp_path / "a.jsonl"))


def test_a_bare_dataset_id_is_told_its_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        locate("owner/name")
    assert "hf:owner/name" in caught.value.hint


@pytest.fixture
def nobody() -> Iterator[None]:
    """Root may read everything, so that it must be someone else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def forbidden(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}')
    path.chmod(0)
    return path


def test_a_file_without_permission_is_an_error(forbidden: Path, nobody: None) -> None:
    source = FileSource(forbidden)
    with pytest.raises(UserError, match="cannot read: Permission denied") as caught:
        list(source.rows())
    assert caught.value.where == str(forbidden)
    assert caught.value.hint == "check its permissions"
    with pytest.raises(UserError, match="cannot read: Permission denied"):
        source.sha256()


def test_a_folder_without_permission_is_an_error(tmp_path: Path, forbidden: Path, nobody: None) -> None:
    if os.getuid() != 0:
        tmp_path.chmod(0)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            locate(str(forbidden))
    finally:
        if os.getuid() != 0:
            tmp_path.chmod(0o700)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        locate(str(path))
    with pytest.raises(UserError, match="not a regular file"):
        list(FileSource(path).rows())


def test_a_directory_with_a_files_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(UserError, match="the folder holds no rows"):
        locate(str(tmp_path / "a.jsonl"))


def test_a_source_can_be_pickled_and_tells_its_size_and_how_far_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 200_000)
    source = pickle.loads(pickle.dumps(locate(str(path))["all"]))
    positions: list[int] = []
    assert sum(1 for _ in source.rows(positions.append)) == 200_000
    assert positions == sorted(positions)
    assert len(positions) > 2
    assert positions[-1] == source.size() == path.stat().st_size


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("a.jsonl:0.7", ("a.jsonl", 0.7)),
        ("a.jsonl:2", ("a.jsonl", 2.0)),
        ("a.jsonl", ("a.jsonl", None)),
        ("folder:1e-3", ("folder", 0.001)),
        ("hf:owner/name", ("hf:owner/name", None)),
        ("hf:owner/name:test", ("hf:owner/name:test", None)),
        ("hf:owner/name:test[:10]", ("hf:owner/name:test[:10]", None)),
        ("hf:owner/name:test:0.3", ("hf:owner/name:test", 0.3)),
        ("hf:owner/name:0.3", ("hf:owner/name", 0.3)),
        ("no:such file", ("no:such file", None)),
        ("", ("", None)),
        (":0.5", (":0.5", None)),
    ],
)
def test_data_may_name_its_share_of_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, parts: tuple[str, float | None]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_weight(spec) == parts


def test_a_path_that_exists_as_it_stands_is_taken_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl:0.5"
    path.write_text("{}")
    assert split_weight(str(path)) == (str(path), None)
    assert split_weight(f"{path}:2") == (str(path), 2.0)


@pytest.mark.parametrize("share", ["0", "-1", "nan", "inf", "half", "0,5", ""])
def test_a_share_that_is_none_is_refused(tmp_path: Path, share: str) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match="is not a number above 0") as caught:
        split_weight(f"{tmp_path / 'a.jsonl'}:{share}")
    assert caught.value.exit_code == USAGE


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.json.zst", "train.csv.gz"])
def test_a_folder_may_hold_compressed_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    (tmp_path / "train.parquet.gz").write_text("x")
    assert Path(locate(str(tmp_path))["train"].name).name == name


@pytest.mark.parametrize("valid", ["valid.csv", "validation.jsonl", "dev.json", "valid.txt"])
def test_a_folder_has_its_parts_by_name(tmp_path: Path, valid: str) -> None:
    for name in ("train.jsonl", valid, "test.jsonl", "README.md"):
        (tmp_path / name).write_text("x")
    parts = locate(str(tmp_path))
    assert {part: Path(source.name).name for part, source in parts.items()} == {
        "train": "train.jsonl",
        "valid": valid,
        "test": "test.jsonl",
    }


def test_a_folder_with_two_files_for_a_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text("x")
    (tmp_path / "dev.csv").write_text("x")
    with pytest.raises(UserError, match=r"valid\.jsonl and dev\.csv are both the valid part"):
        locate(str(tmp_path))


def write_parts(folder: Path, *names: str) -> None:
    """Each file with one row, which says its name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}))


def texts(source: Source) -> list[str]:
    return [row.value["text"] for row in source.rows() if isinstance(row, Row)]


@pytest.mark.parametrize(
    "parts",
    [
        {"train": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], "test": ["test-00000-of-00001.jsonl"]},
        {"train": ["data/train-1-of-2-0123456789abcdef.json", "data/train-2-of-2-fedcba9876543210.json"]},
        {"train": ["train/0000.jsonl", "train/0001.jsonl"], "valid": ["validation/0000.jsonl"]},
        {"train": ["data/train/a.jsonl.gz", "data/train/b.jsonl.gz"], "valid": ["data/val/a.jsonl"]},
        {"train": [f"train_{number}.ndjson" for number in range(12)], "valid": ["dev.jsonl"]},
        {"train": ["data/train.jsonl"], "valid": ["data/validation.jsonl"], "test": ["data/test.jsonl"]},
    ],
)
def test_a_folder_is_read_as_the_hub_lays_it_out(tmp_path: Path, parts: dict[str, list[str]]) -> None:
    write_parts(tmp_path, *(name for names in parts.values() for name in names))
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "dataset_info.json").write_text("{}")
    found = locate(str(tmp_path))
    assert {part: texts(source) for part, source in found.items()} == parts
    for source in found.values():
        assert sum(1 for _ in source.rows()) == len(source.files)
        assert all(row.origin.startswith(str(tmp_path)) for row in source.rows() if isinstance(row, Row))


def test_several_files_of_a_part_tell_their_size_digest_and_how_far_they_are(tmp_path: Path) -> None:
    write_parts(tmp_path, "train-0.jsonl", "train-1.jsonl")
    source = pickle.loads(pickle.dumps(locate(str(tmp_path))["train"]))
    positions: list[int] = []
    assert len(list(source.rows(positions.append))) == 2
    assert positions == sorted(positions)
    assert positions[-1] == source.size() == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert source.name == str(tmp_path / "train")
    before = source.sha256()
    (tmp_path / "train-1.jsonl").write_text('{"text": "other"}')
    assert source.sha256() != before
    for file in tmp_path.iterdir():
        file.write_text("\n")
    with pytest.raises(UserError, match="the files hold no rows"):
        list(source.rows())


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "it has 2 files, where their names count 3"),
        (["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"], "2 files, where their names count 1 and 2"),
        (["train-00000-of-00002-aaaaaaaa.jsonl", "train-00000-of-00002-bbbbbbbb.jsonl"], "it has 2 files"),
        (["train-0-of-999999999.jsonl"], "it has 1 file, where"),
        (["train/a.jsonl", "train/b.csv"], r"a\.jsonl and b\.csv are files of several kinds"),
        (["train.jsonl", "data/train-0.jsonl"], r"train\.jsonl and data/train are both the train part"),
        (["valid/a.jsonl", "dev.jsonl", "train.jsonl"], r"valid and dev\.jsonl are both the valid part"),
    ],
)
def test_a_part_that_is_not_whole_or_there_twice_is_refused(tmp_path: Path, names: list[str], reason: str) -> None:
    write_parts(tmp_path, *names)
    with pytest.raises(UserError, match=reason) as caught:
        locate(str(tmp_path))
    assert caught.value.hint


def test_numbered_files_are_named_by_what_stands_before_their_numbers(tmp_path: Path) -> None:
    names = [f"data/train_sft-{number:05}-of-00011.jsonl" for number in range(11)]
    write_parts(tmp_path, *names, "data/train_gen-00000-of-00001.jsonl")
    assert texts(locate(str(tmp_path / "data" / "train_sft"))["all"]) == names
    assert split_weight(f"{tmp_path}/data/train_gen:2") == (f"{tmp_path}/data/train_gen", 2)
    with pytest.raises(UserError, match="the folder holds no rows") as caught:
        locate(str(tmp_path))
    assert "as it has data/train_gen, data/train_sft;" in caught.value.hint
    (tmp_path / names[3]).unlink()
    with pytest.raises(UserError, match="it has 10 files, where their names count 11"):
        locate(str(tmp_path / "data" / "train_sft"))
    with pytest.raises(UserError, match="no such file"):
        locate(str(tmp_path / "data" / "train"))


def test_the_folder_of_a_part_is_that_part(tmp_path: Path) -> None:
    write_parts(tmp_path, "validation/0.jsonl", "validation/1.jsonl", "test/train.jsonl")
    assert texts(locate(str(tmp_path / "validation"))["all"]) == ["validation/0.jsonl", "validation/1.jsonl"]
    assert list(locate(str(tmp_path / "test"))) == ["train"]


def test_a_folder_without_parts_says_what_it_has_instead(tmp_path: Path) -> None:
    write_parts(tmp_path, "en/train-0.jsonl", "notes.txt")
    with pytest.raises(UserError, match="the folder holds no rows") as caught:
        locate(str(tmp_path))
    assert "notes.txt, en/train-0.jsonl" in caught.value.hint
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "data-00000-of-00001.arrow").write_text("x")
    with pytest.raises(UserError) as caught:
        locate(str(tmp_path))
    assert "to_parquet" in caught.value.hint


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder holds no rows"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        ("hf:owner/name", ("owner/name", None, "train")),
        ("hf:owner/name:test[:10]", ("owner/name", None, "test[:10]")),
        ("hf:owner/name/all:train", ("owner/name", "all", "train")),
    ],
)
def test_a_dataset_id_names_owner_name_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, data: str, arguments: tuple[str, str | None, str]
) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> list[dict[str, str]]:
        asked.append((path, name, split))
        return [{"text": "a"}]

    library = ModuleType("datasets")
    monkeypatch.setattr(library, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert read(data) == [Row(f"{data}[0]", {"text": "a"})]
    assert asked == [arguments]


def test_a_dataset_that_cannot_be_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nmore")

    library = ModuleType("datasets")
    monkeypatch.setattr(library, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(UserError) as caught:
        read("hf:owner/name")
    assert caught.value.where == "hf:owner/name"
    assert caught.value.what.endswith("(OfflineModeIsEnabled)")


@pytest.mark.parametrize("data", ["hf:name", "hf:", "hf:owner/", "hf:a/b/c/d"])
def test_a_malformed_dataset_id_is_refused(data: str) -> None:
    with pytest.raises(UserError, match="not a dataset id"):
        locate(data)


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert locate(str(path))["all"].sha256() == digest
