"""`merged`: a Hugging Face checkpoint laid out as the base's, with what was trained in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from mlx_sft.convert.merge import Merging, write_merged
from mlx_sft.convert.targets import WholeModel
from mlx_sft.convert.verify import Verification, verify_merged


class Merged(WholeModel):
    """The export format `merged`."""

    name: ClassVar = "merged"
    summary: ClassVar = "a whole checkpoint with what was trained merged in, for transformers or mlx-lm"

    _written: Merging | None = None

    def write(self, folder: Path) -> None:
        self._written = write_merged(self.merging(), folder)

    def verify(self, folder: Path) -> Verification:
        return verify_merged(self._written or self.merging(), folder)
