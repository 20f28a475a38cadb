"""What a family keeps otherwise in GGUF is compared all the same."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_sft.convert.targets.gguf.comparison import check_gguf
from mlx_sft.errors import UserError
from mlx_sft.model.weights import Checkpoint

pytestmark = pytest.mark.fast

EMBEDDINGS = "model.embed_tokens.weight"
EXPERT = "model.layers.0.mlp.experts.{}.up_proj.weight"


def written(folder: Path, tensors: dict[str, np.ndarray], tokens: int = 5, architecture: str = "qwen3moe") -> Path:
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_token_list([f"<{number}>" for number in range(tokens)])
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def numbers() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    shapes = {EMBEDDINGS: (6, 4), EXPERT.format(0): (3, 4), EXPERT.format(1): (3, 4)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def checkpoint(tmp_path: Path, numbers: dict[str, np.ndarray]) -> Checkpoint:
    save_file(numbers, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


def test_the_experts_of_a_layer_are_one_tensor_and_rows_without_a_token_may_be_cut_off(
    tmp_path: Path, numbers: dict[str, np.ndarray], checkpoint: Checkpoint
) -> None:
    experts = np.stack([numbers[EXPERT.format(index)] for index in (1, 0)])
    tensors = {"token_embd.weight": numbers[EMBEDDINGS][:5], "blk.0.ffn_up_exps.weight": experts}
    facts = check_gguf(written(tmp_path, tensors), checkpoint)
    assert facts.said == "model.gguf: qwen3moe of 1 layers, 2 of its 2 tensors compared with the checkpoint's"
    assert facts.adds_bos is None


def test_an_expert_that_is_another_is_noticed(
    tmp_path: Path, numbers: dict[str, np.ndarray], checkpoint: Checkpoint
) -> None:
    experts = np.stack([numbers[EXPERT.format(0)], numbers[EXPERT.format(0)]])
    tensors = {"token_embd.weight": numbers[EMBEDDINGS][:5], "blk.0.ffn_up_exps.weight": experts}
    with pytest.raises(
        UserError, match=r"blk\.0\.ffn_up_exps\.weight does not hold the numbers of .*experts\.0\.up_proj"
    ):
        check_gguf(written(tmp_path, tensors), checkpoint)


def test_an_expert_that_is_missing_is_noticed(
    tmp_path: Path, numbers: dict[str, np.ndarray], checkpoint: Checkpoint
) -> None:
    tensors = {
        "token_embd.weight": numbers[EMBEDDINGS][:5],
        "blk.0.ffn_up_exps.weight": numbers[EXPERT.format(0)][None],
    }
    with pytest.raises(UserError, match=r"is \[1, 3, 4\], and 2 times \[3, 4\] in the checkpoint"):
        check_gguf(written(tmp_path, tensors), checkpoint)


def test_the_weight_of_a_convolution_has_no_length_of_one_in_gguf(
    tmp_path: Path, numbers: dict[str, np.ndarray]
) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(4, 1, 3)
    save_file(
        {EMBEDDINGS: numbers[EMBEDDINGS], "model.layers.0.conv.conv.weight": weight}, tmp_path / "model.safetensors"
    )
    checkpoint = Checkpoint.open(tmp_path)
    for shape, fits in (((4, 3), True), ((3, 4), False)):
        tensors = {"token_embd.weight": numbers[EMBEDDINGS], "blk.0.shortconv.conv.weight": weight.reshape(shape)}
        path = written(tmp_path, tensors, tokens=6, architecture="lfm2")
        if fits:
            assert "2 of its 2 tensors compared" in check_gguf(path, checkpoint).said
        else:
            with pytest.raises(UserError, match=r"is \[3, 4\], and \[4, 1, 3\] in the checkpoint"):
                check_gguf(path, checkpoint)
