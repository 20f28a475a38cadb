"""The verb `inspect`: data as training will see it, before training. For the terminal, as JSON, as a page, and cleaned once for all.

inspector ─► selection ─► rows ─► terminal, page;   table sums up;   clean ─► changes
"""

from mlx_sft.inspection.clean import CleanData, write_clean
from mlx_sft.inspection.inspector import ONLY, Inspection, inspect

__all__ = ["ONLY", "CleanData", "Inspection", "inspect", "write_clean"]
