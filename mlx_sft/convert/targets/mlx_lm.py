"""`mlx-lm`: the adapter alone, in mlx-lm's files, under the names that its code gives the base's modules."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from mlx_sft.convert.targets.peft import AdapterAlone, same
from mlx_sft.data.chat_template import write_template
from mlx_sft.errors import USAGE, UserError
from mlx_sft.model.linears import linear_modules
from mlx_sft.model.load import name_elsewhere, resolve_checkpoint
from mlx_sft.model.outline import outline


class MlxLm(AdapterAlone):
    """The export format `mlx-lm`."""

    name: ClassVar = "mlx-lm"
    summary: ClassVar = "the adapter alone, as mlx-lm writes it"

    @property
    def source(self) -> Path:
        return resolve_checkpoint(self.export.config.model, weights=False)

    def check(self) -> None:
        super().check()
        if self.export.method.mlx_lm is None:
            what = f"mlx-lm has no form for what --method {self.export.method.name} trains"
            raise UserError(what, where=str(self.export.run.path), hint="export it with --format peft", exit_code=USAGE)

    def write(self, folder: Path) -> None:
        method, parameters = self.trained()
        if method.mlx_lm is not None:
            name = name_elsewhere(self.export.config.model)
            method.mlx_lm.write_adapter(folder, method.settings, parameters, name, self._paths())
        write_template(self.export.config.chat_template, folder)

    def verify(self, folder: Path) -> None:
        method, parameters = self.trained()
        if method.mlx_lm is None:
            return
        scale, again = method.mlx_lm.read_adapter(folder, self._paths())
        expected = method.settings.scale_of(next(iter(parameters)).rpartition(".")[0])
        if scale != expected or not same(parameters, again):
            raise UserError("the adapter was not written as it is", where=str(folder))

    def _paths(self) -> dict[str, str]:
        """mlx-lm's name of each linear module of the base, by its name in transformers."""
        modules = linear_modules(outline(self.source, "float32").model)
        return {name: path for name, (path, _) in modules.items()}
