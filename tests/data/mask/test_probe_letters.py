"""Letters by which a message is known where a template writes it."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.mask.pictures import (
    MakeTokenizer,
    assistant,
    shown,
    user,
)
from tests.data.mask.templates import (
    END,
    LOOP,
    PROMPT,
    TURN,
)


def test_private_use_characters_in_the_content_do_no_harm(tokenizer: PreTrainedTokenizerFast) -> None:
    icons = "\U000f0000 \U000f0001 \U000f0009 \U00100000 \U0010fffd"
    assert shown(tokenizer, user(icons), assistant(f"{icons}b")).endswith(f"⟦{icons}b<|im_end|>⟧\n")


@pytest.mark.parametrize("filter_", ["tojson(ensure_ascii=true)", "urlencode", "upper"])
def test_text_that_depends_on_letters_is_probed_with_ascii_letters(make_tokenizer: MakeTokenizer, filter_: str) -> None:
    tokenizer = make_tokenizer(
        LOOP + TURN.replace("message['content']", f"(message.content | {filter_})") + END + PROMPT
    )
    turns = [message for _ in range(15) for message in (user("Né? yes"), assistant("Héllo, You"))]
    text = shown(tokenizer, *turns)
    said = {"upper": "HÉLLO, YOU", "urlencode": "H%C3%A9llo%2C%20You"}.get(filter_, '"H\\u00e9llo, You"')
    assert text.count(f"<|im_start|>assistant\n⟦{said}<|im_end|>⟧\n") == 15
    assert text.count("⟦") == 15
