"""A GGUF export is the merged checkpoint, as llama.cpp's own package reads it; or it is not there."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from mlx_sft import UserError, export
from mlx_sft.model.weights import Checkpoint
from mlx_sft.safetensors_file import STORED_AS, read_float32
from tests.ollama import rendered

MakeLlamaCpp = Callable[..., Path]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def changed(base: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a checkpoint with other settings of its tokenizer."""
    shutil.copytree(base, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def numbers(tensor: gguf.ReaderTensor) -> np.ndarray:
    kind = tensor.tensor_type.name
    data = tensor.data.view(STORED_AS[kind]).astype(np.float32)
    return data.reshape([int(length) for length in reversed(tensor.shape)])


@pytest.mark.parametrize(
    ("family", "dtype", "tied", "shard"),
    [
        ("qwen3", "F32", True, "5GB"),
        ("qwen3", "BF16", False, "60KB"),
        ("llama", "F16", False, "5GB"),
        ("llama", "F32", True, "5GB"),
        ("qwen2", "BF16", True, "5GB"),
    ],
)
def test_the_file_is_the_merged_checkpoint(
    family: str, dtype: str, tied: bool, shard: str, tmp_path: Path, make_base: Any, make_run: Any,
    make_llama_cpp: MakeLlamaCpp,
) -> None:  # fmt: skip
    run = make_run(make_base(family, tied=tied, dtype=DTYPES[dtype], shard=shard))
    merged = Checkpoint.open(export(run.path, tmp_path / "merged", verify=False).path)

    result = export(run.path, tmp_path / "my-model", format="gguf", llama_cpp=make_llama_cpp())

    assert sorted(path.name for path in result.path.iterdir()) == ["LICENSE", "model.gguf"]
    assert result.verification is not None
    reader = gguf.GGUFReader(result.path / "model.gguf")
    assert reader.get_field("general.architecture").contents() == family
    assert reader.get_field("general.name").contents() == "my-model"
    written = {tensor.name: tensor for tensor in reader.tensors}
    assert len(written) == len(merged.tensors)
    assert result.notes == (
        f"model.gguf: {family} of 2 layers, {len(written)} of its {len(written)} tensors compared with the checkpoint's",
    )
    down = written["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == dtype
    np.testing.assert_array_equal(numbers(down), read_float32(merged.tensors["model.layers.1.mlp.down_proj.weight"]))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("swapped", "blk.1.ffn_gate.weight does not hold the numbers of model.layers.1.mlp.gate_proj.weight"),
        ("changed", "blk.1.ffn_gate.weight does not hold the numbers"),
        ("nan", "output_norm.weight has numbers that are not finite"),
        ("missing", "it lacks blk.1.ffn_gate.weight, which is model.layers.1.mlp.gate_proj.weight"),
        ("shape", "blk.1.ffn_gate.weight is [64, 96], and [96, 64] in the checkpoint"),
        ("vocabulary", "it has 263 tokens, and embeddings of 264"),
        ("garbage", "what llama.cpp's converter wrote is not a GGUF file"),
        ("cut short", "it has 5,000 bytes, too few"),
        ("truncated", "llama.cpp's own package cannot read what its converter wrote"),
        ("silent", "said that all went well, and wrote no file"),
        ("fails", "failed (exit code 3):\nINFO: reading\nModel FooForCausalLM is not supported"),
        ("packages", "No module named 'torch'"),
    ],
)
def test_what_goes_wrong_is_named_and_nothing_is_written(
    mode: str, message: str, tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    run, llama_cpp = make_run(make_base(tied=True)), make_llama_cpp(mode)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        export(
            run.path, tmp_path / "out", format="gguf", llama_cpp=llama_cpp, verify=mode in ("swapped", "changed", "nan")
        )
    assert message in caught.value.what
    assert caught.value.hint
    assert sorted(tmp_path.iterdir()) == before


def test_packages_that_the_converter_lacks_are_said_with_the_command_that_installs_them(
    tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    llama_cpp = make_llama_cpp("packages")
    with pytest.raises(UserError) as caught:
        export(make_run(make_base()).path, tmp_path / "out", format="gguf", llama_cpp=llama_cpp, verify=False)
    assert f"-m pip install -r {llama_cpp}/requirements/requirements-convert_hf_to_gguf.txt" in caught.value.hint


def test_a_tokenizer_that_llama_cpp_does_not_know_is_told_by_its_line_and_not_to_update(
    tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    llama_cpp = make_llama_cpp("tokenizer")
    with pytest.raises(UserError, match="does not know this model's tokenizer") as caught:
        export(make_run(make_base()).path, tmp_path / "out", format="gguf", llama_cpp=llama_cpp, verify=False)
    assert f"chkhsh: {'0123456789abcdef' * 4}" in caught.value.what
    assert "get_vocab_base_pre()" in caught.value.hint
    assert "update" not in caught.value.hint
    assert "--format merged" in caught.value.hint


def test_the_embedded_model_is_told_apart_before_anything_is_done(
    tmp_path: Path, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(Path("tiny"), method="full")
    (run.path / "weights").mkdir()
    with pytest.raises(UserError, match="does not know the tokenizer of the embedded model `tiny`"):
        export(run.path, tmp_path / "out", format="gguf", llama_cpp=tmp_path / "no-folder")
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_header_and_the_size_are_checked_and_that_is_said(
    tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    run = make_run(make_base())
    result = export(run.path, tmp_path / "out", format="gguf", llama_cpp=make_llama_cpp("swapped"), verify=False)
    assert result.notes == (
        "model.gguf: only its header and size were checked; pip install 'mlx-sft[gguf]' has each tensor compared",
    )
    short = make_llama_cpp("cut short", name="other")
    with pytest.raises(UserError, match="too few"):
        export(run.path, tmp_path / "short", format="gguf", llama_cpp=short, verify=False)


def test_an_architecture_that_the_package_does_not_know_is_said(
    tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    llama_cpp = make_llama_cpp("unknown")
    result = export(make_run(make_base()).path, tmp_path / "out", format="gguf", llama_cpp=llama_cpp, verify=False)
    assert "does not know 'of-tomorrow'" in result.notes[0]


@pytest.mark.usefixtures("no_llama_cpp")
def test_without_llama_cpp_the_commands_that_do_the_same_are_printed(
    cli: Callable[..., Any], tmp_path: Path, make_base: Any, make_run: Any
) -> None:
    run, target = make_run(make_base(dtype=torch.bfloat16)), tmp_path / "my model"
    before = sorted(tmp_path.iterdir())
    result = cli("export", "--run", run.path, "--to", target, "--format", "gguf")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "--llama-cpp DIR" in result.stderr
    commands = [shlex.split(line) for line in result.stderr.splitlines() if line.startswith("  ")]
    assert commands[-2:] == [
        ["mlx-sft", "export", str(run.path), "--out", f"{target}-merged"],
        *[["python3", "llama.cpp/convert_hf_to_gguf.py", f"{target}-merged", "--outfile", f"{target}.gguf",
           "--outtype", "bf16"]],
    ]  # fmt: skip
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("no_llama_cpp")
@pytest.mark.parametrize("place", ["PATH", "LLAMA_CPP_DIR", "home", "its bin"])
def test_llama_cpp_is_found_where_it_usually_is(
    place: str, cli: Callable[..., Any], tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = make_run(make_base())
    folder = make_llama_cpp(name="home/llama.cpp" if place == "home" else "elsewhere")
    options = ["--no-verify", "--format", "gguf"]
    if place == "its bin":
        (folder / "bin").mkdir()
        (folder / "convert_hf_to_gguf.py").rename(folder / "bin" / "convert_hf_to_gguf.py")
        options += ["--llama-cpp", str(folder)]
    elif place != "home":
        monkeypatch.setenv(place, str(folder))
    result = cli("export", "--run", run.path, "--to", tmp_path / "out", *options)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}\n"), result.stderr
    assert "tensors compared" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "gguf", "--llama-cpp", "nowhere"], "there is no convert_hf_to_gguf.py in this folder"),
        (["--llama-cpp", "nowhere"], "--llama-cpp goes with --format gguf"),
        (["--format", "peft", "--ollama"], "--ollama goes with --format gguf"),
    ],
)
def test_options_that_cannot_be_are_usage_errors(
    options: list[str], message: str, cli: Callable[..., Any], tmp_path: Path, make_base: Any, make_run: Any
) -> None:
    result = cli("export", "--run", make_run(make_base()).path, "--to", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_code_of_a_model_is_not_handed_to_the_converter(
    tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    run = make_run(changed(make_base(), tmp_path / "base", auto_map={"AutoTokenizer": ["x.Y", None]}))
    with pytest.raises(UserError, match="names Python code of its own") as caught:
        export(run.path, tmp_path / "out", format="gguf", llama_cpp=make_llama_cpp(), verify=False)
    assert "--trust-remote-code" in caught.value.hint


def test_ollama_gets_a_modelfile_beside_it(
    cli: Callable[..., Any], tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    run = make_run(make_base())
    options = ["--format", "gguf", "--ollama", "--llama-cpp", make_llama_cpp(), "--no-verify"]
    result = cli("export", "--run", run.path, "--to", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["LICENSE", "Modelfile", "model.gguf"]
    assert (tmp_path / "out" / "Modelfile").read_text() == (
        "# Made by mlx-sft. In this folder: ollama create NAME -f Modelfile\n"
        "# Ollama follows this TEMPLATE, as the chat template in the GGUF file has neither tools nor reasoning.\n"
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}{{ if not $last }}<|im_end|>\n{{ end }}{{ end }}'
        '{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant\n{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_the_file_says_whether_ollama_begins_a_prompt_by_itself(
    tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    run = make_run(changed(make_base(), tmp_path / "base", bos_token="<|im_start|>"))
    for mode, beginning in (("bos", ""), ("", "<|im_start|>")):
        llama_cpp = make_llama_cpp(mode, name=f"llama.cpp {mode}")
        to = tmp_path / f"out {mode}"
        export(run.path, to, format="gguf", llama_cpp=llama_cpp, ollama=True, verify=False)
        written = rendered((to / "Modelfile").read_text(), [{"role": "user", "content": "Hi"}])
        assert written == f"{beginning}user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_ollama_follows_a_template_with_tools_that_the_file_must_then_hold(
    tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    base = changed(make_base(), tmp_path / "base")
    template = base / "chat_template.jinja"
    template.write_text("{% if tools %}{{ tools }}{% endif %}" + template.read_text())
    run = make_run(base)
    result = export(run.path, tmp_path / "out", format="gguf", llama_cpp=make_llama_cpp(), ollama=True, verify=False)
    assert 'TEMPLATE "' not in (result.path / "Modelfile").read_text()
    assert "REQUIRES 0.30.11\n" in (result.path / "Modelfile").read_text()
    assert "0.30.11 or later is needed" in result.notes[1]
    other = make_llama_cpp("template", name="other")
    with pytest.raises(UserError, match="is not the tokenizer's") as caught:
        export(run.path, tmp_path / "again", format="gguf", llama_cpp=other, ollama=True, verify=False)
    assert "leave out --ollama" in caught.value.hint
    assert not (tmp_path / "again").exists()
    assert export(run.path, tmp_path / "plain", format="gguf", llama_cpp=other, verify=False).notes


def test_a_template_that_ollama_cannot_follow_is_refused_before_anything_is_merged(
    tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: MakeLlamaCpp
) -> None:
    base = changed(make_base(), tmp_path / "base")
    (base / "chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message.role }}:{{ loop.index }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    run, llama_cpp = make_run(base), make_llama_cpp("fails")
    with pytest.raises(UserError, match="cannot be put in Ollama's form exactly") as caught:
        export(run.path, tmp_path / "out", format="gguf", llama_cpp=llama_cpp, ollama=True)
    assert "leave out --ollama" in caught.value.hint
    assert not (tmp_path / "out").exists()
