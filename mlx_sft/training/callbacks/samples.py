"""`samples.jsonl`: what the model answers to a few prompts before the first step and at each evaluation, so that it can be read.

Answers are greedy, so that the same model gives the same, and short. They take a bounded part of the time, and say what they leave out.
Whatever goes wrong with them ends the samples and not the run. A checkpoint knows how long the file was: a run that goes on from it, or
goes back to it, writes the rest anew.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError
from mlx_sft.settings import OnResume, Settings, parse_duration
from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from mlx_sft.training.callbacks.kept_lines import KeptLines

if TYPE_CHECKING:
    from mlx_sft.data.prepare import PreparedData
    from mlx_sft.data.sample_prompts import SamplePrompt

HELD_OUT, OF_FILE = 4, 32
"""Prompts, where their number is not given."""
_LONGEST = 512
"""Tokens of a prompt, or as many as the longest row has that is trained on: its gradient takes more memory than an answer."""
_FREE, _SHARE = 10.0, 0.05
"""Seconds, and a part of the time since the run began, that answers between the first and the last evaluation may take together."""
_AT_ONCE = 60.0
"""Seconds that those of one evaluation may take; with --for no more than that part of it."""
_SHOWN = 60
"""Characters of a prompt and of an answer in the terminal."""


class SamplesSettings(Settings):
    """Settings of the samples."""

    samples: Annotated[int | None, OnResume.FREE] = Field(default=None, ge=0)
    """Prompts that the model answers before the first step and at each evaluation, into samples.jsonl and the page: the first so many of
    --sample-prompts (32 where not given), or of held-out rows (4 where not given); 0 for none."""
    sample_prompts: Annotated[str | None, OnResume.FREE] = None
    """Prompts for the samples, instead of held-out rows: a .txt file with one a line, or rows in any form that the run takes."""
    sample_tokens: Annotated[int, OnResume.FREE] = Field(default=64, ge=1)
    """Tokens after which an answer of the samples is cut."""

    @field_validator("sample_prompts")
    @classmethod
    def _from_anywhere(cls, value: str | None) -> str | None:
        """By its full path, so that the run goes on from anywhere."""
        from mlx_sft.data.sources import full_path  # which what has only settings to read can do without

        return None if value is None else full_path(value)


class Samples(Callback):
    """The callback `samples`."""

    name: ClassVar = "samples"
    Settings: ClassVar = SamplesSettings

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._prompts: list[SamplePrompt] = []
        self._too_long = self._longest = 0
        self._lines = KeptLines()
        self._goes_on = self._has_base = self._told = False
        self._began = time.monotonic()
        self._spent = self._last = 0.0
        """Seconds that all answers took since the first, and those of the last evaluation."""

    def check(self, config: TrainConfig, data: PreparedData) -> None:
        from mlx_sft.data.sample_prompts import first_of, prompts_in, prompts_of  # as above

        file, most = self.settings.sample_prompts, self.settings.samples
        if most == 0 or (file is None and not data.valid):
            return
        self._longest = min(config.max_length, max(_LONGEST, int(data.train.needed_lengths.max())))
        if file is not None:
            found = prompts_in(file, config, data.tokenizer)
            self._prompts, self._too_long = first_of(found, most or OF_FILE, self._longest)
            if not self._prompts:
                what = f"each of its prompts has more than {self._longest} tokens"
                raise UserError(what, where=file, hint="give shorter ones, or leave --sample-prompts out")
        else:
            found = prompts_of(data.valid, config, data.tokenizer)
            self._prompts = first_of(found, most or HELD_OUT, self._longest)[0]

    def on_start(self, run: TrainingRun, record: Record) -> None:
        self._began = time.monotonic()
        if not self._prompts:
            return
        self._lines.open(run.folder.samples)
        if self._too_long:
            run.console.note(f"samples: {self._too_long} prompts are left out, of more than {self._longest} tokens")
        if not self._has_base and not (self._goes_on and run.step):
            self._sample(run, base=True)
            self._spent = 0.0
        self._has_base = True

    def on_evaluation(self, run: TrainingRun, record: Record) -> None:
        if not self._prompts:
            return
        may_take = _FREE + _SHARE * (time.monotonic() - self._began)
        if record["step"] < run.total_steps and self._spent + self._last > may_take:
            if not self._told:
                self._told = True
                run.console.note(
                    f"samples are left out now and then: those of an evaluation take {self._last:.0f} s, and all may take "
                    f"{_SHARE:.0%} of the time (--samples asks for fewer, --sample-tokens for shorter ones)"
                )
            return
        self._sample(run)

    def _sample(self, run: TrainingRun, *, base: bool = False) -> None:
        """Write the answers to all prompts, as far as there is time, once all of them are there."""
        started, limit = time.monotonic(), run.config.time_limit
        at_once = min(_AT_ONCE, _SHARE * parse_duration(limit)) if limit is not None else _AT_ONCE
        found: list[Record] = []
        try:
            for number, prompt in enumerate(self._prompts, 1):
                if time.monotonic() - started >= at_once:
                    break
                answer, is_cut = self._answer(run, prompt, started + at_once, base=base)
                found.append(
                    {
                        "step": run.step, "base": base, "number": number, "origin": prompt.origin, "prompt": prompt.text,
                        "wanted": prompt.wanted, "answer": answer, "cut": is_cut,
                    }
                )  # fmt: skip
        except UserError as error:
            self._prompts = []
            run.console.warn(f"there are no samples from here on: {error.what}")
            return
        self._last = time.monotonic() - started
        self._spent += self._last
        self._lines.write(found, "a sample")
        for sample in [] if base else found[:HELD_OUT]:
            run.console.note(f"  {_short(sample['prompt'], end=True)} → {_short(sample['answer'])}")
        if left := len(self._prompts) - len(found):
            run.console.note(f"samples: {left} of {len(self._prompts)} prompts are left out after {self._last:.0f} s")
            if base:  # what has no answer of before says little later
                self._prompts = self._prompts[: len(found)]

    def _answer(self, run: TrainingRun, prompt: SamplePrompt, until: float, *, base: bool) -> tuple[str, bool]:
        """The answer, and whether it was cut."""
        answer, is_cut = "", True
        run.check_stop()
        with closing(run.writes(prompt.token_ids, self.settings.sample_tokens, base=base)) as pieces:
            for text, end in pieces:
                answer, is_cut = answer + text, end != "stop"
                run.check_stop()
                if time.monotonic() >= until:
                    break
        return answer, is_cut

    def state(self) -> dict[str, Any]:
        """Nothing, until the base has answered."""
        return self._lines.state() if self._has_base else {}

    def load_state(self, state: dict[str, Any]) -> None:
        self._goes_on, self._has_base = True, "bytes" in state
        self._lines.load_state(state)

    def close(self) -> None:
        self._lines.close()


def _short(text: str, *, end: bool = False) -> str:
    """A text on one line: its beginning, or its end."""
    words = " ".join(text.split())
    if len(words) <= _SHOWN:
        return words
    return f"…{words[-_SHOWN:]}" if end else f"{words[:_SHOWN]}…"
