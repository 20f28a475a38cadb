"""`peft`: the adapter alone, in PEFT's files. It needs no base, so that one that is gone is no hindrance."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import mlx.core as mx

from mlx_sft.convert.base_info import base_info
from mlx_sft.convert.targets import BaseModelSettings, StepSettings, Target
from mlx_sft.data.chat_template import write_template
from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Method, Parameters
from mlx_sft.methods.peft_files import CONFIG
from mlx_sft.model.load import name_elsewhere


class PeftSettings(StepSettings, BaseModelSettings):
    """Which step, of which base."""


class AdapterAlone(Target):
    """A form without the base in it."""

    def check(self) -> None:
        _ = self.export.trained
        if not self.export.method.frozen_base:
            what, hint = f"a run of --method {self.export.method.name} has no adapter", "export it with --format merged"
            raise UserError(what, where=str(self.export.run.path), hint=hint, exit_code=USAGE)

    def needed_bytes(self) -> int:
        return self.export.trained.bytes()

    def trained(self) -> tuple[Method, Parameters]:
        """What is exported, read from its method's own form, with the settings as that says them."""
        with self.export.trained.in_own_form() as folder:
            return self.export.method.read(folder)


class Peft(AdapterAlone):
    """The export format `peft`."""

    name: ClassVar = "peft"
    summary: ClassVar = "the adapter alone, as PEFT writes it"
    Settings: ClassVar = PeftSettings

    def write(self, folder: Path) -> None:
        run, config = self.export.run, self.export.config
        method, parameters = self.trained()
        method.write(folder, parameters, name_elsewhere(config.model), base_info(run, config).revision)
        write_template(config.chat_template, folder)
        if not (folder / CONFIG).is_file():
            self.notes.append(
                f"PEFT has no form for what --method {method.name} trains: these files are for mlx-sft alone"
            )

    def verify(self, folder: Path) -> None:
        method, parameters = self.trained()
        written, again = self.export.method.read(folder)
        if written.settings != method.settings or not same(parameters, again):
            raise UserError("the adapter was not written as it is", where=str(folder))


def same(parameters: Parameters, others: Parameters) -> bool:
    """Whether two sets of parameters are equal, number by number."""
    return parameters.keys() == others.keys() and all(
        bool(mx.array_equal(others[name], value)) for name, value in parameters.items()
    )
