"""Templates whose authors tagged what is generated. What is supervised is shown between ⟦ and ⟧."""

from __future__ import annotations

import pytest

from mlx_sft.data.template import Facts
from tests.data.mask.pictures import (
    MakeTokenizer,
    assistant,
    refusal,
    rendered,
    shown,
    user,
)
from tests.data.mask.templates import (
    PROMPT,
    TAGGED_VARIANTS,
)


@pytest.mark.parametrize("template", TAGGED_VARIANTS.values(), ids=TAGGED_VARIANTS.keys())
def test_tags_say_what_is_generated(make_tokenizer: MakeTokenizer, template: str) -> None:
    tokenizer = make_tokenizer(template)
    messages = [user("Hi"), assistant("Hello 😀 "), user("And?"), assistant("42.")]
    assert shown(tokenizer, *messages) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello 😀 <|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦42.<|im_end|>⟧\n"
    )
    assert "⟦Hello" not in shown(tokenizer, *messages, supervised=[3])
    assert rendered(tokenizer, *messages).facts == Facts(turns=2)


def test_a_tag_around_anothers_words_is_refused(make_tokenizer: MakeTokenizer) -> None:
    wrong = make_tokenizer(
        "{% for m in messages %}{% generation %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endgeneration %}{% endfor %}" + PROMPT
    )
    assert refusal(wrong, user("Hi"), assistant("Hello")).what.endswith("it tags words of others as generated")
