"""`python scripts/lowest_versions.py`: the lowest version of each dependency that pyproject.toml allows, as constraints for pip.

`make test-lowest` installs them and runs the tests, so that a lower bound is one that was tried.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
TESTED = ("data", "gguf")
"""Extras whose bounds hold for users, too."""

_LOWEST = re.compile(r"^(?P<name>[\w.-]+)(\[[\w,-]+\])?>=(?P<version>[\d.]+)[^;]*(?P<marker>;.*)?$")


def lowest_versions(project: dict[str, object]) -> list[str]:
    """`numpy==1.26` for `numpy>=1.26`; a marker of the platform stays."""
    requirements: list[str] = list(project["dependencies"])  # type: ignore[call-overload]
    for extra in TESTED:
        requirements += project["optional-dependencies"][extra]  # type: ignore[index]
    found = [_LOWEST.match(requirement.replace(" ", "")) for requirement in requirements]
    if None in found:
        raise SystemExit(f"no lower bound: {requirements[found.index(None)]}")
    pins = [f"{match['name']}=={match['version']}{match['marker'] or ''}" for match in found if match]
    return sorted(set(pins))


if __name__ == "__main__":
    print("\n".join(lowest_versions(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"])))
