"""A file's header is checked, and bfloat16 is rounded as PyTorch rounds it."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as torch_file
from safetensors.torch import save_file

from mlx_sft.errors import UserError
from mlx_sft.safetensors_file import (
    from_float32,
    open_safetensors,
    read_arrays,
    read_bytes,
    read_float32,
    read_rows,
    write_arrays,
    write_safetensors,
)


def _file(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def _entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_float_dtype_is_read_exactly(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -2.0, 3e-5], [0.1, 65504.0, -0.0]])
    tensors = {str(dtype): values.to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})

    file = open_safetensors(tmp_path / "x.safetensors")

    assert file.metadata == {"format": "pt"}
    assert {tensor.name for tensor in file.tensors} == set(tensors)
    for tensor in file.tensors:
        expected = tensors[tensor.name].float().numpy()
        np.testing.assert_array_equal(read_float32(tensor), expected)
        np.testing.assert_array_equal(read_rows(tensor, 1, 2), expected[1:2])


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    save_file({"one": torch.tensor(7.0), "none": torch.zeros(0, 3)}, tmp_path / "x.safetensors")

    tensors = {t.name: t for t in open_safetensors(tmp_path / "x.safetensors").tensors}

    assert read_float32(tensors["one"]) == 7.0
    assert read_float32(tensors["none"]).shape == (0, 3)
    assert list(read_bytes(tensors["none"])) == []


def test_rounding_to_bfloat16_is_pytorchs() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (np.arange(2**12, dtype=np.uint32) << 20) | 0x8000
    odd_ties = ties | 0x10000
    nan_below = np.array([0x7F800001, 0xFF80FFFF, 0x7FFFFFFF], np.uint32)
    edges = np.array([0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000000, 0], np.uint32)
    values = np.concatenate([bits, ties, odd_ties, nan_below, edges]).view(np.float32)

    ours = from_float32(values, "BF16").astype(np.float32)

    np.testing.assert_array_equal(ours, torch.tensor(values).bfloat16().float().numpy())
    assert np.isnan(ours[-8:-5]).all()


def test_float16_rounds_as_pytorch_and_overflows_to_infinity() -> None:
    values = np.array([1 / 3, -7e4, 65519.0, 1e-8], np.float32)
    rounded = from_float32(values, "F16")
    np.testing.assert_array_equal(rounded, torch.tensor(values).half().numpy())
    assert np.isinf(rounded[1])


def test_what_is_written_opens_with_the_formats_own_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    b, a = np.arange(6, dtype=np.float32).reshape(2, 3), np.float16([1.0, 2.0])

    write_safetensors(
        path,
        [("b", "F32", (2, 3), 24), ("ä", "F16", (2,), 4)],
        [[b[:1].tobytes(), b[1:].tobytes()], [a.tobytes()]],
        {"format": "pt"},
    )

    loaded = load_file(path)
    np.testing.assert_array_equal(loaded["b"], b)
    np.testing.assert_array_equal(loaded["ä"], a)
    assert [tensor.name for tensor in open_safetensors(path).tensors] == ["b", "ä"]


def test_too_few_bytes_for_a_tensor_are_never_written_silently(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 bytes written, 8 announced"):
        write_safetensors(tmp_path / "x", [("a", "F32", (2,), 8)], [[b"1234"]], {})


@pytest.mark.parametrize(
    ("header", "body", "problem"),
    [
        (b"not json", b"", "invalid JSON"),
        (b"\xff\xfe", b"", "invalid UTF-8"),
        (b"[" * 100_000, b"", "invalid JSON"),
        (b'{"a": 1, "a": 2}', b"", "invalid JSON"),
        (
            b'{"a": %b, "a": %b}' % tuple(json.dumps(_entry(offsets=o)).encode() for o in ((0, 8), (8, 16))),
            bytes(16),
            "invalid offset for tensor `a`",
        ),
        (b'{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', bytes(8), "duplicate field"),
        ([], b"", "invalid JSON"),
        ({"__metadata__": {"format": 1}}, b"", "expected a string"),
        ({"a": 3}, b"", "expected struct TensorInfo"),
        ({"a": {"dtype": "F32"}}, b"", "missing field"),
        ({"a": _entry(dtype="F33")}, bytes(8), "unknown variant `F33`"),
        ({"a": _entry(dtype=["F32"])}, bytes(8), "invalid type: sequence"),
        ({"a": _entry(shape=[-2])}, bytes(8), "integer `-2`, expected usize"),
        ({"a": _entry(shape=[True, 2])}, bytes(8), "boolean `true`, expected usize"),
        ({"a": _entry(shape=[2.0])}, bytes(8), "floating point `2.0`, expected usize"),
        ({"a": _entry(offsets=[0])}, bytes(8), "expected a tuple of size 2"),
        ({"a": _entry(shape=[3])}, bytes(8), "invalid shape"),
        ({"a": _entry(offsets=[8, 0])}, bytes(8), "invalid offset for tensor `a`"),
        ({"a": _entry()}, bytes(7), "not fully covered"),
        ({"a": _entry()}, bytes(9), "not fully covered"),
        ({"a": _entry(), "b": _entry(offsets=[4, 12])}, bytes(12), "invalid offset for tensor `b`"),
        ({"a": _entry(), "b": _entry()}, bytes(16), "invalid offset"),
        ({"a": _entry(), "b": _entry(offsets=[12, 20])}, bytes(20), "invalid offset for tensor `b`"),
        ({"a": _entry(shape=[1] * 99 + [2])}, bytes(8), "a shape that no weight has"),
        ({"a": _entry(shape=[0, 2**63], offsets=[0, 0])}, b"", "a shape that no weight has"),
        ({"a": _entry(shape=[2**40, 2**40])}, bytes(8), "overflow"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, header: object, body: bytes, problem: str) -> None:
    path = _file(tmp_path / "model.safetensors", header, body)
    with pytest.raises(UserError, match=problem) as error:
        open_safetensors(path)
    assert error.value.where == str(path)
    assert error.value.hint


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "header too small"),
        (b"1234567", "header too small"),
        (b"\xff" * 8, "header too large"),
        (b"\xff\xff\0\0\0\0\0\0{}", "invalid header length"),
    ],
)
def test_a_header_that_is_cut_short_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        open_safetensors(path)


def test_a_header_longer_than_any_models_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((10**8 + 8).to_bytes(8, "little"))
        file.truncate(2 * 10**8)
    with pytest.raises(UserError, match="header too large"):
        open_safetensors(path)


def test_of_a_name_given_twice_every_reader_takes_the_same(tmp_path: Path) -> None:
    entries = (json.dumps(_entry(dtype)).encode() for dtype in ("F32", "I32"))
    path = _file(tmp_path / "model.safetensors", b'{"a": %b, "a": %b}' % tuple(entries), bytes(8))
    (tensor,) = open_safetensors(path).tensors
    assert tensor.dtype == "I32"
    assert load_file(path)["a"].dtype == np.int32
    assert mx.load(str(path))["a"].dtype == mx.int32


def test_a_git_lfs_pointer_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(UserError, match="git lfs pull"):
        open_safetensors(path)


def test_a_file_that_is_not_there_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        open_safetensors(tmp_path / "model.safetensors")


def test_a_quantized_tensor_is_not_read_as_weights(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 2, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    [tensor] = open_safetensors(tmp_path / "x.safetensors").tensors
    with pytest.raises(UserError, match="stored as U8"):
        read_float32(tensor)


@pytest.mark.parametrize("header", ['{"a\\ud800": {}}', '{"__metadata__": []}', '{"a": NaN}', '{"a": Infinity}'])
def test_a_header_that_the_formats_own_reader_refuses_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(UserError, match="not a valid safetensors file"):
        open_safetensors(tmp_path / "x.safetensors")


def test_a_file_that_goes_away_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [("a", "F32", (4,), 16)], [[bytes(16)]], {})
    (tensor,) = open_safetensors(path).tensors
    path.unlink()
    for read in (lambda: read_rows(tensor, 0, 4), lambda: list(read_bytes(tensor))):
        with pytest.raises(UserError, match="cannot read") as caught:
            read()
        assert caught.value.where == str(path)


def test_a_file_that_is_cut_short_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [("a", "F32", (4,), 16)], [[bytes(16)]], {})
    (tensor,) = open_safetensors(path).tensors
    path.write_bytes(path.read_bytes()[:-4])
    for read in (lambda: read_rows(tensor, 0, 4), lambda: list(read_bytes(tensor))):
        with pytest.raises(UserError, match="ends within tensor a") as caught:
            read()
        assert caught.value.where == str(path)


def test_arrays_of_numpy_and_mlx_are_written_in_the_order_of_their_names(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    steps = np.array(7, np.uint64)
    write_arrays(tmp_path / "a", {"w": values.T, "step": steps}, {"format": "np"})
    write_arrays(tmp_path / "b", {"step": mx.array(steps), "w": mx.array(values).T}, {"format": "np"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = load_file(tmp_path / "a")
    np.testing.assert_array_equal(loaded["w"], values.T)
    assert loaded["step"] == 7
    again = dict(read_arrays(tmp_path / "b"))
    assert list(again) == ["step", "w"]
    assert all(again[name].dtype == value.dtype for name, value in loaded.items())
    assert all(np.array_equal(again[name], value) for name, value in loaded.items())
    save_file({"w": torch.zeros(2, dtype=torch.float16)}, tmp_path / "d")
    with pytest.raises(UserError, match="w is stored as F16"):
        dict(read_arrays(tmp_path / "d"))
    for wrong in (values.astype(np.float16), mx.array(values).astype(mx.float16)):
        with pytest.raises(ValueError, match="w cannot be written as"):
            write_arrays(tmp_path / "c", {"w": wrong})


def test_bfloat16_of_numpy_and_mlx_is_written_as_it_is(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -2.0, 3e-5], [0.1, float("inf"), -0.0]], dtype=torch.bfloat16)
    of_mlx = mx.array(values.float().numpy()).astype(mx.bfloat16)
    of_numpy = values.float().numpy().astype(ml_dtypes.bfloat16)
    for name, array in (("mlx", of_mlx.T), ("numpy", of_numpy.T)):
        write_arrays(tmp_path / name, {"w": array})
        assert torch.equal(torch_file(tmp_path / name)["w"], values.T)
        (_, again), *_ = read_arrays(tmp_path / name)
        assert mx.array_equal(mx.array(again), of_mlx.T).item()
        assert mx.array(again).dtype == mx.bfloat16
