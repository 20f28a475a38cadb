from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

import mlx_sft
from mlx_sft.common_settings import option_name
from mlx_sft.config import TrainConfig, all_fields, owners_of
from mlx_sft.data import encode_conversation
from mlx_sft.errors import INTERRUPTED, USAGE
from mlx_sft.training import loop
from tests.processes import options_of, wait_for_lines

Cli = Callable[..., Any]

SPECIAL: dict[str, tuple[list[str], Any]] = {
    "data": (["x"], ["x"]),
    **{
        name: (["x"], "x")
        for name in ("valid", "model", "add_tokens", "init_adapter", "out", "resume", "resume_from_peft", "run_from")
    },
    **{name: (["0.5"], 0.5) for name in ("valid_fraction", "warmup", "dropout", "momentum", "beta1")},
    "decay_rate": (["-0.7"], -0.7),
    "label_smoothing": (["0.1"], 0.1),
    "format": (["text"], "text"),
    "method": (["full"], "full"),
    "optimizer": (["lion"], "lion"),
    "columns": (["user=question, assistant=answer"], {"user": "question", "assistant": "answer"}),
    "roles": (["narrator=system,hero=assistant"], {"narrator": "system", "hero": "assistant"}),
    "target": (["q_proj,v_proj"], ["q_proj", "v_proj"]),
    "eval_every": (["7"], 7),
    "save_every": (["epoch"], "epoch"),
    "memory_limit": (["12GB"], "12GB"),
    "quantize": (["mxfp4"], "mxfp4"),
    "rank_pattern": (["down_proj=32,q_proj=8"], {"down_proj": 32, "q_proj": 8}),
    "alpha_pattern": (["down_proj=0.5"], {"down_proj": 0.5}),
    "layers": (["last:2, 0"], "last:2,0"),
    "also_train": (["embed_tokens,lm_head"], ["embed_tokens", "lm_head"]),
    "train_new_tokens": ([], True),
    "betas": (["0.5", "0.6"], (0.5, 0.6)),
    "time_limit": (["45m"], "45m"),
    "overlong": (["drop"], "drop"),
    "prompt_init": (["text:be brief"], "text:be brief"),
    "prefix_init": (["cartridge:a.txt"], "cartridge:a.txt"),
    "chat_template": (["chatml"], "chatml"),
    "report_to": (["tensorboard,wandb"], ["tensorboard", "wandb"]),
    "chat_template_kwargs": (['{"enable_thinking": false}'], {"enable_thinking": False}),
    "general_data": (["general.jsonl"], "general.jsonl"),
    "sample_prompts": (["prompts.txt"], "prompts.txt"),
}
"""What to type for an option whose kind alone does not say it, and the value that it means."""


GOES_WITH = {
    "nesterov": ["--momentum", "0.5"],
    "label_smoothing": ["--dpo-loss", "robust"],
    "simpo_gamma": ["--dpo-loss", "simpo"],
    "encoder_layers": ["--encoder", "lstm"],
    "prefix_hidden": ["--prefix-projection"],
    "lora_plus_embedding_lr": ["--lora-plus-ratio", "16"],
}
"""What else to type where a setting is one of another setting's."""

HAVE_ONE_VALUE = ("objective", "callbacks")
"""Without another package; what one adds is chosen in `test_extending.py`."""


def typed(field: str) -> tuple[list[str], Any]:
    """What to type for a value of a field that is not its default, and the value."""
    info = all_fields()[field]
    if field in SPECIAL:
        words, value = SPECIAL[field]
        return [option_name(field), *words], value
    if info.annotation is bool:
        return (
            (["--no-" + option_name(field).removeprefix("--")], False) if info.default else ([option_name(field)], True)
        )
    if get_origin(info.annotation) is Literal:
        choice = next(value for value in get_args(info.annotation) if value != info.default)
        return [option_name(field), choice], choice
    return [option_name(field), "9"], 9


def _fields(words: list[str]) -> set[str]:
    return {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The configurations that `train` was called with; it does nothing."""
    given: list[TrainConfig] = []

    def train(config: TrainConfig) -> loop.TrainResult:
        given.append(config)
        return loop.TrainResult(Path("runs/x"), 0, None, None, 0)

    monkeypatch.setattr(loop, "train", train)
    return given


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_what_needs_no_library_imports_none(asked: str) -> None:
    """They take seconds to import, and transformers brings PyTorch with it where that is installed."""
    code = (
        "import sys; from mlx_sft.__main__ import main\n"
        "try: main()\n"
        "finally: print({'mlx', 'mlx_lm', 'numpy', 'torch', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True, check=True)
    assert ended.stderr.splitlines()[-1] == "set()"
    assert "mlx-sft" in ended.stdout


@pytest.mark.parametrize("field", [name for name in all_fields() if name not in HAVE_ONE_VALUE])
def test_every_setting_is_an_option_that_arrives(cli: Cli, resolved: list[TrainConfig], field: str) -> None:
    words, value = typed(field)
    choosing = [(kind, name) for kind, name in owners_of(field)[:1] if kind != "callbacks"]
    chosen = [word for kind, name in choosing for word in (option_name(kind), name)]
    also = GOES_WITH.get(field, [])
    result = cli("train", *([] if field == "data" else ["--data", "x"]), *chosen, *words, *also)
    assert result.exit_code == 0, result.output
    arrived = getattr(resolved[0], field)
    assert arrived == value
    assert arrived != type(resolved[0]).model_fields[field].default
    others = resolved[0].model_fields_set - {field, "data", *_fields(also), *(kind for kind, _ in choosing)}
    assert not others, "an option that was not given counts as given"


def test_a_setting_of_what_is_not_chosen_is_an_error_that_names_its_owner(cli: Cli) -> None:
    result = cli("train", "--data", "x", "--method", "full", "--rank", "4")
    assert result.exit_code == USAGE
    assert "rank: a setting of --method lora, and this run has --method full" in result.stderr


def test_help_names_every_option_with_its_default(cli: Cli) -> None:
    text = cli("train", "--help").output
    for field, info in TrainConfig.model_fields.items():
        assert option_name(field) in text
        if isinstance(info.default, str | float) and not isinstance(info.default, bool):
            assert f"[default: {info.default}" in " ".join(text.split())
    assert "--shuffle / --no-shuffle" in text


def test_options_override_the_file(cli: Cli, resolved: list[TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: /a.jsonl\nrank: 4\nshuffle: false\nquiet: true\n")
    cli("train", "--config", tmp_path / "c.yaml", "--rank", "2", "--shuffle")
    assert (resolved[0].data, resolved[0].rank, resolved[0].shuffle, resolved[0].quiet) == (["/a.jsonl"], 2, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "nothing to train on"),
        (["train", "--data", "x", "--rank", "0"], "rank: "),
        (["train", "--data", "x", "--rank", "a"], "--rank"),
        (["train", "--data", "x", "--method", "dora"], "--method"),
        (["train", "--data", "x", "--betas", "0.9"], "--betas"),
        (["train", "--data", "x", "--rnk", "3"], "--rank"),
        (["train", "--data", "x", "stray"], "stray"),
        (["fly"], "fly"),
        (["generate", "--prompt", "x"], "--run"),
        (["generate", "--prompt", "x", "--run", "a", "--model", "b"], "--run"),
        (["generate", "--prompt", "x", "--run", "a", "--max-tokens", "0"], "max_tokens: "),
        (["generate", "--prompt", "x", "--run", "a", "--temperature", "-1"], "temperature: "),
        (["chat"], "--run"),
        (["eval", "--data", "x"], "--run"),
        (["inspect"], "nothing to train on"),
        (["inspect", "--data", "x", "--rank", "3"], "--rank"),
        (["inspect", "--data", "x", "--limit", "-1"], "--limit"),
        (["inspect", "--data", "x", "--html", "y", "--row", "1"], "--html"),
        (["inspect", "--data", "x", "--write-clean", "y.jsonl", "--only", "bad"], "--write-clean"),
        (["inspect", "--data", "x", "--overwrite"], "--write-clean"),
        (["export", "--run", "x"], "--to"),
    ],
)
def test_what_cannot_be_is_a_usage_error(cli: Cli, arguments: list[str], message: str) -> None:
    result = cli(*arguments)
    assert result.exit_code == USAGE
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "export"])
def test_a_folder_that_is_no_run_is_named(cli: Cli, tmp_path: Path, command: str) -> None:
    further = {"generate": ["--prompt", "x"], "eval": ["--data", "x"], "export": ["--to", tmp_path / "to"]}
    result = cli(command, "--run", tmp_path, *further.get(command, []))
    assert result.exit_code == 1
    assert f"error: {tmp_path}: not a run folder" in result.stderr
    assert "hint: " in result.stderr


@pytest.fixture
def run(train_once: Callable[..., Path], settings: dict[str, Any]) -> str:
    """A finished run with validation."""
    return str(shutil.copytree(train_once(valid_fraction=0.2), settings["out"]))


def test_train_ends_stdout_with_the_run_folder_and_says_the_rest_on_stderr(cli: Cli, settings: dict[str, Any]) -> None:
    result = cli("train", *options_of(settings), "--valid-fraction", "0.2")
    assert result.exit_code == 0
    assert result.stdout == settings["out"] + "\n"
    said = result.stderr
    for part in (
        "chats.jsonl:", "<|im_start|>assistant\n⟦", "<|im_end|>⟧", "8 to train on, 2 held out", "% supervised",
        "parameters (lora)", " 4 of 4 conversations", "step 4/4  loss ", " (mean ", "tokens/s", "validation loss", settings["out"],
        "Finished after step 4", "The training loss went from", f"mlx-sft chat {settings['out']}",
    ):  # fmt: skip
        assert part in said


def test_resuming_a_finished_run_says_that_it_is_and_how_it_goes_on(
    cli: Cli, settings: dict[str, Any], run: str
) -> None:
    result = cli("train", "--resume", run)
    assert (result.exit_code, result.stdout) == (0, f"{run}\n")
    told, said = result.stderr.split("\n", 1)  # first of all, and nothing of what a run would train on
    assert said.startswith("Finished after step 4")
    assert (
        told
        == f"this run is finished: its 4 steps are taken; to go on with more: mlx-sft train --resume {run} --epochs 4"
    )
    more = cli(*told.partition("mlx-sft ")[2].split())
    assert "Finished after step 8" in more.stderr
    assert "this run is finished" not in more.stderr


def test_rows_that_were_cut_or_bad_are_counted_before_training(
    cli: Cli, settings: dict[str, Any], chats: Path, tmp_path: Path
) -> None:
    data = tmp_path / "some.jsonl"
    data.write_text(chats.read_text() + "{\n")
    result = cli("train", *options_of(settings | {"data": data}), "--skip-bad-rows", "--max-length", "40")
    report = json.loads((Path(settings["out"]) / "data_report.json").read_text())["totals"]
    assert report["bad"] == 1
    assert report["truncated"] > 0
    assert f"{report['truncated']} truncated" in result.stderr
    assert "1 bad" in result.stderr


def test_json_is_the_only_output(cli: Cli, settings: dict[str, Any]) -> None:
    result = cli("train", *options_of(settings), "--json", "--valid-fraction", "0.2")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.stderr == ""
    assert records[-1] == {"kind": "done", "path": settings["out"]}
    metrics = (Path(settings["out"]) / "metrics.jsonl").read_text().splitlines()
    assert records[:-1] == [json.loads(line) for line in metrics]


def test_quiet_prints_the_run_folder_alone(cli: Cli, settings: dict[str, Any]) -> None:
    result = cli("train", *options_of(settings), "--quiet")
    assert (result.stdout, result.stderr) == (settings["out"] + "\n", "")


def test_a_run_evaluates_on_a_file_with_and_without_what_it_learnt(cli: Cli, run: str, chats: Path) -> None:
    after = json.loads(cli("eval", "--run", run, "--data", chats, "--json").stdout)
    before = json.loads(cli("eval", "--run", run, "--data", chats, "--json", "--base").stdout)
    assert after["loss"] < before["loss"]
    assert after["rows"] == before["rows"] == 10
    plain = cli("eval", "--run", run, "--data", chats).stdout
    assert plain.startswith(f"loss {after['loss']:.4f}  perplexity ")
    assert "(10 rows, " in plain


def test_a_run_and_its_base_answer_as_the_library_does(cli: Cli, run: str, settings: dict[str, Any]) -> None:
    asked = ["--prompt", "the cat", "--max-tokens", "8"]
    answer = cli("generate", "--run", run, *asked).stdout
    base = cli("generate", "--run", run, "--base", *asked).stdout
    assert answer == mlx_sft.generate_text(mlx_sft.load_run(run), "the cat", max_tokens=8) + "\n"
    assert base == cli("generate", "--model", settings["model"], *asked).stdout
    assert base != answer
    assert cli("generate", "--run", run, "--max-tokens", "8", input="the cat").stdout == answer


def test_a_conversation_goes_on_until_the_input_ends(cli: Cli, run: str) -> None:
    result = cli("chat", "--run", run, "--max-tokens", "4", input="the cat\n\nand the dog\n")
    loaded = mlx_sft.load_run(run)
    first = mlx_sft.generate_text(loaded, "the cat", max_tokens=4)
    said = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and the dog"},
    ]
    second = mlx_sft.generate_text(loaded, said, max_tokens=4)
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n{second}\n"


def test_an_export_ends_stdout_with_its_folder(cli: Cli, run: str, tmp_path: Path) -> None:
    result = cli("export", "--run", run, "--to", tmp_path / "merged")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    again = cli("export", "--run", run, "--to", tmp_path / "merged")
    assert again.exit_code in (1, 2)
    assert "--overwrite" in again.stderr


def test_the_api_is_the_documented_one(settings: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    result = mlx_sft.train(TrainConfig(**settings))
    exported = mlx_sft.export(result.run_dir, tmp_path / "merged", verify=False)
    assert (exported.path / "config.json").is_file()
    assert mlx_sft.load_run(result.run_dir).run.path == result.run_dir
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]
    token_ids, mask = encode_conversation(tokenizer, messages)
    assert tokenizer.decode([i for i, supervised in zip(token_ids, mask, strict=True) if supervised]) == "cat<|im_end|>"
    assert set(mlx_sft.__all__) <= {name for name in mlx_sft.__all__ if getattr(mlx_sft, name)}
    with pytest.raises(AttributeError):
        mlx_sft.nothing  # noqa: B018


def test_ctrl_c_ends_a_process_with_the_command_that_goes_on(settings: dict[str, Any]) -> None:
    command = [
        sys.executable,
        "-m",
        "mlx_sft",
        "train",
        *options_of(settings | {"epochs": 100_000}),
        "--save-every",
        "1",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    metrics = Path(settings["out"]) / "metrics.jsonl"
    try:
        wait_for_lines(process, metrics, 3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED == 130
    assert out == b""
    last = err.decode().splitlines()[-2:]
    assert last[0].startswith("error: stopped by SIGINT after step ")
    assert last[0].endswith(", which is saved")
    assert last[1] == f"hint: continue with: mlx-sft train --resume {settings['out']}"
    assert b"Traceback" not in err


def test_ctrl_c_before_the_first_step_is_no_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: TrainConfig) -> loop.TrainResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupted)
    result = cli("train", "--data", "x")
    assert result.exit_code == INTERRUPTED
    assert result.stderr == "error: interrupted\n"


# inspect


def test_inspect_shows_rows_and_a_table_on_stdout_and_trains_nothing(cli: Cli, settings: dict[str, Any]) -> None:
    result = cli("inspect", "--data", settings["data"], "--model", settings["model"], "--limit", 1)
    assert result.exit_code == 0, result.output
    assert f"{settings['data']}:1" in result.stdout
    assert "<|im_end|>⟧" in result.stdout
    assert "supervised" in result.stdout
    assert result.stderr == ""
    assert not Path(settings["out"]).exists()


def test_inspect_writes_one_line_of_json(cli: Cli, settings: dict[str, Any]) -> None:
    result = cli("inspect", "--data", settings["data"], "--model", settings["model"], "--json")
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert found["table"]["rows"]["kept"] == 10
    assert len(found["rows"]) == 3


def test_inspect_writes_a_page_and_names_it_last(cli: Cli, settings: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = cli("inspect", "--data", settings["data"], "--model", settings["model"], "--html", page)
    assert result.stdout == f"{page}\n"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_inspect_writes_clean_rows_says_what_it_changed_and_names_the_file_last(
    cli: Cli, settings: dict[str, Any], tmp_path: Path
) -> None:
    data, clean = tmp_path / "data.jsonl", tmp_path / "clean.jsonl"
    data.write_text('{"prompt": "the cat", "completion": "sat", "id": 1}\n' + "broken\n" * 2)
    given = ("inspect", "--data", data, "--model", settings["model"], "--write-clean", clean)
    result = cli(*given)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{clean}\n"
    assert "1 of 3 rows written, as messages" in result.stderr
    assert f"changed         1  row: id left out (first {data}:1)" in result.stderr
    assert "warning: more than half of the rows are left out, 2 of 3" in result.stderr
    assert [message["role"] for message in json.loads(clean.read_text())["messages"]] == ["user", "assistant"]
    found = json.loads(cli(*given, "--overwrite", "--json").stdout)
    assert (found["path"], found["format"], found["rows"], found["written"]) == (str(clean), "messages", 3, 1)
    assert [one["count"] for one in found["left_out"]] == [2]
    assert {"change": "row: id left out", "count": 1, "first": f"{data}:1"} in found["changes"]


def test_inspect_takes_the_settings_of_a_run(cli: Cli, settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {settings['data']}\nmodel: {settings['model']}\nrank: 3\nmax_length: 5\n")
    found = json.loads(cli("inspect", "--config", file, "--json").stdout)
    assert found["table"]["max_length"] == 5
    assert found["table"]["rows"]["dropped"] + found["table"]["rows"]["truncated"] == 10


def test_several_files_are_mixed_by_weight(cli: Cli, settings: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"text": "the cat {number}"}}\n' for number in range(30)))
    given = options_of(settings | {"epochs": 1, "data": f"{settings['data']}:3"})
    result = cli("train", *given, "--data", f"{other}:1")
    assert result.exit_code == 0, result.output
    assert "an epoch has 30 of the 10 rows of chats.jsonl, 10 of the 30 rows of other.jsonl" in result.stderr
    resumed = cli("train", "--resume", settings["out"])
    assert resumed.exit_code == 0, resumed.output
    refused = cli("train", "--data", settings["data"], "--data", f"{other}:1", "--model", settings["model"])
    assert refused.exit_code == USAGE
