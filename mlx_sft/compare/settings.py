"""What `compare` can be told beside the settings of a run. Each field becomes an option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from mlx_sft.errors import USAGE, UserError
from mlx_sft.settings import Settings, first_problem

NOT_SHARED = (
    "out",
    "resume",
    "resume_from_peft",
    "json_lines",
    "callbacks",
    "lr",
    "time_limit",
    "eval_every",
    "method",
    "objective",
    "forgetting",
    "general_data",
    "samples",
    "sample_prompts",
    "sample_tokens",
)
"""Settings of a run that a comparison decides itself."""


class CompareSettings(Settings):
    """What is compared, and how."""

    methods: list[str] = Field(default_factory=list, min_length=1, validate_default=True)
    """What is compared, separated by commas: methods with settings of their own, such as lora:r=8,dora,prefix,full."""
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)
    """Peak learning rates that each method tries, separated by commas; a range of its own where not given. lora:lr=1e-3 tries one."""
    budget_minutes: float | None = Field(default=None, gt=0)
    """Time for all of it: at most as many steps as end within it."""
    equal: Literal["tokens", "time"] = "tokens"
    """What every method is given: the same tokens, or the same share of --budget-minutes."""
    test: str | None = None
    """Rows on which the results are measured, in any form that --data takes; the validation rows, by which the learning rates are
    chosen, where not given."""
    general_data: str | None = None
    """Rows by which forgetting is measured; some pages of general knowledge in English where not given."""

    @field_validator("methods", "learning_rates", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any, info: ValidationInfo) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        if info.field_name == "methods":
            return values  # whose commas may stand in the value of a setting
        return [part for one in values for part in (one.split(",") if isinstance(one, str) else [one])]

    @model_validator(mode="after")
    def _goes_together(self) -> CompareSettings:
        if self.equal == "time" and self.budget_minutes is None:
            raise ValueError("equal: the time of each is a share of budget_minutes, which is not given")
        return self

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> CompareSettings:
        """The settings that a person gave; raises `UserError` for what cannot be."""
        try:
            return cls(**given)
        except ValidationError as error:
            what = first_problem(error).replace("Value error, ", "")
            hint = (
                "give --methods lora:r=8,dora,prefix,full"
                if not given.get("methods")
                else "see `mlx-sft compare --help`"
            )
            raise UserError(what, hint=hint, exit_code=USAGE) from error
