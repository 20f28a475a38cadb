"""How a model answers. Each field is an option of `generate` and `chat`, and an argument in Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from mlx_sft.errors import USAGE, UserError
from mlx_sft.settings import Settings, first_problem

_OF_SAMPLING = ("top_p", "top_k", "min_p")
_WITHOUT_SAMPLING = "temperature is 0, which always takes the likeliest token"


class GenerationSettings(Settings):
    """What is put before a conversation, how each next token is chosen, and where an answer ends."""

    system: str | None = None
    """A system prompt for the conversation, put where training puts it; in front of the user's words where the chat template takes none."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time; 1 draws as the model says; between them likely tokens are drawn more often."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw among the likeliest tokens that have this probability together."""
    top_k: int = Field(default=0, ge=0)
    """Draw among so many of the likeliest tokens; 0 for all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Draw among tokens that have at least this share of the likeliest one's probability."""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Draw the same answer to the same prompt each time."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """End the answer before this text, which is not shown. Give it again for several."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens that are among the last 20 become less likely, those of the prompt too."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_heeded(self) -> GenerationSettings:
        if self.temperature == 0:
            for name in _OF_SAMPLING:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: it says which tokens are drawn from, and {_WITHOUT_SAMPLING}")
        return self

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> GenerationSettings:
        """The settings that were given, the others by default; raises `UserError` for what cannot be."""
        try:
            return cls(**given)
        except ValidationError as error:
            what = first_problem(error).replace("Value error, ", "").replace(": Input", ": input")
            hint = "give a temperature too, such as 0.7" if _WITHOUT_SAMPLING in what else ""
            raise UserError(what, hint=hint or "see `mlx-sft generate --help`", exit_code=USAGE) from error
