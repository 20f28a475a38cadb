"""What the documentation says can be typed, quoted and looked up is so: its commands run, its messages and names are the program's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlx_sft import TrainConfig, train
from mlx_sft.cli import main
from mlx_sft.config import all_fields
from mlx_sft.options import resolved
from mlx_sft.other_names import OTHER_NAMES
from tests.doc_commands import PAGES, ROOT, StandIns, commands_of, found, inline_commands_of

fast = pytest.mark.fast

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

NOT_RUN = {
    r"--llama-cpp|--format gguf": "llama.cpp's converter",
    r"hf:|\.parquet": "the network, or files that only another library writes",
    r"^compare ": "minutes; tests/compare runs comparisons",
    r"^(doctor|push (?!.*--dry-run))": "the machine or the network",
    r"--format (trl|adapters|mlx-cache)|--resume|my-job": "a run of its own kind, which the tests of that export and of resuming make",
    r"^serve |--serve|--live": "a server, until it is ended, or a browser",
    "--ranks": "processes of their own, which their tests start",
    "--report-to": "packages of other programs, with which tests/training/test_report_to.py talks",
    r"^runs rm|--step|/Volumes|~/": "runs and places that only the reader has",
}
"""Which commands are parsed and no more, and what they would need."""


@fast
def test_there_are_commands_to_look_at() -> None:
    """Each line that begins with the program's name is one, but for those of running text."""
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    typed = sum(bool(re.match(r"(\$ )?mlx-sft [a-z]", line)) for line in lines)
    assert 100 < sum(len(list(commands_of(page))) for page in PAGES) in (typed, typed - 1)


@each_page
@fast
def test_a_command_of_the_documentation_is_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options exist and their values are valid, also where it cannot run here."""
    monkeypatch.chdir(ROOT)
    begun = {(*one.words, "train.yaml")[1] for one in commands_of(page) if one.words[0] == "init"}
    for one in commands_of(page):
        command, parent, words = found(one.words)
        try:
            context = command.make_context(one.words[0], words, parent.parent)
        except click.ClickException as error:
            pytest.fail(f"{one}: {error.format_message()}")
        if one.words[0] in ("train", "inspect") and not {"--resume", "--resume-from-peft", "--run-from"} & set(words):
            fields = all_fields()
            settings = {name: value for name, value in context.params.items() if name in fields}
            file = context.params["config_file"]
            resolved(None if file in begun else file, settings)


@each_page
@fast
def test_options_in_running_text_exist(page: Path) -> None:
    for text in inline_commands_of(page):
        words = tuple(text.split()[1:])
        name = words[0].rstrip(",.:")
        if name not in main.commands:
            assert name in ("...", "--help", "--version") or not re.fullmatch(r"[a-z-]+", name), text
            continue
        command, _, rest = found((name, *words[1:]))
        parameters = command.get_params(click.Context(command))
        known = {option for one in parameters for option in (*one.opts, *one.secondary_opts)}
        named = {word.partition("=")[0] for word in rest if re.match(r"--[a-z]", word)}
        assert named <= known | {"--help"}, f"{page.name}: {text}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps on the tiny model."""
    out = tmp_path_factory.mktemp("documentation") / "run"
    data = tmp_path_factory.mktemp("rows") / "questions.csv"
    data.write_text("question,answer\nWhat is one?,It is one.\nWhat is two?,It is two.\n")
    return train(TrainConfig(model="tiny", data=str(data), out=str(out), max_steps=2, quiet=True)).run_dir


def test_the_commands_of_the_documentation_run(
    run: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page in the order of the page, on the tiny model; a command that several pages have runs once."""
    done: set[tuple[str, ...]] = set()
    failed = []
    for page in PAGES:
        stand_ins = StandIns(tmp_path_factory.mktemp(page.stem), run)
        monkeypatch.chdir(stand_ins.folder)
        for command in commands_of(page):
            if any(re.search(needs, " ".join(command.words)) for needs in NOT_RUN):
                continue
            words = stand_ins.ready(command)
            if tuple(words) in done:
                continue
            done.add(tuple(words))
            ended = CliRunner().invoke(main, words, input="")
            if ended.exit_code != 0:
                failed.append(f"{command}\n  as {' '.join(words)}\n  {ended.stderr.strip()[-600:]} {ended.exception!r}")
    assert failed == []


# --- what is quoted ---------------------------------------------------------------------------------------------------------------


def texts_of_the_program() -> set[str]:
    """Every text in the package's code, with `…` where a value is filled in."""

    def written(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(written(part) for part in node.values)
        if isinstance(node, ast.Constant):
            return str(node.value)
        return "…"

    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "mlx_sft").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {written(node) for node in nodes if isinstance(node, (ast.JoinedStr, ast.Constant))}


def quoted_messages() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def says(text: str, message: str) -> bool:
    """Whether a text of the program is, or has in it, a message as the page quotes it; … on either side stands for anything."""
    if message.strip("…").strip() in text:
        return True
    first, *parts = text.split("…")
    if not parts or len(first) < 3 or not message.startswith(first):
        return False
    return re.fullmatch(".*".join(map(re.escape, (first, *parts))), message) is not None


@fast
def test_a_message_that_is_explained_is_one_that_the_program_has() -> None:
    texts = texts_of_the_program()
    quoted = quoted_messages()
    assert len(quoted) > 40
    missing = [message for message in quoted if not any(says(text, message) for text in texts)]
    assert missing == []


@fast
def test_a_message_that_the_program_has_not_is_seen() -> None:
    assert says("the … no rows", "the file holds no rows")
    assert says("out of memory in step …: a row", "out of memory in step …")
    assert not says("the … no rows", "the file holds no columns")


@fast
def test_every_name_of_another_trainer_that_is_understood_can_be_looked_up() -> None:
    """What stands beside it is written by `make docs`, and compared by `make lint`."""
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(OTHER_NAMES)


@fast
def test_every_page_has_its_place_in_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if f" {page}\n" not in site} == set()
