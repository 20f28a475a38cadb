"""The verb `inspect`: data as training will see it, before training. For the terminal, as JSON, and as a page.

inspector ─► selection ─► rows ─► terminal, page;   table sums up
"""

from mlx_sft.inspection.inspector import ONLY, Inspection, inspect

__all__ = ["ONLY", "Inspection", "inspect"]
