"""The comparison: trials of all candidates, measurements of what each came to, and the file in which they are kept as they come."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_sft.compare.candidates import Candidate, candidates_of
from mlx_sft.compare.search import Pace, by_loss, halving, steps_within
from mlx_sft.compare.settings import NOT_SHARED, CompareSettings
from mlx_sft.compare.trials import STOPPED, Trial, folder_of, run_trial
from mlx_sft.config import TrainConfig
from mlx_sft.console import Console, duration, many
from mlx_sft.data.dataset import Examples
from mlx_sft.data.prepare import prepare, prepare_file
from mlx_sft.data.sources import full_path
from mlx_sft.data.template import with_todays_variables
from mlx_sft.errors import USAGE, UserError
from mlx_sft.evaluate import bound, evaluate_examples
from mlx_sft.files import disk_errors, folder_bytes, read_json, to_json, user_path
from mlx_sft.gate import checked
from mlx_sft.load import AdaptedModel, load_run
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import checkpoint_fingerprint, extended_tokenizer, resolve_checkpoint
from mlx_sft.model.vocabulary import vocabulary_size
from mlx_sft.model.weights import weight_files
from mlx_sft.run_folder import RunFolder
from mlx_sft.safetensors_file import open_safetensors
from mlx_sft.settings import first_problem
from mlx_sft.training.forgetting import ForgettingMeter, general_rows
from mlx_sft.training.resume import with_full_paths
from mlx_sft.training.schedule import planned_steps
from mlx_sft.writing import remove, write_file

FILE, RUNS = "compare.json", "runs"
_HELD_OUT = 0.1
_MOST_NUMBERS = 2**26
"""Of log-probabilities that are kept of the base: 256 MB, which are 441 positions of Qwen3's vocabulary."""
_PILOT_STEPS = 5
_ON_DISK = ("data", "valid", "model", "chat_template", "add_tokens")


class Figures(BaseModel):
    """What a trained model, or the base, is like.

    Attributes:
        loss: On the rows on which results are measured, in nats.
        exact_match: Share of these rows that greedy decoding gives as they are.
        forgetting: Divergence from the base on general rows, in nats a token.
        bytes: Of the result on the disk.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: float
    exact_match: float
    token_accuracy: float
    forgetting: float = 0.0
    bytes: int = 0


class ComparisonRecord(BaseModel):
    """The comparison as it is kept.

    Attributes:
        settings: What was asked for.
        common: The settings that all runs have.
        steps: Of the last run of each candidate, by its label.
        trials: In the order in which they ended.
        finals: The best of each candidate's longest trials, by its label.
        base, results: What was measured.
        base_parameters: The numbers that the checkpoint of the model has.
        most_steps: What the settings of all runs ask for.
        identity: Hashes of the rows and of the model.
        tested: Rows on which results were measured.
    """

    model_config = ConfigDict(extra="forbid")

    settings: CompareSettings
    common: dict[str, Any]
    steps: dict[str, int] = Field(default_factory=dict)
    trials: list[Trial] = Field(default_factory=list)
    finals: dict[str, Trial] = Field(default_factory=dict)
    base: Figures | None = None
    results: dict[str, Figures] = Field(default_factory=dict)
    base_parameters: int = 0
    most_steps: int = 0
    identity: dict[str, str] = Field(default_factory=dict)
    tested: int = 0


class Comparison:
    """A comparison in its folder.

    ```
    comparisons/x/
      compare.json    what was asked for, every trial and every measurement, as they come
      compare.html    the page
      runs/           the last run of each candidate
    ```
    """

    _tested: Examples
    """The rows on which results are measured."""
    _general: Examples
    """Those by which forgetting is."""

    def __init__(self, path: str | Path, record: ComparisonRecord, console: Console) -> None:
        self.path, self.record, self.console = Path(path), record, console
        self.candidates = candidates_of(record.settings.methods, record.settings.learning_rates)

    @classmethod
    def begun(
        cls, settings: CompareSettings, common: Mapping[str, Any], out: str | Path, console: Console
    ) -> Comparison:
        """A new one, once its data are read.

        Raises:
            UserError: For a folder that holds something, candidates that cannot be trained, and data that cannot be read.
        """
        common = {name: value for name, value in common.items() if value is not None}
        configs = [candidate.config(common) for candidate in candidates_of(settings.methods, settings.learning_rates)]
        if "valid" not in common and common.get("valid_fraction", "auto") == "auto":
            common["valid_fraction"] = _HELD_OUT
            console.note(f"{_HELD_OUT:.0%} of the rows are held out, to choose learning rates by; --valid gives others")
        full = with_full_paths(configs[0])
        common |= {name: getattr(full, name) for name in _ON_DISK if name in common}
        places = {name: full_path(value) for name in ("test", "general_data") if (value := getattr(settings, name))}
        record = ComparisonRecord(settings=settings.model_copy(update=places), common=common)
        comparison = cls(RunFolder.new(out).path, record, console)
        comparison._read()
        RunFolder.create(out)
        comparison._keep()
        return comparison

    @classmethod
    def resumed(cls, path: str | Path, console: Console) -> Comparison:
        """One that was cut short; raises `UserError` for a folder that has none, or whose data or model changed."""
        file = checked(user_path(path)) / FILE
        if not file.is_file():
            hint = "give the folder that `mlx-sft compare` was told to write with --out"
            raise UserError(f"not a comparison: it has no {FILE}", where=str(path), hint=hint, exit_code=USAGE)
        try:
            record = ComparisonRecord.model_validate(read_json(file))
        except ValidationError as error:
            hint = "it was changed, or written by another version; start a new comparison"
            raise UserError(f"it cannot be read: {first_problem(error)}", where=str(file), hint=hint) from error
        comparison, before = cls(file.parent, record, console), dict(record.identity)
        comparison._read()
        if changed := [name for name in before if before[name] != record.identity[name]]:
            what = f"the {' and the '.join(changed)} changed since the comparison began"
            raise UserError(what, where=str(path), hint="put it back as it was, or start a new comparison")
        return comparison

    def _read(self) -> None:
        """What is known before anything is trained: that all rows can be read, how many steps there are, how large the model is."""
        record, settings = self.record, self.record.settings
        path = resolve_checkpoint(self._config.model)
        if variables := with_todays_variables(self._config, self._tokenizer).chat_template_kwargs:
            record.common["chat_template_kwargs"] = variables
        config = self._config
        with self.console.reading() as reading:
            data = prepare(config, self._tokenizer, reading)
            self._tested = (
                data.valid
                if settings.test is None
                else prepare_file(settings.test, config, self._tokenizer, reading)[0]
            )
            self._general = general_rows(config, settings.general_data, self._tokenizer, reading)
        record.most_steps = planned_steps(config, data).total_steps
        record.base_parameters = sum(
            prod(tensor.shape) for file in weight_files(path) for tensor in open_safetensors(file).tensors
        )
        record.identity = {"data": data.report.fingerprint, "model": checkpoint_fingerprint(path)}

    def run(self) -> None:
        """Whatever is left to do.

        Raises:
            UserError: If nothing can be trained on this data, or the time is too short, or it was told to stop.
        """
        try:
            with RunFolder(self.path).locked(self.console.warn):
                self._plan()
                for candidate in self.candidates:
                    self._search(candidate)
                self._refuse_failure()
                self._measure()
        except UserError as error:
            if error.exit_code > STOPPED:
                error.hint = f"continue with: mlx-sft compare --resume {self.path}"
            raise

    def _refuse_failure(self) -> None:
        if not self.record.finals:
            reasons = sorted({one.failed or "no finite loss" for one in self.record.trials})
            what = f"every method failed; {'; '.join(reasons)}"
            raise UserError(what, where=str(self.path), hint="see what `mlx-sft train` says of one of them")

    def _keep(self) -> None:
        write_file(self.path / FILE, to_json(self.record.model_dump(mode="json")))

    # The plan

    @property
    def _config(self) -> TrainConfig:
        """What all candidates have of their data, with the day on which the comparison began; that of the first."""
        return self.candidates[0].config(self.record.common)

    @cached_property
    def _tokenizer(self) -> Any:
        config = self._config
        return extended_tokenizer(resolve_checkpoint(config.model), config.chat_template, config.add_tokens)[0]

    def _plan(self) -> None:
        """How many steps each candidate's last run has."""
        record, settings, most = self.record, self.record.settings, self.record.most_steps
        if record.steps:
            return
        labels = [candidate.label for candidate in self.candidates]
        if settings.budget_minutes is None:
            record.steps = dict.fromkeys(labels, most)
        else:
            began = time.monotonic()
            paces = [self._pace(candidate, min(_PILOT_STEPS, most)) for candidate in self.candidates]
            left = 60 * settings.budget_minutes - (time.monotonic() - began)
            if settings.equal == "tokens":
                record.steps = dict.fromkeys(labels, steps_within(paces, left, most))
            else:
                shares = (steps_within([pace], left / len(paces), most) for pace in paces)
                record.steps = dict(zip(labels, shares, strict=True))
        numbers = sorted(set(record.steps.values()))
        said = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        self.console.note(f"each method trains for {said} of {many(most, 'step')} in its last run")
        self._keep()

    def _pace(self, candidate: Candidate, steps: int) -> Pace:
        """How fast a candidate is, seen in its first trial."""
        trial = self._trial(candidate, candidate.rates[len(candidate.rates) // 2], steps)
        return Pace.of(trial, len(candidate.rates))

    # The search

    def _search(self, candidate: Candidate) -> None:
        record, steps = self.record, self.record.steps[candidate.label]
        if candidate.label in record.finals:
            return
        tried = list(halving(candidate.rates, steps, lambda rate, count: self._trial(candidate, rate, count)))
        final = min(
            (one for one, is_longest in tried if is_longest and one.loss is not None), key=by_loss, default=None
        )
        if final is not None:
            record.finals[candidate.label] = final
        for trial in record.trials:
            if trial.candidate == candidate.label and (final is None or trial.key != final.key):
                folder = folder_of(self.path / RUNS, candidate, trial.rate, trial.steps)
                with disk_errors(folder):
                    if folder.exists():
                        remove(folder)
        self._keep()

    def _trial(self, candidate: Candidate, rate: float, steps: int) -> Trial:
        """That of the record, or else a new one, which is then there."""
        known = next((one for one in self.record.trials if one.key == (candidate.label, rate, steps)), None)
        if known is not None:
            return known
        trial = run_trial(self.path / RUNS, candidate, rate, steps, self.record.common, wall=time.monotonic)
        self.record.trials.append(trial)
        self._keep()
        shown = f"loss {trial.loss:.4f}" if trial.loss is not None else f"failed: {trial.failed or 'no finite loss'}"
        self.console.note(f"{candidate.label}  lr {rate:g}  {many(steps, 'step')}  {shown}  {duration(trial.wall)}")
        return trial

    # What it came to

    def _measure(self) -> None:
        """The base and the last runs, on rows that none of them was trained on."""
        record = self.record
        if record.base is not None and record.results.keys() == record.finals.keys():
            return
        record.tested = len(self._tested)
        folders = {label: self.run_of(label) for label in record.finals}
        self.console.note(f"measuring {many(len(folders), 'result')} and the base on {many(record.tested, 'row')}")
        loaded = load_run(next(iter(folders.values())), base=True)
        meter = meter_on(loaded, self._general)
        if record.base is None:
            record.base = self._measured(loaded)
        del loaded
        for label, folder in folders.items():
            if label not in record.results:
                loaded = load_run(folder)
                kept = folder / loaded.method.folder if loaded.method else folder
                record.results[label] = self._measured(
                    loaded, forgetting=meter.measured(split_of(loaded)), bytes=folder_bytes(kept)
                )
                del loaded
                self._keep()
        self._keep()

    def _measured(self, loaded: AdaptedModel, **further: Any) -> Figures:
        found = evaluate_examples(loaded, self._tested, self._config)
        return Figures(loss=found.loss, exact_match=found.exact_match, token_accuracy=found.token_accuracy, **further)

    def run_of(self, label: str) -> Path:
        """The folder of a candidate's last run."""
        candidate = next(one for one in self.candidates if one.label == label)
        trial = self.record.finals[label]
        return folder_of(self.path / RUNS, candidate, trial.rate, trial.steps)


def meter_on(base: AdaptedModel, rows: Examples) -> ForgettingMeter:
    """What measures results against a base that is let go of."""
    vocabulary = vocabulary_size(base.model, base.config)
    meter = ForgettingMeter(split_of(base), rows, vocabulary, most_numbers=_MOST_NUMBERS)
    meter.settle(head_is_frozen=False)
    return meter


def split_of(loaded: AdaptedModel) -> SplitModel:
    """A loaded model in its parts, run as its method runs it."""
    split = SplitModel(loaded.model)
    split.run_body = bound(loaded).run_body
    split.model.eval()
    return split


def compare_methods(
    methods: str | Sequence[str] | None = None,
    *,
    train: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    console: Console | None = None,
    **settings: Any,
) -> Comparison:
    """Compare methods on the same rows, or go on with a comparison that was cut short.

    Args:
        methods: What is compared: `["lora:r=8", "dora", "full"]`, or as a text with commas.
        train: Settings of `TrainConfig` that all runs have, by name. Those of a method count for the method that they name; `lr` and
            others that a comparison decides do not count.
        out: The folder to write; one under `comparisons/` where not given.
        resume: The folder of a comparison, in place of all of these.
        console: Where progress is shown.
        settings: Those of `CompareSettings`.

    Raises:
        UserError: For settings or data that cannot be, or if every method fails.
    """
    console = console or Console()
    if resume is not None:
        if methods or train or out or settings:
            hint = "leave out everything beside --resume: it goes on as it was begun"
            raise UserError(
                "a comparison that goes on takes no other settings", where=str(resume), hint=hint, exit_code=USAGE
            )
        comparison = Comparison.resumed(resume, console)
    else:
        common = {name: value for name, value in (train or {}).items() if name not in NOT_SHARED or name == "method"}
        objective, default = (train or {}).get("objective"), TrainConfig.model_fields["objective"].default
        if objective not in (None, default):
            hint = f"leave it out, and give rows for --objective {default}"
            raise UserError(
                f"--objective {objective}: methods are compared by {default} alone", hint=hint, exit_code=USAGE
            )
        asked = CompareSettings.of(settings | {"methods": methods or []})
        place = out or Path("comparisons") / f"{datetime.now():%Y%m%d-%H%M%S}"
        comparison = Comparison.begun(asked, common, place, console)
    comparison.run()
    return comparison
