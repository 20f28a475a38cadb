"""Whatever lies in a folder that others made: it is refused by name before a library opens it, at once and without filling the memory."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx_lm.models
import pytest
from click.testing import CliRunner
from transformers import CONFIG_MAPPING

from mlx_sft import TrainConfig, UserError, generate_text, load_run, train
from mlx_sft.cli import main
from mlx_sft.data.prepare import prepare
from mlx_sft.data.tokenizer import BrokenTokenizer, decoded
from mlx_sft.gate import MOST_BYTES, MOST_CONFIG_DEPTH, checked, checked_tokenizer
from mlx_sft.load import load_adapter
from mlx_sft.methods.compose import merge_adapters
from mlx_sft.model.load import load_model, load_tokenizer
from mlx_sft.model.outline import outline
from mlx_sft.model.weights import Checkpoint
from mlx_sft.recommended import TINY
from mlx_sft.run_folder import RunFolder

PACKAGE = Path(__file__).parents[1] / "mlx_sft"


@contextmanager
def watchdog(seconds: int = 20) -> Iterator[None]:
    """Whoever waits for a pipe is woken, and the test fails."""

    def overdue(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, overdue)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- what lies there ----------------------------------------------------------------------------------------------------------------

NAMES = (
    "config.json", "generation_config.json", "hf_quant_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "model.safetensors", "model.safetensors.index.json", "params.json",
    "additional_chat_templates/x.jinja", "adapter_config.json", "adapter_model.safetensors", "README.md", "LICENSE", "anything",
)  # fmt: skip


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def linked_pipe(path: Path) -> None:
    target = path.with_name("elsewhere")
    os.mkfifo(target)
    path.symlink_to(target.name)


def of_the_system(path: Path) -> None:
    path.symlink_to("/proc/self/pagemap")


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # a hole: it takes no room


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def put(folder: Path, name: str, put_there: Callable[[Path], None]) -> Path:
    """Put something in the place of a file of a folder."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    put_there(path)
    return path


@pytest.mark.parametrize("what", [pipe, device, loop, linked_pipe])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_refused_by_its_name(model: Path, name: str, what: Callable[[Path], None]) -> None:
    put(model, name, what)
    with watchdog(), pytest.raises(UserError, match=r"not a regular file|cannot be read: Too many levels") as caught:
        checked(model)
    assert Path(caught.value.where).parent in (model, model / "additional_chat_templates")
    assert caught.value.hint


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".json", ".jinja", ".txt", ".model"))])
def test_a_file_that_would_fill_the_memory_is_refused(model: Path, name: str) -> None:
    path = put(model, name, endless)
    with pytest.raises(UserError, match="which none of its kind has"):
        checked(model)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="a folder in the place of a file"):
        checked(model)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="a file of Linux")
def test_a_file_that_does_not_say_how_long_it_is_is_refused(model: Path) -> None:
    put(model, "generation_config.json", of_the_system)
    with watchdog(), pytest.raises(UserError, match="a file of the system"):
        checked(model)


def test_a_snapshot_of_the_hubs_cache_passes_at_once(tmp_path: Path) -> None:
    """It is made of links to blobs; here with two hundred shards."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    names = [
        *(file.name for file in TINY.iterdir() if file.is_file()),
        *(f"model-{n:05}-of-00200.safetensors" for n in range(200)),
    ]
    for number, name in enumerate(names):
        shutil.copyfile(TINY / name, blobs / str(number)) if (TINY / name).exists() else (blobs / str(number)).touch()
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (snapshot / "gone.json").symlink_to("../../blobs/gone")  # as good as not there
    started = time.perf_counter()
    assert checked(snapshot) == snapshot
    assert time.perf_counter() - started < 0.5  # some 10 ms, where nothing else runs
    assert load_tokenizer(snapshot).chat_template


# --- numbers ------------------------------------------------------------------------------------------------------------------------

LIES: list[tuple[dict[str, Any], str]] = [
    ({"num_labels": 10**9}, "num_labels is 1,000,000,000, where a model has 0 to"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_hidden_layers": 2.5}, "where a model has a whole number"),
    ({"num_attention_heads": 10**6}, "num_attention_heads"),
    ({"num_attention_heads": -5}, "num_attention_heads is -5"),
    ({"layer_types": ["full_attention"] * 10**4}, "layer_types has 10,000 entries"),
    ({"num_experts": 10**9}, "num_experts"),
    ({"vocab_size": 10**12}, "vocab_size"),
    ({"n_something": 10**9}, "n_something"),
    ({"vision_config": {"depth": 10**9}}, "depth"),
    ({"block_configs": [{"num_heads": 10**9}]}, "num_heads"),
    ({"max_position_embeddings": 10**30}, "max_position_embeddings is a number of 100 bits"),
    ({"eos_token_id": 10**20}, "eos_token_id is a number of 67 bits"),
    ({"rope_theta": float("nan")}, "rope_theta is NaN"),
    ({"rope_scaling": {"factor": float("inf")}}, "factor is Infinity"),
]


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | settings))


@pytest.mark.parametrize(("lie", "said"), LIES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "adapter_config.json"])
def test_a_number_that_no_model_has_is_refused(model: Path, name: str, lie: dict[str, Any], said: str) -> None:
    change(model / name, **lie)
    with pytest.raises(UserError) as caught:
        checked(model)
    assert said in caught.value.what
    assert caught.value.where == str(model / name)


def test_settings_that_are_nested_without_end_are_refused(model: Path) -> None:
    nested: dict[str, Any] = {}
    for _ in range(MOST_CONFIG_DEPTH + 1):
        nested = {"text_config": nested}
    change(model / "config.json", **nested)
    with pytest.raises(UserError, match="nested deeper than"):
        checked(model)


def test_what_models_do_say_is_taken(model: Path) -> None:
    change(model / "tokenizer_config.json", model_max_length=10**30)
    change(model / "config.json", time_step_limit=[0.0, float("inf")], vision_feature_layer=-2, rope_theta=10**11)
    change(model / "adapter_config.json", layers_to_transform=None, num_labels=None)
    checked(model)


@pytest.mark.families
def test_no_family_is_refused(tmp_path: Path) -> None:
    """With its default configuration in transformers, where mlx-lm has code for it."""
    names = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)} & set(CONFIG_MAPPING)
    assert len(names) > 50
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG_MAPPING[name]().to_dict(), default=str))
        checked(tmp_path / name)


# --- every way in -------------------------------------------------------------------------------------------------------------------


READERS: list[Callable[[Path], Any]] = [
    lambda folder: load_model(str(folder), "float32"),
    load_tokenizer,
    lambda folder: outline(folder, "float32"),
    Checkpoint.open,
    lambda folder: train(TrainConfig(data=[str(folder / "config.json")], model=str(folder))),
]


@pytest.mark.parametrize("read", READERS)
def test_the_library_passes_the_gate(model: Path, read: Callable[[Path], Any]) -> None:
    put(model, "hf_quant_config.json", device)
    with watchdog(), pytest.raises(UserError, match="not a regular file"):
        read(model)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a run on it, and its rows."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(TINY, folder / "model")
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    settings = {"data": [str(folder / "rows.jsonl")], "model": str(folder / "model"), "out": str(folder / "run")}
    train(TrainConfig(**settings, max_steps=1, quiet=True, target="q_proj", grad_checkpoint="off"))
    return folder


COMMANDS = [
    "train --model MODEL --data ROWS --out NEW", "plan --model MODEL --machine 16GB", "inspect --model MODEL --data ROWS",
    "export --run RUN --to NEW", "export --run RUN --to NEW --format gguf", "convert --model MODEL --to NEW",
    "generate --model MODEL --prompt x", "generate --run RUN --prompt x", "chat --model MODEL", "eval --run RUN --data ROWS",
    "push RUN --repo a/b --dry-run", "generate --model MODEL --adapter RUN/adapter --prompt x",
]  # fmt: skip
OF_A_RUN = [
    "train --resume RUN", "export --run RUN --to NEW --format peft", "generate --run RUN --prompt x", "eval --run RUN --data ROWS",
    "push RUN --repo a/b --dry-run", "adapters merge RUN RUN --to NEW",
]  # fmt: skip


def invoke(command: str, finished: Path, tmp_path: Path) -> str:
    """The output of a command that is refused."""
    places = {
        "MODEL": finished / "model",
        "ROWS": finished / "rows.jsonl",
        "RUN": finished / "run",
        "NEW": tmp_path / "new",
    }
    words = [str(places.get(word, word)).replace("RUN/", f"{places['RUN']}/") for word in command.split()]
    with watchdog():
        result = CliRunner().invoke(main, words, input="x\n", env={"HF_HUB_OFFLINE": "1"})
    assert result.exit_code in (1, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not (tmp_path / "new").exists()
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_passes_the_gate_of_its_model(finished: Path, tmp_path: Path, command: str) -> None:
    path = put(finished / "model", "preprocessor_config.json", pipe)
    try:
        assert str(path) in invoke(command, finished, tmp_path).replace("\n", "")
    finally:
        path.unlink()


@pytest.mark.parametrize("command", OF_A_RUN)
def test_a_command_passes_the_gate_of_its_run(finished: Path, tmp_path: Path, command: str) -> None:
    path = put(finished / "run" / "adapter", "generation_config.json", device)
    try:
        assert str(path) in invoke(command, finished, tmp_path).replace("\n", "")
    finally:
        path.unlink()


def test_the_adapters_of_python_pass_the_gate(finished: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(finished / "run" / "adapter", tmp_path / "adapter"))
    change(adapter / "adapter_config.json", num_layers=10**9)
    for read in (load_adapter, lambda folder: merge_adapters([str(folder), str(folder)], tmp_path / "merged")):
        with pytest.raises(UserError, match="num_layers is 1,000,000,000"):
            read(adapter)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "environment.json", "checkpoints/.replaced-x", "last", "data_report.json"]
)
@pytest.mark.parametrize("what", [pipe, loop])
def test_a_run_with_what_is_no_file_is_refused(
    finished: Path, tmp_path: Path, name: str, what: Callable[[Path], None]
) -> None:
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    path = put(run, name, what)
    for open_run in (RunFolder.open, load_run):
        with watchdog(), pytest.raises(UserError) as caught:
            open_run(run)
        assert caught.value.where == str(path)


def test_what_is_being_written_may_go_while_it_is_looked_at(finished: Path) -> None:
    """A run may be read while it is trained: of what is hidden only the kind matters, and that it is gone does not."""
    half = finished / "run" / ".writing-adapter"
    half.mkdir()
    (half / "adapter_config.json").write_text("{")
    (half / "gone.json").symlink_to("gone")
    try:
        assert RunFolder.open(finished / "run").is_finished
    finally:
        shutil.rmtree(half)


# --- nobody reads beside it ---------------------------------------------------------------------------------------------------------

_LIBRARIES = {
    "from_pretrained", "from_file", "mlx_lm_utils.load_model", "mlx_lm_utils.load", "mlx_lm_utils.load_config", "load_adapters", "mx.load",
    "safe_open", "load_file", "fromfile", "memmap", "load_dataset", "load_from_disk", "ParquetFile", "spec_from_file_location", "copyfile",
    "copytree", "copy2",
}  # fmt: skip
"""Functions of other libraries that open what they are given by name."""

_OWN = {"read_text", "read_bytes", "open", "fdopen", "FileIO"}
"""Python's own."""

_CHECKED_BEFORE = {
    "writing.py copy_file source.open": "regular files of a folder that `Checkpoint.open` or `side_files` has checked",
    "model/translate.py _own_code spec_from_file_location": "its one caller has checked the folder",
    "safetensors_file.py open_safetensors safe_open": "`open_regular` has opened it just before",
    "safetensors_file.py _read fromfile": "`open_safetensors` has opened it before",
    "data/cache.py _mapped memmap": "`open_store` has read its checksum through `open_regular`",
    "data/readers.py _parquet path.open": "`sources.reader_for` takes regular files only",
    "data/readers.py _parquet ParquetFile": "`sources.reader_for` takes regular files only",
    "convert/publish.py _refuse_home file.read_text": "what this export has just written",
    "convert/targets/mlx_lm.py _open load_adapters": "what this export has just written",
    "methods/adapter_check.py _opened_by_mlx_lm load_adapters": "`checked` stands in its second argument",
    "convert/targets/gguf/comparison.py _check_head path.open": "what llama.cpp has just written",
}  # fmt: skip

_NO_FOLDER_OF_OTHERS = {
    "data/sources.py rows load_dataset": "a data set of the Hub, by its name",
    "data/cache.py _module_digest Path(file).read_bytes": "this program's code",
    "launch.py own_rank hosts.read_text": "written by what started this process, and a regular file",
    "data/chat_template.py template_text (_NAMED / f'{given}.jinja').read_text": "comes with this package",
    "web_page.py _text file.read_text": "comes with this package",
    "charts.py  Path(__file__).with_name(f'charts.{kind}').read_text": "comes with this package",
    "report/page.py  (_HERE / 'live.js').read_text": "comes with this package",
    "training/notebook.py  Path(__file__).with_suffix('.css').read_text": "comes with this package",
    "convert/targets/trl/target.py write (_FILES / 'train.py.template').read_text": "comes with this package",
    "convert/targets/trl/target.py write (_FILES / 'requirements.txt').read_text": "comes with this package",
    "convert/targets/trl/target.py _readme (_FILES / 'README.md').read_text": "comes with this package",
    "convert/targets/gguf/converter.py interpreter self.script.open": "a person's own llama.cpp",
    "training/machine.py _text file.read_text": "what the system says of itself",
}


def calls_in(file: Path) -> list[tuple[str, ast.Call]]:
    """Each call with the name of the function that it stands in; none where no word of a reader stands in the file."""
    text = file.read_text(encoding="utf-8")
    if not any(f"{name.rpartition('.')[2]}(" in text for name in _LIBRARIES | _OWN):
        return []
    tree = ast.parse(text)
    within: dict[ast.Call, str] = {call: "" for call in ast.walk(tree) if isinstance(call, ast.Call)}
    for function in (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    ):  # the outer before the inner
        within |= {call: function.name for call in ast.walk(function) if isinstance(call, ast.Call)}
    return [(function, call) for call, function in within.items()]


def is_reader(call: ast.Call) -> bool:
    last = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if last in _LIBRARIES:
        return True
    if last not in _OWN:
        return last.startswith("load") and ast.unparse(call.func) in _LIBRARIES
    name = ast.unparse(call.func)
    if name.endswith(("Checkpoint.open", "RunFolder.open", "os.open", "_lines.open")) or name in (
        "read_text",
        "read_bytes",
    ):
        return False  # ours, or writers' and checked by their own test
    modes = [node.value for node in call.args[:2] if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return not any(set("wax") & set(mode) for mode in modes)


def test_every_reader_of_a_folder_passes_the_gate() -> None:
    found: dict[str, bool] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for function, call in calls_in(file):
            if is_reader(call) and file.name != "files.py":
                given = ast.unparse(call.args[0]) if call.args else ""
                name = ast.unparse(call.func)
                short = name.rpartition(".")[2] if name.rpartition(".")[2] in _LIBRARIES else name
                found[f"{file.relative_to(PACKAGE)} {function} {short}"] = given.startswith(
                    ("checked(", "checked_tokenizer(")
                )
    beside = {reader for reader, passes in found.items() if not passes}
    assert beside == {*_CHECKED_BEFORE, *_NO_FOLDER_OF_OTHERS}
    assert sum(found.values()) >= 4  # transformers twice, mlx-lm twice


# --- tokenizers ---------------------------------------------------------------------------------------------------------------------


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": replace("e", "e" * 1000)},
        {"normalizer": sequence(*[replace("e", "ee")] * 9)},
        {"normalizer": sequence(*[replace("(?=e)", "e", "Regex")] * 9)},
        {"normalizer": replace("", "x" * 300)},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
        {"decoder": replace("e", "e" * 1000)},
        {"added_tokens": [{"id": 2**31, "content": "far"}]},
        {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, "far": 10**9}}},
        {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": -1}}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}],
                "pair": [],
                "special_tokens": {"x": {"id": "x", "ids": [1] * 2000, "tokens": ["x"] * 2000}},
            }
        },
    ],
)
def test_a_tokenizer_that_makes_much_of_little_is_refused(model: Path, part: dict[str, Any]) -> None:
    change(model / "tokenizer.json", **part)
    with (
        watchdog(),
        pytest.raises(UserError, match=r"times as long|tokens around every text|a token of the number") as caught,
    ):
        load_tokenizer(model)
    assert caught.value.where == str(model / "tokenizer.json")


def test_what_tokenizers_do_replace_is_taken(model: Path) -> None:
    usual = [replace(" ", "▁"), {"type": "Prepend", "prepend": "▁"}, replace("``", '"'), replace(" {2,}", "▁", "Regex")]
    change(model / "tokenizer.json", normalizer=sequence(*usual))
    checked_tokenizer(model)


@pytest.mark.parametrize(
    ("part", "fails"),
    [
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "(a+)+$"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            BrokenTokenizer,
        ),
        ({"normalizer": replace("(a|aa)+$", "b", "Regex")}, BrokenTokenizer),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, BrokenTokenizer),
        ({"model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}}, UserError),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}}, UserError),
    ],
    ids=str,
)
def test_a_tokenizer_that_fails_is_named(
    model: Path, tmp_path: Path, part: dict[str, Any], fails: type[UserError]
) -> None:
    """What panics ends the reading at once: the rows behind would take as long each."""
    rows = tmp_path / "rows.jsonl"
    turn = {"role": "user", "content": "a" * 60 + "b"}
    rows.write_text((json.dumps({"messages": [turn, {"role": "assistant", "content": "b"}]}) + "\n") * 3)
    change(model / "tokenizer.json", **part)
    tokenizer = load_tokenizer(model)
    with watchdog(60), pytest.raises(fails, match=rf"the tokenizer.json of {model} fails on a text") as caught:
        prepare(TrainConfig(data=[str(rows)], data_cache=False), tokenizer)
    assert f"{rows}:1" in str(caught.value)
    assert caught.value.hint


def test_a_tokenizer_that_panics_when_it_is_loaded_is_refused(model: Path) -> None:
    change(model / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(UserError, match="cannot load its tokenizer: Precompiled"):
        load_tokenizer(model)


class Panics:
    """A decoder as tokenizers would have it give up."""

    name_or_path = "there"

    def decode(self, *_: object, **__: object) -> str:
        raise type("PanicException", (BaseException,), {})("index out of bounds")


def test_a_decoder_that_panics_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_sft.data.tokenizer.unwrapped", lambda tokenizer: tokenizer)
    with pytest.raises(BrokenTokenizer, match=r"the tokenizer.json of there fails on a text: index out of bounds"):
        decoded(Panics(), [1])


def test_a_tokenizer_without_a_token_for_the_unknown_ends_generating_in_words(model: Path) -> None:
    """What it raises is a bare `Exception`, within mlx-lm."""
    change(model / "tokenizer.json", model={"type": "WordLevel", "unk_token": "[NONE]", "vocab": {"a": 0}})
    with pytest.raises(UserError, match=r"fails on a text: WordLevel error: Missing \[UNK\] token"):
        generate_text(load_model(str(model)), "Hello", max_tokens=1)


def test_the_prompt_of_a_tokenizer_that_panics_is_refused(model: Path) -> None:
    change(model / "tokenizer.json", pre_tokenizer={"type": "FixedLength", "length": 0})
    with pytest.raises(BrokenTokenizer, match="fails on a text"):
        generate_text(load_model(str(model)), "Hello", max_tokens=1)
