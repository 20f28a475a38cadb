"""Chat templates with limits: they come with a downloaded model, and may be broken or hostile.

environment ─► rewriting + filters ─► prices ─► limits
"""

from mlx_sft.data.sandbox.environment import compiled, parsed
from mlx_sft.data.sandbox.limits import CLOCK, Clock, TemplateStopped

__all__ = ["CLOCK", "Clock", "TemplateStopped", "compiled", "parsed"]
