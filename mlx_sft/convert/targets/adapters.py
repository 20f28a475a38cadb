"""`adapters`: the adapter alone, in the files of the `adapters` library (AdapterHub). It needs no base."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from mlx_sft.convert.base_info import base_info
from mlx_sft.convert.targets.peft import AdapterAlone, PeftSettings, refuse_difference
from mlx_sft.data.chat_template import write_template
from mlx_sft.model.load import name_elsewhere


class Adapters(AdapterAlone):
    """The export format `adapters`."""

    name: ClassVar = "adapters"
    summary: ClassVar = "the adapter alone, as the adapters library writes it"
    Settings: ClassVar = PeftSettings

    def check(self) -> None:
        super().check()
        if self.export.method.alone != self.name:
            self.refuse_form("the adapters library")

    def write(self, folder: Path) -> None:
        run, config = self.export.run, self.export.config
        method, parameters = self.trained()
        method.write(folder, parameters, name_elsewhere(config.model), base_info(run, config).revision)
        write_template(config.chat_template, folder)

    def verify(self, folder: Path) -> None:
        refuse_difference(folder, *self.export.method.read(folder), *self.trained())
