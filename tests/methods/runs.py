"""What every method whose result stands beside the model is tried with: some rows, and what its run must do."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sft import TrainConfig, UserError, export, generate_text, load_run, train
from mlx_sft.chat import Chat
from mlx_sft.load import AdaptedModel
from mlx_sft.model.head import SplitModel

ROWS: list[dict[str, list[int]]] = [
    {"input_ids": list(range(9, 9 + length)), "labels": [-100] * 2 + list(range(11, 9 + length))}
    for length in (7, 12, 5, 9)
]
WORDS = "the cat sat on the mat"


def logits_of(loaded: AdaptedModel, asked: list[int]) -> mx.array:
    """[tokens, vocabulary], as training computes them."""
    split = SplitModel(loaded.model)
    split.run_body = loaded.method.run_body
    return split.logits(split.hidden_states(mx.array([asked]))[0])


def check_talk(run: Path) -> None:
    """A talk takes what was trained off the model, and puts it on again."""
    loaded = load_run(run)
    plain, tuned = (generate_text(load_run(run, base=bare), WORDS, max_tokens=6) for bare in (True, False))
    assert plain != tuned
    talk = Chat(loaded, max_tokens=6)
    for command, expected in (("", tuned), ("/adapter", plain), (f"/adapter {run / 'adapter'}", tuned)):
        if command:
            assert "from here on" in "".join(talk.say(command))
        talk.messages.clear()
        assert "".join(talk.say(WORDS)) == expected


def check_resumes(run: Path, files: Sequence[Path], *steps: int) -> None:
    """A run that was killed before these checkpoints, and so lacks its result and its card too, goes on to the same bytes."""
    whole = [file.read_bytes() for file in files]
    for step in steps:
        shutil.rmtree(run / "checkpoints" / f"step-{step:08}")
    shutil.rmtree(run / "adapter")
    (run / "README.md").unlink()
    train(TrainConfig(resume=str(run)))
    assert [file.read_bytes() for file in files] == whole


def check_refused(run: Path, refused: dict[str, str], way_out: str, to: Path) -> None:
    """Each of these forms is refused for what it says, with a way out, and nothing is written."""
    for form, why in refused.items():
        with pytest.raises(UserError, match=why) as error:
            export(run, to / form, format=form)
        assert way_out in str(error.value.hint)
        assert not (to / form).exists()
