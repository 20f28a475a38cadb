"""Chat templates that write the same conversations in many ways."""

from __future__ import annotations

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
LOOP = "{% for message in messages %}"
END = "{% endfor %}"
CHATML_VARIANTS = {
    "one expression": LOOP + TURN + END + PROMPT,
    "set in the loop": LOOP
    + "{% set text = '<|im_start|>' ~ message.role ~ '\n' ~ message.content %}{{ text }}{{ '<|im_end|>\n' }}"
    + END
    + PROMPT,
    "by index": "{% for i in range(messages | length) %}{% set message = messages[i] %}" + TURN + END + PROMPT,
    "plain text": LOOP
    + "\n<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    + END
    + "\n{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}",
    "prompt inside the loop": LOOP
    + TURN
    + "{% if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    + END,
    "system taken out": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}" + TURN + END + PROMPT,
    "macro": "{% macro turn(message) %}" + TURN + "{% endmacro %}" + LOOP + "{{ turn(message) }}" + END + PROMPT,
    "filtered loop": "{% for message in messages if message.role != 'tool' %}" + TURN + END + PROMPT,
}
NOT_UNDERSTOOD = {
    "without a loop over messages": (
        "{{ messages | map(attribute='content') | join('<|im_end|>') }}" + PROMPT,
        "words of message 2 stand where another message is written",
    ),
    "an assistant's words repeated by the next message": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.previtem is defined %}"
        "{{ loop.previtem.content }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT,
        "words of message 1 stand where another message is written",
    ),
    "text that depends on the letters": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content | unique | join) + '<|im_end|>' }}"
        "{% endfor %}" + PROMPT,
        "its writing depends on the letters of the messages, or on being traced",
    ),
    "another header than the prompt's": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + PROMPT,
        "message 2 does not begin with the generation prompt '<|im_start|>assistant\\n', which the model is given there",
    ),
    "a turn in two places": (
        "{% for m in messages %}{{ m.content }}{% endfor %}|{% for m in messages %}{{ m.content }}{% endfor %}",
        "it writes message 2 in several places",
    ),
}
WRITTEN_LATER = {
    "an accumulator": "{% set ns = namespace(text='') %}{% for m in messages %}"
    "{% set ns.text = ns.text + '<|im_start|>' + m.role + '\n' + m.content ~ '<|im_end|>' + '\n' %}{% endfor %}"
    "{{ ns.text }}" + PROMPT,
    "an accumulator by concatenation": "{% set ns = namespace(text='') %}{% for m in messages %}"
    "{% set ns.text = ns.text ~ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' %}{% endfor %}"
    "{{ ns.text }}" + PROMPT,
    "a list that is joined": "{% set ns = namespace(parts=[]) %}{% for m in messages %}"
    "{% set ns.parts = ns.parts + ['<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'] %}{% endfor %}"
    "{{ ns.parts | join }}" + PROMPT,
    "a block that is trimmed": "{% set text %}\n\n {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}  {% endset %}{{ text | trim + '\n' }}" + PROMPT,
    "a block that is stripped": "{% set text %}\n\n {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}  {% endset %}{{ text.strip() + '\n' }}" + PROMPT,
    "a filter block": "{% filter trim %}  {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}  {% endfilter %}{{ '\n' }}" + PROMPT,
    "a macro whose text is trimmed": "{% macro turn(m) %}\n  "
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}  {% endmacro %}"
    "{% for m in messages %}{{ turn(m) | trim + '\n' }}{% endfor %}" + PROMPT,
    "a macro around the loop": "{% macro all(list) %}  {% for m in list %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% endmacro %}{{ all(messages) | trim + '\n' }}" + PROMPT,
    "a call block": "{% macro turn(role) %}{{ '<|im_start|>' + role + '\n' + caller() + '<|im_end|>\n' }}{% endmacro %}"
    "{% for m in messages %}{% call turn(m.role) %}{{ m.content }}{% endcall %}{% endfor %}" + PROMPT,
    "messages made of messages": "{% set ns = namespace(list=[]) %}{% for m in messages %}"
    "{% set ns.list = ns.list + [{'role': m.role, 'text': m.content}] %}{% endfor %}"
    "{% for m in ns.list %}{{ '<|im_start|>' + m.role + '\n' + m.text + '<|im_end|>\n' }}{% endfor %}" + PROMPT,
    "numbers": "{% for i in range(messages | length) %}"
    "{{ '<|im_start|>' + messages[i].role + '\n' + messages[i].content + '<|im_end|>\n' }}{% endfor %}" + PROMPT,
    "the last outside the loop": "{% for m in messages[:-1] %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% set m = messages[-1] %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + PROMPT,
    "no loop at all": "{{ '<|im_start|>user\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% if messages | length > 1 %}{{ '<|im_start|>assistant\n' + messages[1].content + '<|im_end|>\n' }}{% endif %}"
    "{% if messages | length > 2 %}{{ '<|im_start|>user\n' + messages[2].content + '<|im_end|>\n' }}{% endif %}"
    "{% if messages | length > 3 %}{{ '<|im_start|>assistant\n' + messages[3].content + '<|im_end|>\n' }}{% endif %}"
    + PROMPT,
}
TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT
)
TAGGED_VARIANTS = {
    "as they should be": TAGGED,
    "with the header inside": TAGGED.replace(
        "{{ '<|im_start|>assistant\n' }}{% generation %}", "{% generation %}{{ '<|im_start|>assistant\n' }}"
    ),
    "with a part of the header inside": TAGGED.replace(
        "assistant\n' }}{% generation %}", "' }}{% generation %}{{ 'assistant\n' }}", 1
    ),
    "with white space inside": TAGGED.replace(
        "'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "'<|im_end|>\n' }}{% endgeneration %}"
    ),
    "without the end token": TAGGED.replace(
        "m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
        "m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}",
    ),
    "in a macro": "{% macro said(m) %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endmacro %}"
    + TAGGED.replace("{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ said(m) }}"),
    "not watched": "{% set ns = namespace(i=-1) %}{% for letter in 'xxxx' %}{% set ns.i = ns.i + 1 %}"
    "{% if ns.i < messages | length %}{{ '<|im_start|>' + messages[ns.i].role + '\n' }}"
    "{% if messages[ns.i].role == 'assistant' %}{% generation %}{{ messages[ns.i].content }}{% endgeneration %}"
    "{% else %}{{ messages[ns.i].content }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT,
}
