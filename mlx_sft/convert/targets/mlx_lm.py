"""`mlx-lm`: the adapter alone, in mlx-lm's files, under the names that its code gives the base's modules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from mlx_lm.tuner.utils import load_adapters

from mlx_sft.convert.mlx_lm_reader import check_in_mlx_lm, difference_of, logits
from mlx_sft.convert.targets import DataSettings
from mlx_sft.convert.targets.peft import AdapterOnBase, PeftSettings, same
from mlx_sft.convert.verify import compared_rows
from mlx_sft.data.chat_template import write_template
from mlx_sft.errors import UserError, blamed_on
from mlx_sft.gate import checked
from mlx_sft.load import load_on_base
from mlx_sft.model.linears import linear_modules
from mlx_sft.model.load import name_elsewhere, resolve_checkpoint
from mlx_sft.model.outline import outline
from mlx_sft.model.stored_form import give_mlx_form


class MlxLmSettings(PeftSettings, DataSettings):
    """The same, and the rows on which it is compared."""


class MlxLm(AdapterOnBase):
    """The export format `mlx-lm`."""

    name: ClassVar = "mlx-lm"
    summary: ClassVar = "the adapter alone, as mlx-lm writes it"
    Settings: ClassVar = MlxLmSettings

    def check(self) -> None:
        super().check()
        if self.export.method.mlx_lm is None:
            self.refuse_form("mlx-lm")

    def write(self, folder: Path) -> None:
        method, parameters = self.trained()
        base: Any = outline(self.source, "float32").model
        give_mlx_form(base)  # refuses one that mlx-lm computes otherwise
        paths = {name: path for name, (path, _) in linear_modules(base).items()}
        name = name_elsewhere(self.export.config.model)
        method.mlx_lm.write_adapter(folder, method.settings, parameters, name, paths, len(base.layers))
        write_template(self.export.config.chat_template, folder)

    def verify(self, folder: Path) -> None:
        method, parameters = self.trained()
        written, again = method.mlx_lm.read_adapter(folder)
        module = next(iter(parameters)).rpartition(".")[0]
        scales = [settings.scale_of(module) for settings in (written, method.settings)]
        if not math.isclose(*scales) or not same(parameters, again):
            raise UserError("the adapter was not written as it is", where=str(folder))
        self._open(folder)

    def _open(self, folder: Path) -> None:
        """Have mlx-lm put the adapter on the base, and compare; that it reads the base itself is no promise of this form, and is noted."""
        run, config = self.export.run, self.export.config
        rows, _ = compared_rows(config, self.source)
        model = load_on_base(run, config, None, "float32").model
        give_mlx_form(model)
        hint = "export it with --format peft, or merged"
        with blamed_on(folder, "mlx-lm cannot open this adapter", hint):
            found = logits(load_adapters(model, str(checked(folder))).eval(), rows)
        del model
        trained = load_on_base(run, config, self.export.trained, "float32").model
        if told := difference_of(found, logits(trained, rows)):
            raise UserError(f"mlx-lm computes another model with it: {told}", where=str(folder), hint=hint)
        del trained
        if config.quantize is None:
            try:
                check_in_mlx_lm(resolve_checkpoint(config.model), rows)
            except UserError as error:
                self.notes.append(f"of the base itself, {error.what}; `mlx-sft convert` writes one for mlx-lm")
