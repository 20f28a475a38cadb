"""The names that a data set has for roles → those that every reader of messages knows.

A row's messages are given their roles before its format reads it, so that this holds for every format, and for no message that a format
itself makes of a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_sft.data.json_text import parse_json
from mlx_sft.data.messages import ROLES, nearest, role_key, role_of, shown
from mlx_sft.errors import USAGE, UserError

TARGETS = (*ROLES, "function_call")
"""What a name may stand for."""


def check_roles(roles: Mapping[str, str]) -> None:
    """Raise `UserError` where names stand for a role that there is not, or two of them are one name."""
    for name, role in roles.items():
        if role not in TARGETS:
            hint = nearest(role, TARGETS) or f"roles are {', '.join(TARGETS)}"
            what = f"{shown(name)} cannot be {shown(role)}, which is no role"
            raise UserError(what, where="roles", hint=hint, exit_code=USAGE)
    if len({role_key(name) for name in roles}) < len(roles):
        raise UserError(
            "a role is named twice", where="roles", hint="upper and lower case are one name", exit_code=USAGE
        )


def with_roles(row: dict[str, Any], roles: Mapping[str, str]) -> dict[str, Any]:
    """A row whose messages, in lists of them, alone or as JSON text, have the roles for which their names stand."""
    by_key = {role_key(name): role for name, role in roles.items()}
    return {key: _renamed(value, by_key) for key, value in row.items()}


def _renamed(value: Any, roles: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_message(one, roles) for one in value]
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", '"'):
        return _message(value, roles)
    try:
        parsed = parse_json(value)
    except ValueError:
        return value
    renamed = _renamed(parsed, roles)
    return value if renamed == parsed else json.dumps(renamed, ensure_ascii=False)


def _message(value: Any, roles: Mapping[str, str]) -> Any:
    if not isinstance(value, dict):
        return value
    key = "from" if value.get("role") is None else "role"
    name = value.get(key)
    role = roles.get(role_key(name)) if isinstance(name, str) else None
    return value | {key: role} if role else value


def changed_names(roles: Mapping[str, str]) -> list[str]:
    """Of the names those that mean another role where nothing is said: a sentence each, for a person."""
    return [
        f"messages of {shown(name)} are read as {role}, by --roles; otherwise they would be {known}"
        for name, role in roles.items()
        if (known := role_of(name)) and known != role
    ]
