"""`merged`: a Hugging Face checkpoint laid out as the base's, with what was trained in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from mlx_sft.convert.merge import Merging, write_merged
from mlx_sft.convert.mlx_lm_reader import check_in_mlx_lm
from mlx_sft.convert.targets import WholeModel
from mlx_sft.convert.verify import Verification, compared_rows, verify_merged
from mlx_sft.errors import UserError
from mlx_sft.model.weights import left_out


class Merged(WholeModel):
    """The export format `merged`."""

    name: ClassVar = "merged"
    summary: ClassVar = "a whole checkpoint with what was trained merged in, for transformers or mlx-lm"

    _written: Merging

    def write(self, folder: Path) -> None:
        self._written = write_merged(self.merging(), folder)
        if left := left_out(self._written.checkpoint.path):
            self.notes.append(f"not copied from the base: {', '.join(left)}")

    def verify(self, folder: Path) -> Verification | None:
        """Compare it with what was trained; that mlx-lm opens it too is no promise of this form, and is noted where it does not."""
        verification = verify_merged(self._written, folder)
        try:
            check_in_mlx_lm(folder, compared_rows(self.export.config, folder)[0])
        except UserError as error:
            self.notes.append(f"{error.what}; --format mlx writes one for mlx-lm, where that is possible")
        return verification
