"""What every page has that is written for a browser: one file that needs no network, and in which nothing of the data can become code."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

# Characters that could end a script block or a line of JavaScript, and halves of surrogate pairs, which no file can hold.
_DANGEROUS = re.compile("[<>&\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")


def filled(template: str, parts: Mapping[str, str], style: str, script: str | None = None) -> str:
    """A page of a template with `{{name}}` in it, in one pass: what is put in is not looked at again.

    Args:
        parts: Safe where they stand: escaped, or made by `embedded`.
        style, script: The page's own, and all that its policy allows, by their digests.
    """
    scripts = _digest(script) if script is not None else "'none'"
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {scripts}; img-src 'none'; base-uri 'none'; form-action 'none'"
    known = {**parts, "policy": policy, "style": style, "script": script or ""}
    return re.sub(r"\{\{(\w+)\}\}", lambda place: known[place[1]], template)


def embedded(value: Any) -> str:
    """JSON that is safe inside a script block of an HTML page."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _DANGEROUS.sub(lambda character: f"\\u{ord(character[0]):04x}", text)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
