"""One row → its outcome: the examples that it gives, or the note of why it gives none.

    row ─► reader ─► special tokens? signs? ─► encoder ─► outcome

Knows the order of these and the rule for special tokens in content; knows nothing of files, processes or lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mlx_sft.config import TrainConfig
from mlx_sft.data.conversation import Conversation, Item, Items, apart, items_of
from mlx_sft.data.encode import Encoder, EncodeSettings
from mlx_sft.data.example import Example, Fate, Note, Outcome
from mlx_sft.data.key_counts import KeyUse
from mlx_sft.data.keys import NO_TEMPLATE, KeyRules, LeftOut, keys_of_bad_row
from mlx_sft.data.pairs import compared
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import MixedFormats, RowReader
from mlx_sft.data.screening import SPECIAL_HINT, SPECIAL_SIGN, SpecialTokens, signs_of
from mlx_sft.data.template_limits import NoTemplate, TemplateStopped
from mlx_sft.data.tokenizer import BrokenTokenizer
from mlx_sft.errors import UserError
from mlx_sft.registry import OBJECTIVES

SpecialInContent = Literal["error", "drop", "keep"]


class ReadingProgress(Protocol):
    """Is told how the reading of sources goes."""

    def reading(self, name: str, rows: int, bytes_done: int, bytes_total: int | None) -> None:
        """So many rows and bytes of a source are read; the total is None where no one knows it."""

    def finished(self, name: str, rows: int, *, cached: bool) -> None:
        """A source is read, or was found in the cache."""

    def note(self, message: str) -> None:
        """Something that a person may want to know."""


class NoProgress:
    """Shows nothing."""

    def reading(self, name: str, rows: int, bytes_done: int, bytes_total: int | None) -> None:
        pass

    def finished(self, name: str, rows: int, *, cached: bool) -> None:
        pass

    def note(self, message: str) -> None:
        pass


@dataclass(frozen=True)
class Pipeline:
    """Makes outcomes of rows. It can be pickled.

    Args:
        reader: What a row means; settled by the first row, so that a file of several formats is noticed.
        special: Finds the tokenizer's special tokens in content.
        special_in_content: Whether a row with one is bad, dropped or kept.
        objective: Says which examples a row gives; those of the encoder where None.
        keys: Judges the keys that nothing reads.
    """

    reader: RowReader
    encoder: Encoder
    special: SpecialTokens
    special_in_content: SpecialInContent = "error"
    objective: Any = None
    keys: KeyRules = NO_TEMPLATE

    @classmethod
    def from_config(cls, config: TrainConfig, tokenizer: Any) -> Pipeline:
        objective = OBJECTIVES[config.objective]
        return cls(
            RowReader.from_config(config),
            Encoder(tokenizer, EncodeSettings.from_config(config)),
            SpecialTokens(tokenizer),
            config.special_in_content,
            objective(config.settings(objective.Settings)),
            KeyRules.of(tokenizer.chat_template, ignore_unknown=config.ignore_unknown_keys),
        )

    def process(self, row: Row | UserError) -> Outcome:
        """What becomes of one row, or of what could not be read as one.

        Raises:
            NoTemplate: where there is no chat template, or it would hang or fill the memory, which no other row would change.
            BrokenTokenizer: likewise where the tokenizer gives up.
        """
        origin = row.where if isinstance(row, UserError) else row.origin
        keys: Sequence[KeyUse] = ()
        try:
            if isinstance(row, UserError):
                raise row
            keys = keys_of_bad_row(row.value)
            reading = self.reader.reading(row)
            keys = self.keys.uses(reading)
            item = reading.taken()
            if any(key.use == "refused" for key in keys):
                self.keys.check(reading)
            items = items_of(item)
            forged = (self.special.found_in(one) for one in items if isinstance(one, Conversation))
            found = next(filter(None, forged), None)
            if found and self.special_in_content == "error":
                raise UserError(found, where=origin, hint=SPECIAL_HINT)
            if found and self.special_in_content == "drop":
                note = Note(origin, "dropped", found, SPECIAL_HINT)
                return Outcome(origin, [], note=note, keys=keys)
            signs = self.signs_of(item) | ({SPECIAL_SIGN} if found else set())
            examples = [example for one in apart(item) for example in self._encode(one)]
            return Outcome(origin, examples, signs, keys=keys)
        except TemplateStopped as stopped:
            raise stopped.at(origin) from None
        except (NoTemplate, BrokenTokenizer):
            raise
        except UserError as error:
            fate: Fate = "dropped" if isinstance(error, LeftOut) else "bad"
            example = f"{error.where.removeprefix(origin)}: " if error.where.startswith(f"{origin}#") else ""
            note = Note(origin, fate, example + error.what, error.hint)
            return Outcome(origin, [], note=note, mixed=isinstance(error, MixedFormats), keys=keys)

    def signs_of(self, items: Items) -> frozenset[str]:
        """The signs of what was read in a row; of texts that are compared those of the first, as the others are there for their faults."""
        told = items[:1] if isinstance(items, tuple) else items_of(items)
        return frozenset().union(*(signs_of(one, self.special.user_header) for one in told))

    def _encode(self, item: Item | tuple[Item, ...]) -> list[Example]:
        """The examples of an item, or of those that are compared; at least one, with something to train on."""
        encode, where = self.encoder.encode, items_of(item)[0].origin
        found = (
            self.objective.examples(item, encode) if self.objective else [e for i in items_of(item) for e in encode(i)]
        )
        if self.objective and self.objective.compares:
            return compared(items_of(item), found, self.encoder)
        examples = [example for example in found if example.supervised_tokens]
        if not examples:
            raise UserError(
                "a conversation with nothing to train on: no token of it is the model's to write",
                where=where,
                hint="give it an assistant turn that the chat template writes, and that is not left out of the loss",
            )
        return examples
