"""Design rules as tests: what linters do not see, and what would otherwise have to be remembered."""

from __future__ import annotations

import ast
import inspect
import re
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mlx_sft

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_sft"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MARKDOWN = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, bound name) of every import, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            assert node.module is not None
            for alias in node.names:
                yield node.module, alias.asname or alias.name


# --- how a module is written -------------------------------------------------------------------------------------------------


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 10


@each_module
def test_a_module_says_first_what_it_does(path: Path) -> None:
    assert ast.get_docstring(parse(path))


@each_module
def test_no_blanket_except(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            # BaseException may be caught only to clean up and raise again.
            raises = any(isinstance(part, ast.Raise) and part.exc is None for part in ast.walk(node))
            blanket = caught in ("everything", "Exception") or "BaseException" in caught
            # `errors.blamed_on` stands around other libraries' readers of files, and raises what a person can act on.
            # `crash_report` stands around the command line, and ends it with an exit code of its own.
            is_at_the_border = path.name in ("errors.py", "crash_report.py") and isinstance(node.body[-1], ast.Raise)
            assert not blanket or is_at_the_border or (caught == "BaseException" and raises), f"line {node.lineno}"


@each_module
def test_no_patching_of_what_is_imported(path: Path) -> None:
    tree = parse(path)
    imported = {name for _, name in imports(tree)}
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(node.args[0])]
        for target in targets:
            if isinstance(target, ast.Attribute):
                assert root_name(target) not in imported, f"line {node.lineno}"


def root_name(node: ast.expr) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@each_module
def test_only_the_public_module_and_the_command_line_import_the_package_itself(path: Path) -> None:
    """A module names the module that it needs; going through the front door would hide which way the import goes."""
    if path.parent == PACKAGE and path.stem in ("__init__", "cli", "__main__"):
        return
    assert "mlx_sft" not in {module for module, _ in imports(parse(path))}


# --- what is written -----------------------------------------------------------------------------------------------------------

METHODS_THAT_WRITE = {
    "write_text",
    "write_bytes",
    "touch",
    "symlink_to",
    "hardlink_to",
    "rename",
    "tofile",
    "save_weights",
    "save_pretrained",
}
FUNCTIONS_THAT_WRITE = {
    "FileIO",
    "copy2",
    "copyfile",
    "copytree",
    "mkstemp",
    "mkdtemp",
    "NamedTemporaryFile",
    "TemporaryDirectory",
    "memmap",
    "savetxt",
    "savez",
    "savez_compressed",
    "save_safetensors",
    "save_gguf",
    "save_file",
    "save_model",
    "save_config",
}
OF_MODULES = {
    "os.link",
    "os.mkfifo",
    "os.rename",
    "os.replace",
    "os.symlink",
    "shutil.copy",
    "shutil.move",
    "mx.save",
    "np.save",
}
WRITTEN_OTHERWISE = {
    "data/cache.py np.memmap": "maps a file that is there, for reading",
    "data/tokenize.py folder.rename": "gives a private folder its name in the cache, where that is free",
    "training/checkpoint.py folder.rename": "sets a damaged checkpoint aside, under a name that was made free",
    "convert/targets/mlx.py save_model": "mlx-lm's own writer, into a temporary folder of `write_folder`",
    "convert/targets/mlx.py save_config": "the same",
    "streams.py os.open": "/dev/null, in the place of a stream that is closed",
    "crash_report.py tempfile.NamedTemporaryFile": "a private file under a random name, where nothing of ours can be written",
}
"""Outside of `writing.py`, each with its reason."""


def writes(call: ast.Call) -> bool:
    """Whether a call writes a file, or gives one its name, in Python's way or in that of a library that is used."""
    whole = ast.unparse(call.func)
    name = whole.rpartition(".")[2]
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    if name in ("open", "fdopen"):
        modes = [value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        flags = [value for value in given if re.search("O_(WRONLY|RDWR|CREAT|APPEND|TRUNC)", ast.unparse(value))]
        return bool(flags) or any(set(mode) & set("wax+") for mode in modes)
    if name == "replace" and isinstance(call.func, ast.Attribute):
        return len(given) == 1  # a path's; a text's has two
    is_method = isinstance(call.func, ast.Attribute) and name in METHODS_THAT_WRITE
    return is_method or name in FUNCTIONS_THAT_WRITE or whole in OF_MODULES


def test_what_is_written_goes_through_one_module() -> None:
    """A file that is written elsewhere could be written through a link that someone has put there."""
    found = {
        f"{path.relative_to(PACKAGE)} {ast.unparse(node.func)}"
        for path in MODULES
        for node in ast.walk(parse(path))
        if path.name != "writing.py" and isinstance(node, ast.Call) and writes(node)
    }
    assert found == set(WRITTEN_OTHERWISE)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('path.open("wb")', True), ('open(path, mode="a")', True), ("os.open(path, os.O_WRONLY)", True), ('path.write_text("")', True),
        ("mx.save_safetensors(name, arrays)", True), ("new.replace(path)", True), ("shutil.copyfile(a, b)", True), ("np.save(a, b)", True),
        ('path.open("rb")', False), ("os.open(path, os.O_RDONLY)", False), ('text.replace("a", "b")', False), ("replace(a, b=1)", False),
        ('write_text("to stdout")', False), ("save(job)", False),
    ],
)  # fmt: skip
def test_what_writes_is_recognized(text: str, found: bool) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert writes(call) is found


# --- the package -------------------------------------------------------------------------------------------------------------


OPTIONAL = ("data", "gguf", "tensorboard", "trackio", "wandb")


def test_what_is_imported_is_declared() -> None:
    declared = {canonicalize_name(r.name) for r in requirements("dependencies")}
    optional = {canonicalize_name(r.name) for group in OPTIONAL for r in requirements(group)}
    distributions = packages_distributions()
    for path in MODULES:
        for module, _ in imports(parse(path)):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names | {"compression", "mlx_sft"}:  # compression: since Python 3.14
                continue
            owners = {canonicalize_name(name) for name in distributions.get(top, [top])}  # of what is installed
            assert owners & (declared | optional), f"{path.name} imports {top}"


def test_public_names_are_classes_and_functions_however_often_they_are_asked_for() -> None:
    """A lazily imported function must not be hidden by the module of the same name."""
    assert mlx_sft.__all__
    for name in mlx_sft.__all__:
        first, second = getattr(mlx_sft, name), getattr(mlx_sft, name)
        assert first is second
        assert inspect.isclass(first) or inspect.isfunction(first), name


def requirements(group: str) -> list[Requirement]:
    project = PROJECT["project"]
    lines = project[group] if group in project else project["optional-dependencies"][group]
    return [Requirement(line) for line in lines]


def test_mlx_comes_with_a_backend_everywhere() -> None:
    mlx = [r for r in requirements("dependencies") if r.name == "mlx"]
    by_platform = {}
    for platform in ("darwin", "linux"):
        (match,) = [r for r in mlx if r.marker and r.marker.evaluate({"sys_platform": platform})]
        by_platform[platform] = match.extras
    assert by_platform == {"darwin": set(), "linux": {"cpu"}}


def test_torch_is_pinned_for_development_and_absent_otherwise() -> None:
    assert "torch==2.13.0" in {str(r) for r in requirements("dev")}
    others = [r for group in ("dependencies", "cuda", *OPTIONAL) for r in requirements(group)]
    assert not {r.name for r in others} & {"torch", "peft", "trl"}


def test_the_wheel_holds_the_package_with_the_tiny_model_and_configurations_and_nothing_else(tmp_path: Path) -> None:
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
        entry_points = next(n for n in names if n.endswith(".dist-info/entry_points.txt"))
        assert "mlx-sft = mlx_sft.__main__:main" in wheel.read(entry_points).decode()
    outside = {n for n in names if not n.startswith("mlx_sft/") and ".dist-info/" not in n}
    assert not outside
    files = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    beside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*.yaml")}
    rows = {"examples/chats.jsonl", "examples/preferences.jsonl"}
    assert {n for n in names if n.startswith("mlx_sft/")} == files | {f"mlx_sft/{name}" for name in beside | rows}
    tiny = {Path(n).name for n in names if n.startswith("mlx_sft/model/tiny/")}
    assert tiny >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert any(n.endswith("/licenses/LICENSE") for n in names)
    assert built_size(tmp_path) < 10_000_000


def built_size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.whl"))


# --- the repository ----------------------------------------------------------------------------------------------------------


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(PROJECT['project']['version'])}\b", text, re.MULTILINE)


def test_the_readme_begins_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```\w*\n(.*?)```", text, re.DOTALL)
    assert block is not None
    commands = [line.split("#")[0].strip() for line in block[1].splitlines()]
    assert commands[-2:] == ["make demo", "make test"]


@pytest.mark.parametrize("target", ["demo", "test", "lint", "fix", "bench", "docs", "clean"])
def test_make_has_the_target_and_says_what_it_does(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:[^\n]*## \w", makefile, re.MULTILINE)


def test_continuous_integration_runs_the_linters_then_the_readmes_test_command_in_a_clone() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    text = script.read_text(encoding="utf-8")
    steps = (
        "make lint\n",
        "git clone ",
        "    PYTHONPATH=$PWD make test VENV=",
        'make test WORKERS=0 ARGS="-m neighbours"',
    )
    lint, clone, test, rest = (text.index(f"\n{step}") for step in steps)
    assert lint < clone < test < rest
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["check"]
    assert {"run": ".ci/run"} in job["steps"]
    systems = job["strategy"]["matrix"]["os"]
    assert {name.split("-")[0] for name in systems} == {"macos", "ubuntu"}


def test_what_is_published_is_built_and_used_as_a_stranger_does_first_and_no_token_is_kept() -> None:
    assert (ROOT / ".ci" / "dist").stat().st_mode & stat.S_IXUSR
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert {"run": '.ci/dist "$GITHUB_REF_NAME"'} in jobs["build"]["steps"]
    assert jobs["publish"]["needs"] == "build"
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert "secrets." not in text
    checked = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["dist"]
    assert {"run": ".ci/dist"} in checked["steps"]


def test_what_is_tested_is_the_package_of_this_checkout(tmp_path: Path) -> None:
    """Here and in the processes that tests start, also with the environment of another checkout."""
    assert Path(mlx_sft.__file__).resolve().parent == PACKAGE.resolve()
    command = [sys.executable, "-c", "import mlx_sft; print(mlx_sft.__file__)"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(ended.stdout.strip()).resolve().parent == PACKAGE.resolve()


# --- no way out of the repository -------------------------------------------------------------------------------------------------

ROOMS = ("mlx_sft", "tests", "scripts", "examples", "benchmarks", "docs", "configs", ".ci", ".github")
MACHINES_FOLDER = re.compile(r"(?<![\w.~/$}-])/(?:work|workspace|home|Users|root|mnt|srv|private)/(?!jane/)")
"""The absolute path of some machine's folder; `/home/jane/` is made up, in tests of what may be told of a path."""
WAY_TO_THE_NEIGHBOURS = re.compile(
    r"""\.\./shared|["'/]shared["'/]|MLX_SFT_SHARED|\bparents\[\d+\]\s*(?:\.parent\b|/ *["']\.\.)"""
)
KNOWS_THE_NEIGHBOURS = {"tests/neighbours.py", "CONTRIBUTING.md", ".ci/run"}


def lines_of_the_repository() -> Iterator[tuple[str, int, str]]:
    """(file, line number, line) of everything in the repository, but for this file, which has the patterns."""
    outside = [ROOT / "Makefile", ROOT / "pyproject.toml", *ROOT.glob("*.md")]
    inside = [path for room in ROOMS for path in (ROOT / room).rglob("*") if "__pycache__" not in path.parts]
    ignored = (ROOT / "benchmarks" / "work", Path(__file__))
    for path in sorted(outside + inside):
        if path.is_file() and not any(map(path.is_relative_to, ignored)):
            text = path.read_bytes().decode("utf-8", errors="ignore")
            name = path.relative_to(ROOT).as_posix()
            yield from ((name, number, line) for number, line in enumerate(text.splitlines(), 1))


def test_no_file_names_a_folder_of_one_machine() -> None:
    found = [f"{name}:{number}" for name, number, line in lines_of_the_repository() if MACHINES_FOLDER.search(line)]
    assert found == []


def test_only_one_module_finds_what_lies_beside_the_project() -> None:
    found = [
        f"{name}:{number}"
        for name, number, line in lines_of_the_repository()
        if name not in KNOWS_THE_NEIGHBOURS and WAY_TO_THE_NEIGHBOURS.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("line", ['Path("/work/x/y")', "see /Users/jo/models", "open('/home/jo/x')", "cd /root/x"])
def test_a_machines_folder_is_seen(line: str) -> None:
    assert MACHINES_FOLDER.search(line)


@pytest.mark.parametrize(
    "line",
    ['ROOT / "shared" / "data"', "../shared/data", "Path(__file__).parents[2].parent", 'parents[2] / ".." / NAME'],
)
def test_a_way_to_the_neighbours_is_seen(line: str) -> None:
    assert WAY_TO_THE_NEIGHBOURS.search(line)


# --- links ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/extending.md", "CONTRIBUTING.md"])
def test_modules_that_the_documentation_names_are_there(page: str) -> None:
    named = set(re.findall(r"`(?:mlx_sft/)?((?:[a-z_]+/)*[a-z_]+\.py)`", (ROOT / page).read_text(encoding="utf-8")))
    missing = {name for name in named if not ((ROOT / "mlx_sft" / name).is_file() or (ROOT / name).is_file())}
    assert missing == set()


@each_module
def test_no_entry_is_named_outside_of_its_room(path: Path) -> None:
    """`if method == "full"` anywhere is a question for the method itself."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r'\b(method|objective|optimizer) (==|!=|in) ["(\[]', text)
    if "methods" not in path.parts:
        assert "lora_A" not in text


@each_module
def test_no_module_is_longer_than_a_reader_has_patience_for(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= 400
