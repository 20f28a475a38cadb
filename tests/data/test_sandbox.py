"""A chat template writes what transformers would write, or is stopped: by time, by size, and by no signal."""

from __future__ import annotations

import importlib.util
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, thread_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from mlx_sft.config import TrainConfig
from mlx_sft.data import prepare, template_limits
from mlx_sft.data.conversation import Conversation
from mlx_sft.data.encode import encode_conversation
from mlx_sft.data.mask.reference_rendering import RENDERING_ERRORS, ReferenceRendering
from mlx_sft.data.pipeline import Pipeline
from mlx_sft.data.readers import Row
from mlx_sft.data.sandbox import compiled
from mlx_sft.data.screening import SpecialTokens
from mlx_sft.data.template import todays_variables
from mlx_sft.data.template_limits import CLOCK, TemplateStopped
from mlx_sft.errors import UserError

pytestmark = pytest.mark.fast

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]

TRL = Path(str(importlib.util.find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
PATIENCE = 20
"""Seconds, on however slow a machine."""

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": 'Köln "Süd"', "days": 3}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather\nin <a> city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Which", "enum": ["Köln", "Rom"]},
                    "days": {"type": ["integer", "null"], "default": 1},
                    "more": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "number"}}}},
                },
                "required": ["city"],
            },
        },
    }
]
TURNS = [{"role": "user", "content": "Hi  "}, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHo <b>&\n"}]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "short": (TURNS, None),
    "system": ([{"role": "system", "content": "Be short."}, *TURNS, *TURNS], None),
    "reasoning": ([TURNS[0], {"role": "assistant", "content": "Ho", "reasoning_content": "Hm."}], None),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}, TURNS[1]], None),
    "tools": (
        [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            {"role": "tool", "name": "weather", "content": '{"rain": true}'},
            {"role": "tool", "name": "weather", "content": "no"},
            {"role": "assistant", "content": "Yes."},
        ],
        TOOLS,
    ),
    "wrong order": ([TURNS[1], TURNS[1], {"role": "owner", "content": None}], None),
}


def written(render: Callable[[], str]) -> str:
    """The text; or the kind of error, and what it says."""
    try:
        return render()
    except RENDERING_ERRORS as error:
        return f"{type(error).__name__}: {error}"


def transformers_writes(source: str, **variables: Any) -> str:
    return written(lambda: chat_template_utils._compile_jinja_template(source).render(**variables))


def stopped(source: str, **variables: Any) -> TemplateStopped:
    given = {"messages": TURNS, "tools": None, "documents": None, "add_generation_prompt": False} | variables
    start = monotonic()
    with pytest.raises(TemplateStopped, match="the chat template of tiny was stopped: it ") as caught:
        compiled(source, "tiny").render(**given)
    assert monotonic() - start < PATIENCE
    assert caught.value.hint
    return caught.value


# The same text


@pytest.mark.parametrize("name", [*sorted(path.stem for path in TRL.glob("*.jinja")), "chatml"])
def test_real_templates_write_what_transformers_writes(
    name: str, make_tokenizer: MakeTokenizer, public_template: Callable[[str], str]
) -> None:
    _assert_the_same_text(make_tokenizer() if name == "chatml" else make_tokenizer(public_template(name)))


def test_the_real_qwen3_tokenizer_writes_what_transformers_writes(neighbour: Callable[[str], Path]) -> None:
    _assert_the_same_text(AutoTokenizer.from_pretrained(neighbour("tokenizers/qwen3")))


def _assert_the_same_text(tokenizer: Any) -> None:
    for messages, tools in CONVERSATIONS.values():
        reference = ReferenceRendering(tokenizer, Conversation("a:1", messages, tools, {"enable_thinking": False}))
        for prompt in (False, True):
            expected = written(
                lambda messages=messages, tools=tools, prompt=prompt: tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
                )
            )
            assert written(lambda reference=reference, prompt=prompt: _rendered(reference, prompt)) == expected


def _rendered(reference: ReferenceRendering, prompt: bool) -> str:
    return reference.compiled.render(**reference.variables(reference.messages, prompt))


EXPRESSIONS = [
    *(
        "1 + 2 * 3 ** 2 // 4 % 3 - 7 / 2",
        "10 ** 20",
        "2 ** -1",
        "-3 * 2.5",
        "true + 1",
        "'a' * 3 + 'b'",
        "[1] * 2 + [x]",
    ),
    *("'%s-%05.1f|%(a)s' % x", "'%s-%05.1f' % ('é', 2)", "'%(a)s' % {'a': [1]}", "'{}{a:>{w}}'.format(1, a='b', w=4)"),
    *("'{0.real}'.format(3)", "'{a[b]!r}'.format_map({'a': {'b': 'c'}})", "'%s %s' | format('a', x)"),
    *("a ~ 1 ~ none ~ [1, 'b'] ~ {'c': x}", "('<' | e) ~ '<'", "('<b>' | safe) + '<'", "('<' | safe) ~ missing"),
    *("x[1:]", "x[::-1]", "text[2:5]", "x[-1]", "x[n]", "d['k']", "d.k", "d['items']", "d.missing", "d.missing.more"),
    *("1 < 2 < 3", "1 < n > 5 != 2", "'b' in text", "n in x", "'k' in d", "[1] in [[1]]", "x == [1, 2, 3]", "x != y"),
    *("'a' not in ['a', 'b']", "(1, 2) < (1, 3)", "'b' in x | map('string')", "2 in d.values()", "not x and y or 5"),
    *("x | map('string') | join('-')", "x | join", "ms | map(attribute='role') | join(', ')", "ms | join('|', 'role')"),
    *("ms | selectattr('role', 'equalto', 'user') | list | length", "ms | rejectattr('content') | list", "x | select"),
    *("x | select('odd') | list", "x | reject('in', [1, 2]) | list", "ms | selectattr('role', 'in', ['user']) | first"),
    *(
        "x | sort(reverse=true)",
        "ms | sort(attribute='content')",
        "x | max",
        "x | min",
        "x | sum",
        "[[1], x] | sum(start=[])",
    ),
    *("x | reverse | list", "text | reverse", "x | last", "x | first", "[] | first", "x | unique | list", "x | list"),
    *(
        "ms | groupby('role')",
        "x | batch(2, 'z') | list",
        "x | slice(2, 'z') | list",
        "d | dictsort",
        "d | items | list",
    ),
    *("text | upper | lower | title | capitalize", "text | trim", "text | trim('a')", "text | replace('a', 'bb', 1)"),
    *("text | center(40)", "'a\n\nb' | indent(3, true, true)", "'a\nb' | indent('> ')", "text | truncate(7)"),
    *("text | wordwrap(5)", "text | wordcount", "text | striptags", "'www.a.bc' | urlize", "text | urlencode"),
    *("d | xmlattr", "d | pprint", "5000000 | filesizeformat", "'7' | int + 1", "'f' | int(base=16)", "'z' | int(3)"),
    *("'2.5' | float", "2.567 | round(1)", "2.5 | round(method='floor')", "-2 | abs", "missing | default('z')"),
    *("'' | d('z', true)", "ms | tojson", "ms | tojson(indent=2)", "d | tojson(separators=(',', ':'), sort_keys=true)"),
    *("'é<' | tojson(ensure_ascii=true)", "text | string | length", "'<' | forceescape", "3 | string", "x | string"),
    *(
        "text.split(' ')",
        "text.split()",
        "text.rsplit(' ', 1)",
        "text.partition('c')",
        "text.strip('ac')",
        "text.find('c')",
    ),
    *("'-'.join(['a', 'b'])", "'-'.join(x | map('string'))", "text.startswith('a')", "text.endswith(('z', ' '))"),
    *(
        "text.replace('a', 'b')",
        "text.zfill(30)",
        "text.ljust(30) ~ '.'",
        "text.title()",
        "text.count('a')",
        "text.upper()",
    ),
    *("'a\tb'.expandtabs(4)", "'ab'.translate({97: 'xy'})", "'é'.encode().decode('utf-8')", "'a\nb'.splitlines()"),
    *(
        "d.items() | list",
        "d.get('z', 5)",
        "d.keys() | list",
        "d.copy()",
        "x.index(2)",
        "x.count(1)",
        "(5).bit_length()",
    ),
    *("(2.5).is_integer()", "(5).to_bytes(2, 'big')", "d.keys() - ['k']", "dict(d, z=1)", "dict.fromkeys('ab', 1)"),
    *(
        "('<' | safe).join(['&', 'b'])",
        "('{}' | safe).format('<')",
        "('%s' | safe) % '<'",
        "('<b>' | safe).striptags()",
    ),
    *(
        "range(3) | list",
        "range(5, 1, -2) | list",
        "range(10 ** 6)",
        "namespace(a=1).a",
        "namespace(a=1)",
        "namespace([('a', 2)]).a",
    ),
    *(
        "cycler('a', 'b').next()",
        "joiner()",
        "raise_exception('no')",
        "strftime_now('%Y-%m-%d')",
        "missing + 1",
        "x + 1",
    ),
    *("5 is odd", "text is string", "d is mapping", "x is iterable", "missing is defined", "5 is divisibleby(5)"),
    *(
        "5 is in(x)",
        "2 is eq 2",
        "'A' is upper",
        "none is none",
        "text is sameas(text)",
        "n is gt(1)",
        "'x' if n else 'y'",
    ),
    *(
        "'x' if not n",
        "x.append(1)",
        "''.__class__.mro()",
        "1 / 0",
        "'a' + 1",
        "x['a']",
        "{'a': n, n: 'b'}",
        "(n,)",
        "[n, [n]]",
    ),
    *(
        "2.0 ** 5000",
        "'a' < 1",
        "x | nope",
        "n is nope",
        "x.pop()",
        "loop",
        "self",
        "messages",
        "none ~ true",
        "1_000 + 0x1f",
    ),
]
STATEMENTS = [
    "{% for m in ms %}{{ loop.index }}{{ loop.last }}{{ loop.previtem }}{{ m.role }}{% else %}none{% endfor %}",
    "{% for m in ms if m.role == 'user' %}{{ loop.length }}{{ m.content }}{% else %}none{% endfor %}",
    "{% for m in [] if m %}{% else %}none{% endfor %}{% for a, b in d.items() %}{{ a }}={{ b }}{% endfor %}",
    "{% for n in x recursive %}{{ n }}{% if n < 3 %}({{ loop([n + 2]) }}){% endif %}{% endfor %}",
    "{% for n in range(9) %}{% if n == 2 %}{% continue %}{% endif %}{% if n > 4 %}{% break %}{% endif %}{{ n }}{% endfor %}",
    "{% for n in x %}{{ loop.cycle('a', 'b') }}{{ loop.changed(n // 2) }}{% endfor %}",
    "{% macro f(a, b='z') %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1) }}{{ f(1, 2, 3, c=4) }}",
    "{% macro f(a) %}<{{ caller(a) }}>{% endmacro %}{% call(b) f(5) %}{{ b + 1 }}{% endcall %}",
    "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(9) }}",
    "{% set ns = namespace(a='') %}{% for n in x %}{% set ns.a = ns.a + n | string %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(l=[]) %}{% for n in x %}{% set ns.l = ns.l + [n] %}{% endfor %}{{ ns.l }}",
    "{% set y %}a{{ n }}{% endset %}{{ y | length }}{% set z | upper %}b{{ y }}{% endset %}{{ z }}",
    "{% set a, b = x[:2] %}{{ b }}{{ a }}{% with c = 5 %}{{ c + a }}{% endwith %}{{ c }}",
    "{% filter upper | replace('A', 'bb') %}a{{ text }}{% endfilter %}",
    "{% block one %}{{ n }}{% endblock %}{{ self.one() }}{% for n in x %}{% block two scoped %}{{ n }}{% endblock %}{% endfor %}",
    "{% generation %}a{{ n }}{% endgeneration %}{% autoescape true %}{{ '<' }}{{ '<' ~ n }}{{ ms | tojson }}{% endautoescape %}",
    "{% autoescape n == 2 %}{{ '<' ~ n ~ '&' }}{{ '<' + text }}{{ 'a' | e }}{% endautoescape %}",
    "  {% if n %}\n  a\n  {%- endif %}  \n{# no #}\n{% raw %}{{ n }}{% endraw %}\n\n",
    "{{ x | map('nope') | list }}",
    "{% include 'a' %}",
    "{% if %}",
    "{{ 'open }}",
    "{% set g = x | map('string') %}{{ '1' in g }}{% for n in g %}{{ n }}{% endfor %}",
    "{% set g = x | select %}{{ g | first }}{{ g | list }}",
]


@pytest.mark.parametrize("source", [*(f"{{{{ {one} }}}}" for one in EXPRESSIONS), *STATEMENTS])
def test_every_part_of_the_language_writes_what_transformers_writes(source: str) -> None:
    variables = {
        "ms": TURNS,
        "messages": [],
        "x": [1, 2, 3],
        "y": [],
        "n": 2,
        "text": "a b  cac ",
        "d": {"k": 2, "items": [1]},
    }
    ours = written(lambda: compiled(source).render(**variables))
    assert _without_addresses(ours) == _without_addresses(transformers_writes(source, **variables))


def _without_addresses(text: str) -> str:
    """Generators and functions are written with their names and their places in memory."""
    return re.sub(r"<\w[^<>]* at 0x\w+>", "<somewhere>", text)


WORDS = st.sampled_from(["a", "text", "x", "n", "d", "1", "2", "'b'", "none", "[n]", "{'k': x}", "missing"])
OPERATORS = st.sampled_from(
    ["+", "-", "*", "~", "==", "<", "in", "not in", "and", "or", "%", "//", "|join(", "|replace('a',"]
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(OPERATORS, WORDS), min_size=1, max_size=12), WORDS)
def test_any_expression_is_written_as_transformers_writes_it(steps: list[tuple[str, str]], first: str) -> None:
    source = first
    for operator, word in steps:
        source = f"({source}) {operator} {word}" + (")" if operator.startswith("|") else "")
    variables = {"x": [1, 2, 3], "n": 2, "text": "a b", "d": {"k": 2}}
    ours = written(lambda: compiled(f"{{{{ {source} }}}}").render(**variables))
    assert ours == transformers_writes(f"{{{{ {source} }}}}", **variables)


def test_a_very_long_conversation_is_written_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    long = [{"role": "user", "content": "long " * 6_000_000}, *TURNS]
    many = [turn for _ in range(5000) for turn in TURNS]
    for messages in (long, many):
        expected = tokenizer.apply_chat_template(messages, tokenize=False)
        assert ReferenceRendering(tokenizer, Conversation("a:1", messages)).text == expected


def test_a_template_that_gathers_its_text_writes_a_long_conversation(make_tokenizer: MakeTokenizer) -> None:
    gathering = (
        "{% set ns = namespace(text='', kept=[]) %}{% for message in messages %}{% set ns.kept = ns.kept + [message] %}"
        "{% set ns.text = ns.text + message.role ~ ns.kept | length ~ message.content %}{% endfor %}{{ ns.text }}"
    )
    messages = [{"role": "user", "content": "long " * 100} for _ in range(1000)]
    tokenizer = make_tokenizer(gathering)
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert ReferenceRendering(tokenizer, Conversation("a:1", messages)).text == expected


def test_methods_of_long_texts_and_large_numbers_are_no_reason_to_stop() -> None:
    source = (
        "{{ (a ~ b).replace(a, '') | length }}{{ (a ~ b) | replace(b, 'x') | length }}{{ (a ~ b).startswith(a) }}"
        "{{ (a ~ b).split(b) | length }}{{ a is eq b }}{{ a == b }}{{ b in a ~ b }}{{ [a, b] | join('\n\n') | length }}"
        "{{ (('%s ' ~ a) % b) | length }}{{ (a ~ '{}{x}').format(b, x=b) | length }}"
        "{{ '{{\"id\": 1000}} **(note)** 300 {}'.format(1) }}{{ ('%s %d' % (a, 1700000000)) | length }}"
        "{{ '{}'.format(1700000000) }}{{ n is gt 1600000000 }}{{ [n] | first }}"
        "{{ [{'n': n}] | selectattr('n', 'gt', 1600000000) | list }}{{ a | truncate(500) | length }}{{ n | default(10 ** 9) }}"
        "{{ [a, b, a, b] | tojson(indent=4) | length }}{{ a.removeprefix(b) | trim | length }}{{ (a ~ '!').rstrip('!') == a }}"
    )
    variables = {"a": "ab " * 60_000, "b": "cd " * 60_000, "n": 1_700_000_000, "messages": []}
    assert compiled(source).render(**variables) == transformers_writes(source, **variables)


def test_a_list_of_long_messages_may_be_looked_at_from_every_message() -> None:
    source = (
        "{% for m in messages %}{{ (messages | last).role }}{{ messages | length }}{{ (messages | reverse | first).role }}"
        "{{ (messages | selectattr('role', 'equalto', 'user') | list)[-1].content | length }}{{ messages[loop.index0:] | length }}"
        "{% if m == (messages | list)[-1] %}!{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": f"{number} " * 2_000} for number in range(300)]
    assert compiled(source).render(messages=messages) == transformers_writes(source, messages=messages)


# Stopped


@pytest.fixture
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits, reached sooner."""
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.3)
    monkeypatch.setattr(template_limits, "MOST_TEXT", 1 << 18)
    monkeypatch.setattr(template_limits, "MOST_HANDLED", 1 << 23)
    monkeypatch.setattr(template_limits, "MOST_MULTIPLIED", 1 << 22)


def doubling(step: str, end: str = "") -> str:
    """`step` sixty times, on a text `ns.x`, a list `ns.l`, and a tuple `ns.t`."""
    start = "{% set ns = namespace(x='ab', l=[1], m=[1], t=(1,), o={}) %}"
    return f"{start}{{% for i in range(60) %}}{step}{{% endfor %}}{end}"


NESTED = "{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}{% set ns.t = (ns.t, ns.t) %}"
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
BIG = "{% set big = 'ab' * 100000 %}{% set items = range(90000) | list %}{% set table = dict.fromkeys(items) %}"

NUMBERS = {
    **{
        f"number {one}": f"{{{{ {one} }}}}"
        for one in ("10 ** (10 ** 10)", "(10 ** 1000) ** 1000", "5 | round(-10 ** 9)")
    },
    **{f"text {one}": f"{{{{ {one} }}}}" for one in ("'a' * 10 ** 10", "10 ** 10 * 'a'", "('a' | safe) * 10 ** 10")},
    "a number that is squared": doubling("{% set ns.x = (ns.n or 9) * (ns.n or 9) %}{% set ns.n = ns.x %}"),
    "a number of bytes": "{{ (0).from_bytes([255] * 90000, 'big') }}{{ ('f' * 90000) | int(base=16) }}",
    "a list": "{{ ([1] * 10 ** 9) | length }}",
    "a number in a branch": "{{ 1 if 'a' * 10 ** 10 else 2 }}",
    "a number in a loop": "{% for a in 'a' * 10 ** 10 %}{% endfor %}",
    "a number in a macro's default": "{% macro f(a='a' * 10 ** 10) %}{% endmacro %}{{ f() }}",
    **{
        f"width {one}": f"{{{{ {one} }}}}"
        for one in (
            *("'a' | center(10 ** 10)", "'a'.ljust(10 ** 10)", "'a'.rjust(10 ** 10)", "'a'.zfill(10 ** 10)"),
            *("'\t'.expandtabs(10 ** 10)", "'a\nb' | indent(10 ** 10)", "'a' | map('center', 10 ** 10) | list"),
            *("'%((a))9999999999d' % {'(a)': 1}", "'%(a)*d' % {'a': 1}", "('%0' ~ '0' * 100000 ~ 'x') % 1"),
            *("('{' ~ ':' * 1000000) | format(1)", "('%(' * 1000000) % {'a': 1}", "'{:{w}9}'.format(1, w='>9999999')"),
            *("'%10000000000d' % 1", "'%*d' % (10 ** 10, 1)", "'%.1000000000f' % 1", "'%10000000000d' | format(1)"),
            *(
                "'{:>10000000000}'.format(1)",
                "'{:{w}}'.format(1, w=10 ** 10)",
                "'{a:>9999999999}'.format_map({'a': 1})",
            ),
            *("('{:>10000000000}' | safe).format(1)", "('%10000000000d' | safe) % 1", "('a' | safe).ljust(10 ** 10)"),
            *("messages | tojson(indent=10 ** 10)", "items | tojson(separators=('x' * 100000, ':'))"),
            *("[1] | batch(10 ** 10, 'x') | list | length", "[1] | slice(10 ** 10) | list | length"),
            *(
                "(5).to_bytes(10 ** 10, 'big')",
                "strftime_now('%1000000000d')",
                "strftime_now('%c' * 9999)",
            ),
        )
    },
}
GROWING = {
    step: doubling(step)
    for step in (
        *("{% set ns.x = ns.x ~ ns.x %}", "{% set ns.x = ns.x + ns.x %}", "{% set ns.l = ns.l + ns.l %}"),
        *(
            "{% set ns.t = ns.t + ns.t %}",
            "{% set ns.x = ns.x | replace('a', 'aa') %}",
            "{% set ns.x = '%s%s' % (ns.x, ns.x) %}",
        ),
        *(
            "{% set ns.x = ns.x.replace('a', 'aa') %}",
            "{% set ns.x = [ns.x, ns.x] | join %}",
            "{% set ns.l = ns.l * 2 %}",
        ),
        *(
            "{% set ns.x = ns.x.join(['a', 'b', 'c']) %}",
            "{% set ns.x = '{0}{0}'.format(ns.x) %}",
            "{% set ns.x = ns.x * 2 %}",
        ),
        *("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}", "{% set ns.x = ('<' ~ ns.x ~ ns.x) | e %}"),
        "{% set y %}{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}{% set ns.x = y %}",
        "{% set y %}{% generation %}{{ ns.x }}{{ ns.x }}{% endgeneration %}{% endset %}{% set ns.x = y %}",
        "{% autoescape true %}{% set ns.x = ns.x ~ ns.x %}{% endautoescape %}",
        "{% set ns.x = ns.x.translate({97: 'aa'}) %}",
        "{% set ns.x = ns.x | wordwrap(1, wrapstring='ab') %}",
    )
} | {
    "a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + doubling("{% set ns.x = f(ns.x) %}"),
    "a call block": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + doubling("{% set y %}{% call f() %}{{ ns.x }}{% endcall %}{% endset %}{% set ns.x = y %}"),
    "output": BIG + FOREVER.replace("BODY", "{{ big }}"),
    "plain output": FOREVER.replace("BODY", "z" * 50_000),
    "a macro's plain output": "{% macro f() %}"
    + "z" * 50_000
    + "{% endmacro %}"
    + FOREVER.replace("BODY", "{% set x = f() %}"),
    "lists that are kept": doubling("{% set ns.l = [ns.l, [1] | batch(200000, 'x') | list] %}"),
    "texts that are kept": BIG + doubling("{% set ns.l = ns.l + [big ~ i] %}"),
    "parts that are kept": BIG + doubling("{% set ns.l = ns.l + [big[i:]] %}"),
    "a separator": BIG + "{{ items | map('string') | join(big) | length }}",
    "a separator's method": BIG + "{{ big.join(items | map('string')) | length }}",
    "a separator of what is safe": BIG + "{{ (big | safe).join(items | map('string')) | length }}",
    "one argument many times": BIG + "{{ ('%(x)s' * 1000) % {'x': big} }}",
    "one argument many times, in braces": BIG + "{{ ('{x}' * 1000).format(x=big) }}",
}
NESTING = {
    end: doubling(NESTED, end)
    for end in (
        *("{{ ns.l }}", "{{ ns.l | string | length }}", "{{ ns.l | tojson }}", "{{ 'a' ~ ns.l }}", "{{ ns.l | join }}"),
        *(
            "{{ '%s' % ns.l }}",
            "{{ '{}'.format(ns.l) }}",
            "{{ ns.l == ns.m }}",
            "{{ ns.l is eq ns.m }}",
            "{{ ns.l < ns.m }}",
        ),
        *("{{ ns.l in [ns.m] }}", "{{ [ns.m].index(ns.l) }}", "{{ {ns.t: 1} | length }}", "{{ messages[0][ns.t] }}"),
        *("{{ messages[0].get(ns.t) }}", "{{ dict([[ns.t, 1]]) | length }}", "{{ dict.fromkeys([ns.t]) | length }}"),
        *("{{ [ns.t] | unique | list | length }}", "{{ [ns.l, ns.m] | sort | length }}", "{{ ns.l | pprint }}"),
        *("{{ [{'a': ns.l}] | selectattr('a', 'equalto', ns.m) | list }}", "{{ messages[0].keys() - [ns.t] }}"),
        *("{{ ns.l | upper }}", "{{ ns.l | replace('a', 'b') }}", "{{ ns.l | safe }}", "{{ raise_exception(ns.l) }}"),
        *(
            "{{ {'a': ns.l}.items() }}",
            "{{ {'a': ns.l} | xmlattr }}",
            "{{ namespace(a=ns.l) }}",
            "{{ namespace([(ns.t, 1)]) }}",
        ),
        "{{ messages[0].keys().isdisjoint([ns.t] | map('default')) }}",
        "{% for a in [ns.l, ns.m] %}{{ loop.changed(a) }}{% endfor %}",
        "{% set ns.a = ns %}{% set ns.b = [ns, ns] %}{{ ns }}",
    )
}
ENDLESS = {
    body: BIG + FOREVER.replace("BODY", body)
    for body in (
        *(
            "",
            "{{ a }}",
            "{% continue %}",
            "{% set x = a %}",
            "{{ missing | default('z') }}",
            "{{ cycler('a').next() }}",
        ),
        *(
            "{% if 'zz' in big %}{% endif %}",
            "{% if big == big ~ '' %}{% endif %}",
            "{% if big.count('c') %}{% endif %}",
        ),
        *(
            "{% set x = big | upper %}",
            "{% set x = items[::-1] %}",
            "{% set x = items | min %}",
            "{% if 'a' in items %}{% endif %}",
        ),
        *("{% set x = table.copy() %}", "{% set x = table.get(b) %}", "{% if table == table.copy() %}{% endif %}"),
        *(
            "{% set x = table.values() | list %}",
            "{{ (items | select('none')) | first }}",
            "{{ (items | reject('number')) | list }}",
        ),
        *(
            "{% set x = cycler(*items) %}",
            "{% set x = (10 ** 900) // (3 ** 99) %}",
            "{% for c in items if false %}{% endfor %}",
        ),
        *("{{ (range(99999) | map('abs') | map('abs') | list) | length }}", "{% generation %}a{% endgeneration %}"),
        *(
            "{% set x = big.split('b') %}",
            "{{ big | list | length }}",
            "{{ big | float }}",
            "{{ [big, big ~ ''] | sort | length }}",
        ),
    )
} | {
    "six loops": "".join(f"{{% for i{n} in range(1000) %}}" for n in range(6)) + "{% endfor %}" * 6,
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop that calls itself twice": (
        "{% for x in [0] recursive %}{% if loop.depth < 60 %}{{ loop([0]) }}{{ loop([0]) }}{% endif %}{% endfor %}"
    ),
    "a long attribute": "{{ range(90000) | map(attribute='real" + ".real" * 10_000 + "') | list | length }}",
    "many attributes": "{{ range(90000) | sort(attribute='" + "real," * 10_000 + "real') | length }}",
    "a sum of lists": "{{ (range(90000) | batch(1)) | sum(start=[]) | length }}",
    "a search from the end": "{{ ('a' * 200000).rfind('b' + 'a' * 60000) }}",
    "stripping": "{{ ('a' * 99999) | trim('b' * 99999 + 'a') }}",
    "addresses": "{{ ('a@' * 50000) | urlize }}",
    "an odd encoding": "{{ ('é' * 50000).encode('punycode') | length }}",
    "its own counting": "{{ [-10 ** 9] | map('bounded tick') | list }}" + FOREVER.replace("BODY", ""),
}


@pytest.mark.usefixtures("low_limits")
@pytest.mark.parametrize(
    "source", [pytest.param(value, id=name[:60]) for name, value in {**NUMBERS, **GROWING}.items()]
)
def test_numbers_and_texts_that_are_too_large_are_refused(source: str) -> None:
    stopped(source, items=list(range(1000)))


@pytest.mark.usefixtures("low_limits")
@pytest.mark.parametrize("source", [pytest.param(value, id=name[:60]) for name, value in NESTING.items()])
def test_a_small_value_that_would_be_written_out_large_is_refused(source: str) -> None:
    stopped(source)


@pytest.mark.usefixtures("low_limits")
@pytest.mark.parametrize("source", [pytest.param(value, id=name[:60]) for name, value in ENDLESS.items()])
def test_a_template_that_does_not_end_is_stopped(source: str) -> None:
    stopped(source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (doubling("{% set ns.x = ns.x ~ ns.x %}"), "writes a text of more than 4 million characters"),
        (doubling("{% set ns.l = ns.l + ns.l %}"), "handles more than 256 million characters on the way"),
        (doubling(NESTED, "{{ ns.l }}"), "writes a text of more than 4 million characters"),
        ("{{ 10 ** (10 ** 10) }}", "computes a number or a text that is too large"),
    ],
)
def test_the_limits_are_what_they_are_said_to_be(source: str, reason: str) -> None:
    assert stopped(source).what == f"the chat template of tiny was stopped: it {reason}"


def test_a_conversation_has_five_seconds_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert template_limits.MOST_SECONDS == 5
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 1.0)
    start = thread_time()
    assert "it ran for more than 1 s" in stopped(FOREVER.replace("BODY", "")).what
    assert 1 < thread_time() - start < 3


def test_the_limits_grow_with_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MOST_TEXT", 1000)
    monkeypatch.setattr(template_limits, "LARGER_FROM", 1000)
    template = compiled("{{ 'a' * 4000 }}", "tiny")
    assert len(template.render(messages=[{"content": "a" * 5000}])) == 4000
    with pytest.raises(TemplateStopped, match="a text of more than"):
        template.render(messages=[{"content": "a" * 500}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ a }}" * 50_000,
        *("{% if a %}" * 5000 + "{% endif %}" * 5000, "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
        "{{ " + "[" * 3000 + "]" * 3000 + " }}",
        *("{% for a in b %}" * 30 + "{% endfor %}" * 30, "{{ " + "+".join("a" * 20_000) + " }}", "{{ a" + "|upper" * 9000 + " }}"),
        *("{{ " + "not " * 5000 + "a }}", "{{ a" + ".b" * 20_000 + " }}", "{{ 0x" + "f" * 90_000 + " }}", "{{ " + "9" * 90_000 + " }}"),
        "".join(f"{{% set a{n} = 1 %}}" for n in range(1500)) + "".join(f"{{% block b{n} scoped %}}{{% endblock %}}" for n in range(1500)),
    ],
)  # fmt: skip
def test_a_template_that_would_not_end_compiling_is_refused(source: str) -> None:
    stopped(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{% macro f() %}{{ caller() }}{% endmacro %}{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
    ],
)
def test_endless_recursion_is_an_error_not_a_traceback(source: str, make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match="nested too deeply"):
        encode_conversation(make_tokenizer(source), TURNS)


# Escapes


@pytest.mark.parametrize(
    "expression",
    [
        *("''.__class__.__mro__", "''['__class__'].mro()", "messages.append(1)", "messages[0].update(a=1)", "messages[0].clear()"),
        *("cycler.__init__.__globals__", "(''|attr('__class__')).mro()", "('' | attr('__class__'))()", "namespace(__class__=1)"),
        *("'{0.__class__.__mro__}'.format('')", "'{0[__class__].x}'.format('')", "('{0.__class__.x}'|safe).format('')"),
        *("(messages | map(attribute='append') | first)(1)", "raise_exception.__globals__['os']", "dict.__call__.__func__"),
        *("self.__init__.__globals__.x", "self._TemplateReference__context.x", "joiner.__init__.__globals__.x", "lipsum.__globals__.os"),
        *("(messages | select | list).__class__.x", "(x for x in y)", "range.mro()", "strftime_now.__closure__[0]", "'a'.__add__('b')"),
        *("(messages | map('list')).gi_frame.f_globals", "loop.__init__.x", "''.format.__self__.__class__.x", "''.__reduce_ex__(2)"),
    ],
)  # fmt: skip
def test_a_way_out_of_the_sandbox_is_refused(expression: str, make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match="the chat template rejects this conversation: "):
        encode_conversation(make_tokenizer(f"{{{{ {expression} }}}}"), TURNS)


@pytest.mark.parametrize(
    "expression", ["''.__class__", "'{0.__class__}'.format('')", "''|attr('__class__')", "messages.append"]
)
def test_what_is_not_safe_to_see_is_not_shown(expression: str) -> None:
    assert compiled(f"{{{{ {expression} }}}}").render(messages=[]) == ""


# What a person sees, and where


HOSTILE = "{% for m in messages %}{{ m.content }}{% endfor %}" + "{{ 'a' * 10 ** 10 }}"
ONLY_SOME = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if 'now' in m.content %}{{ 'a' * 10 ** 10 }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows(*answers: str) -> list[dict[str, str]]:
    return [{"prompt": "Hi", "completion": answer} for answer in answers]


def test_the_model_is_named_with_a_way_out(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError) as caught:
        encode_conversation(make_tokenizer(HOSTILE, name="some/model"), TURNS)
    assert caught.value.what.startswith("the chat template of some/model was stopped: it writes a text of more than")
    assert caught.value.hint == (
        "a template like this is broken or hostile; give another tokenizer, or rows of plain `text`"
    )


def test_a_run_ends_before_its_first_row(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(TemplateStopped, match="the chat template of tiny was stopped"):
        SpecialTokens(make_tokenizer(HOSTILE))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_template_that_is_stopped_ends_the_reading_and_is_no_bad_row(
    workers: int, make_tokenizer: MakeTokenizer, write_rows: Callable[..., str]
) -> None:
    data = write_rows(*rows("yes", "not now", "yes"))
    config = TrainConfig(data=data, skip_bad_rows=True, allow_lost_rows=True, data_workers=workers)
    with pytest.raises(TemplateStopped) as caught:
        prepare(config, make_tokenizer(ONLY_SOME))
    assert caught.value.where == f"{data}:2"


def test_one_row_says_where_it_happened(make_tokenizer: MakeTokenizer) -> None:
    pipeline = Pipeline.from_config(TrainConfig(data="a.jsonl"), make_tokenizer(ONLY_SOME))
    assert pipeline.process(Row("a.jsonl:1", rows("yes")[0])).note is None
    with pytest.raises(TemplateStopped, match=r"a\.jsonl:2"):
        pipeline.process(Row("a.jsonl:2", rows("now")[0]))


def test_a_template_that_waits_until_it_is_watched_is_stopped(make_tokenizer: MakeTokenizer) -> None:
    """Coloured letters are private-use characters, which are no letters."""
    watching = ONLY_SOME.replace("'now' in m.content", "m.content.upper() == m.content.lower()")
    with pytest.raises(TemplateStopped, match="the chat template of tiny"):
        encode_conversation(
            make_tokenizer(watching), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )


def test_a_row_cannot_set_the_clock(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation("a:1", TURNS, None, {CLOCK: "mine"})
    assert ReferenceRendering(tokenizer, conversation).text == tokenizer.apply_chat_template(TURNS, tokenize=False)


def test_a_date_of_any_width_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(TemplateStopped, match="tiny was stopped"):
        todays_variables(make_tokenizer("{% if not date_string %}{{ strftime_now('%1000000000d') }}{% endif %}"))


def test_a_prompt_for_a_model_is_bounded_too() -> None:
    from mlx_sft.generate import prompt_tokens
    from mlx_sft.model.load import load_model

    loaded = load_model("tiny")
    loaded.tokenizer.chat_template = HOSTILE
    with pytest.raises(TemplateStopped, match="was stopped"):
        prompt_tokens(loaded, "the cat")


def test_transformers_never_compiles_a_template_that_is_stopped(
    make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    compile_template = chat_template_utils._compile_jinja_template

    def watched(source: str) -> Any:
        seen.append(source)
        return compile_template(source)

    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", watched)
    with pytest.raises(TemplateStopped):
        encode_conversation(make_tokenizer("{{ 'a' | center(10 ** 10) }}"), TURNS)
    assert set(seen) <= {""}


def test_a_long_message_of_a_template_is_shortened(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match="rejects this conversation: aaa") as caught:
        encode_conversation(make_tokenizer("{{ raise_exception('a' * 10 ** 6) }}"), TURNS)
    assert len(caught.value.what) < 1000


@pytest.mark.usefixtures("low_limits")
def test_the_clock_stops_a_template_in_any_thread() -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            compiled(FOREVER.replace("BODY", ""), "tiny").render()
        except TemplateStopped as error:
            raised.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(raised) == 2


def test_one_template_that_is_stopped_leaves_the_next_rendering_its_whole_time(make_tokenizer: MakeTokenizer) -> None:
    template = compiled("{{ 'a' * n }}", "tiny")
    for _ in range(2):
        with pytest.raises(TemplateStopped):
            template.render(n=10**10)
        assert template.render(n=3) == "aaa"


def test_what_was_stopped_can_be_sent_to_another_process() -> None:
    error = TemplateStopped.because("tiny", "it ran").at("a.jsonl:7")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.what, again.where, again.hint) == (TemplateStopped, error.what, "a.jsonl:7", error.hint)
    assert str(again) == str(error)


@pytest.fixture(autouse=True)
def _no_templates_kept() -> Iterator[None]:
    yield
    compiled.cache_clear()
