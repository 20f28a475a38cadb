"""`peft`: the adapter alone, in PEFT's files, opened by PEFT's rules before it is there.

It needs no base, so that one that is gone is no hindrance; then it is not seen whether PEFT finds a place for each tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import mlx.core as mx

from mlx_sft.convert.base_info import base_info
from mlx_sft.convert.targets import BaseModelSettings, StepSettings, Target
from mlx_sft.data.chat_template import write_template
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import read_json
from mlx_sft.load import base_of
from mlx_sft.methods import Method, Parameters
from mlx_sft.methods.peft_base import peft_base
from mlx_sft.methods.peft_files import CONFIG, refuse_losses
from mlx_sft.model.head import HEAD
from mlx_sft.model.load import extended_tokenizer, local_checkpoint, name_elsewhere, resolve_checkpoint
from mlx_sft.model.names import CAUSAL_LM, Opening
from mlx_sft.model.vocabulary import write_tokenizer
from mlx_sft.model.weights import Checkpoint

_WHOLE = "export it with --format merged, which holds all that was trained, and push it without --adapter-only"


class PeftSettings(StepSettings, BaseModelSettings):
    """Which step, of which base."""


class AdapterAlone(Target):
    """A form without the base in it."""

    def check(self) -> None:
        _ = self.export.trained
        if not self.export.method.frozen_base:
            what, hint = f"a run of --method {self.export.method.name} has no adapter", "export it with --format merged"
            raise UserError(what, where=str(self.export.run.path), hint=hint, exit_code=USAGE)

    def refuse_form(self, program: str) -> None:
        """Raise `UserError`: this program has no form for what the run's method trains."""
        method, run = self.export.method, str(self.export.run.path)
        what, hint = (
            f"{program} has no form for what --method {method.name} trains",
            f"export it with --format {method.alone}",
        )
        raise UserError(what, where=run, hint=hint, exit_code=USAGE)

    def needed_bytes(self) -> int:
        return self.export.trained.bytes()

    def trained(self) -> tuple[Method, Parameters]:
        """What is exported, read from its method's own form, with the settings as that says them."""
        with self.export.trained.in_own_form() as folder:
            return self.export.method.read(folder)


class AdapterOnBase(AdapterAlone):
    """One that is written with the names and shapes of the base, which must be there."""

    @property
    def source(self) -> Path:
        return base_of(self.export.run, self.export.config, weights=False)


class Peft(AdapterAlone):
    """The export format `peft`."""

    name: ClassVar = "peft"
    summary: ClassVar = "the adapter alone, as PEFT writes it"
    Settings: ClassVar = PeftSettings

    def check(self) -> None:
        super().check()
        if self.export.method.alone != self.name:
            self.refuse_form("PEFT")

    def write(self, folder: Path) -> None:
        run, config = self.export.run, self.export.config
        method, parameters = self.trained()
        name = name_elsewhere(config.model)
        method.write(folder, parameters, name, base_info(run, config).revision)
        if config.add_tokens:
            self._write_tokens(folder)
        write_template(config.chat_template, folder)
        if not (folder / CONFIG).is_file():
            self.notes.append(
                f"PEFT has no form for what --method {method.name} trains: these files are for mlx-sft alone"
            )
        elif (opened := open_as_peft(folder, name)) is None:
            self.notes.append(
                "the base is not on this disk, so that it was not seen whether PEFT finds a place for each tensor"
            )
        elif opened.alone or opened.auto_class != CAUSAL_LM:
            self.notes.append(
                f"open the base with {opened.auto_class}: these names are those of its modules there, and in no other class"
            )

    def _write_tokens(self, folder: Path) -> None:
        """The tokenizer with the run's tokens, without which the adapter is of no use."""
        base = local_checkpoint(self.export.config.model)
        if base is None:
            self.notes.append(
                "the base is not on this disk, so that the tokenizer with the new tokens is not beside it"
            )
            return
        tokenizer, _ = extended_tokenizer(base, None, self.export.config.add_tokens)
        write_tokenizer(tokenizer, base, folder)
        if rows := base_info(self.export.run, self.export.config).rows:
            self.notes.append(f"before PEFT opens it, the base needs its rows: base.resize_token_embeddings({rows})")

    def verify(self, folder: Path) -> None:
        method, parameters = self.trained()
        written, again = self.export.method.read(folder)
        refuse_difference(folder, written, again, method, parameters)


def refuse_difference(folder: Path, written: Method, again: Parameters, method: Method, parameters: Parameters) -> None:
    """Raise `UserError` unless what was read from a folder `again` is what was to be written."""
    # The names of targets are as long as it takes to name the modules of the base, and no others.
    settings, expected = (one.settings.model_dump(exclude={"target"}) for one in (written, method))
    if settings != expected or not same(parameters, again):
        raise UserError("the adapter was not written as it is", where=str(folder))


def open_as_peft(folder: Path, base: str, hint: str = _WHOLE) -> Opening | None:
    """Open an adapter's files as PEFT does, on the class with which transformers opens the base.

    Args:
        hint: What to do instead where it does not open.

    Returns:
        The class; None where the base, or its weights, are not on this disk, so that nothing was seen.

    Raises:
        UserError: If a tensor has no place there, or what comes out is not what was trained.
    """
    found = peft_base(base)
    if found is None or not found.modules:
        return None
    if found.opening is None:
        what = "it is not known what transformers calls the language model inside of this base, where PEFT would look"
        raise UserError(what, where=base, hint=hint)
    rows = read_json(folder / CONFIG).get("trainable_token_indices")
    if rows and f"{HEAD}.bias" in Checkpoint.open(resolve_checkpoint(base)).named:
        what = "PEFT leaves out the bias of the head of this base where rows of it are trained"
        raise UserError(what, where=base, hint=hint)
    refuse_losses(folder, found, "PEFT would not open this adapter as it was trained", where=base, hint=hint)
    return found.opening


def same(parameters: Parameters, others: Parameters) -> bool:
    """Whether two sets of parameters are equal, number by number."""
    return parameters.keys() == others.keys() and all(
        bool(mx.array_equal(others[name], value)) for name, value in parameters.items()
    )
