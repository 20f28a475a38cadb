"""Text from a model, through mlx-lm."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_sft.data.prompt import Prompt, prompt_token_ids
from mlx_sft.data.tokenizer import generation_ends, tokenizer_errors
from mlx_sft.generation_settings import GenerationSettings
from mlx_sft.load import AdaptedModel
from mlx_sft.model.load import LoadedModel
from mlx_sft.model.vocabulary import vocabulary_size


def stream_text(loaded: LoadedModel, prompt: Prompt, **settings: Any) -> Iterator[str]:
    """The model's answer, piece by piece, up to its end of turn.

    Args:
        prompt: It is rendered with the tokenizer's chat template; where there is none, plain text is continued as it stands.
        settings: Those of `GenerationSettings`: system, max_tokens, temperature, top_p, top_k, min_p, seed, stop, repetition_penalty.
            Drawing with a seed sets that of `mx.random`.

    Raises:
        UserError: If a setting cannot be, the chat template rejects the conversation, or what was trained does not say how generation
            starts with it.
    """
    chosen = GenerationSettings.of(settings)
    pieces = continued(loaded, prompt_tokens(loaded, prompt, chosen.system), chosen)
    return until_stop(chosen.stop, pieces) if chosen.stop else pieces


def generate_text(loaded: LoadedModel, prompt: Prompt, **settings: Any) -> str:
    """The model's whole answer; see `stream_text`."""
    return "".join(stream_text(loaded, prompt, **settings))


def continued(loaded: LoadedModel, token_ids: list[int], chosen: GenerationSettings) -> Generator[str]:
    """What the model writes after these tokens, piece by piece, up to its end of turn; stop texts and system prompt are not looked at."""
    with closing(responses(loaded, token_ids, chosen)) as found:
        for response in found:
            yield response.text


def responses(loaded: LoadedModel, token_ids: list[int], chosen: GenerationSettings) -> Generator[GenerationResponse]:
    """As `continued`, with mlx-lm's count of the tokens and why the answer ended."""
    method = loaded.method if isinstance(loaded, AdaptedModel) else None
    # mlx-lm draws from the random numbers of the whole process.
    if chosen.seed is not None and chosen.temperature > 0:
        mx.random.seed(chosen.seed)
    # mlx-lm refuses to keep as many tokens as there are.
    keeps_all = chosen.top_k == 0 or chosen.top_k >= vocabulary_size(loaded.model, loaded.config)
    # mlx-lm looks into the tokenizer before the first token, and decodes with each.
    with (
        tokenizer_errors(str(loaded.path), "generating", panics_only=True),
        closing(
            stream_generate(
                loaded.model,
                TokenizerWrapper(loaded.tokenizer, eos_token_ids=end_tokens(loaded)),
                token_ids,
                max_tokens=chosen.max_tokens,
                sampler=make_sampler(
                    temp=chosen.temperature,
                    top_p=chosen.top_p,
                    min_p=chosen.min_p,
                    top_k=0 if keeps_all else chosen.top_k,
                ),
                logits_processors=make_logits_processors(
                    repetition_penalty=None if chosen.repetition_penalty == 1 else chosen.repetition_penalty
                ),
                prompt_cache=method.generation_cache(loaded.model) if method else None,
            )
        ) as found,
    ):
        yield from found


def until_stop(stops: Sequence[str], pieces: Generator[str]) -> Iterator[str]:
    """The text up to the first of some texts. What may be the beginning of one is held back until it is known not to be."""
    held = ""
    with closing(pieces):
        for piece in pieces:
            held += piece
            if found := [place for stop in stops if (place := held.find(stop)) >= 0]:
                yield held[: min(found)]
                return
            kept = len(held) - _begun(held, stops)
            yield held[:kept]
            held = held[kept:]
    yield held


def _begun(text: str, stops: Iterable[str]) -> int:
    """How many characters at the end of a text are the beginning of one of these."""
    return max(size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size]))


def prompt_tokens(loaded: LoadedModel, prompt: Prompt, system: str | None = None) -> list[int]:
    """Token ids of a prompt, with the header that opens the assistant's turn."""
    config = loaded.train_config if isinstance(loaded, AdaptedModel) else None
    return prompt_token_ids(loaded.tokenizer, prompt, config, system)


def end_tokens(loaded: LoadedModel) -> list[int]:
    """Every token that ends a turn: those of the tokenizer, the config and the generation config."""
    ends = loaded.config.get("eos_token_id")
    found = {loaded.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return sorted(i for i in found | generation_ends(str(loaded.path)) if isinstance(i, int))
