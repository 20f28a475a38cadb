"""What every page has that is written for a browser: one file that needs no network, and in which nothing of the data can become code."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_sft.streams import printable

# Characters that could end a script block or a line of JavaScript, and halves of surrogate pairs, which no file can hold.
_DANGEROUS = re.compile("[<>&\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{policy}}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
{{again}}<title>{{title}}</title>
<style>{{style}}</style>
</head>
<body>
%s</body>
</html>
"""


def page(
    body: Path,
    title: str,
    parts: Mapping[str, str],
    *,
    style: str = "",
    script: str = "",
    again: int | None = None,
    connects: bool = False,
) -> str:
    """A page of a body, and of the style and the script that lie beside it under its name, where there are any.

    Its policy allows its style and its script alone, by their digests. What is put in for `{{name}}` is not looked at again.

    Args:
        body: The file of it.
        title: As it is; it is escaped here.
        parts: Safe where they stand in the body: escaped, or made by `embedded`.
        style, script: What comes before those of the page.
        again: Seconds after which it is loaded anew.
        connects: Whether its script may ask the server that it came from, and no other, for more.
    """
    style += _text(body.with_suffix(".css"))
    script += _text(body.with_suffix(".js"))
    scripts = _digest(script) if script else "'none'"
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {scripts}; img-src 'none'; base-uri 'none'; form-action 'none'"
    policy += "; connect-src 'self'" if connects else ""
    refresh = f'<meta http-equiv="refresh" content="{again}">\n' if again is not None else ""
    known = {
        **parts, "title": escaped(title), "policy": policy, "style": style, "script": script, "again": refresh,
    }  # fmt: skip
    return re.sub(r"\{\{(\w+)\}\}", lambda name: known[name[1]], _PAGE % _text(body))


def escaped(text: str) -> str:
    """Text that is safe between tags and in attributes."""
    return html.escape(printable(text))


def embedded(value: Any) -> str:
    """JSON that is safe inside a script block of an HTML page."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _DANGEROUS.sub(lambda character: f"\\u{ord(character[0]):04x}", text)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
