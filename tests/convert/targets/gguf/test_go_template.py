"""The part of Go's templates that is written here means what it means in Go."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_sft.convert.targets.gguf.go_template import literal
from tests.go_template import render

pytestmark = pytest.mark.fast

DATA: dict[str, Any] = {
    "Name": "x",
    "Empty": "",
    "On": True,
    "Off": False,
    "Items": [{"A": "1"}, {"A": "2"}, {"A": "3"}],
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("no action\n ", "no action\n "),
        ("<{{ .Name }}|{{.Empty}}>", "<x|>"),
        ("{{ if .On }}a{{ end }}{{ if .Off }}b{{ end }}", "a"),
        ("{{ if .Off }}a{{ else }}b{{ end }}", "b"),
        ("{{ if .Off }}a{{ else if .Empty }}b{{ else if .Name }}c{{ else }}d{{ end }}e", "ce"),
        ("{{ if and .On .Name }}a{{ end }}{{ if and .On .Empty }}b{{ end }}{{ if not .Off }}c{{ end }}", "ac"),
        ("{{ and .On .Name }}", "x"),
        ('{{ if eq .Name "x" }}a{{ end }}{{ if ne .Name "x" }}b{{ end }}', "a"),
        ("{{ range $i, $_ := .Items }}{{ $i }}:{{ .A }}{{ $.Name }} {{ end }}", "0:1x 1:2x 2:3x "),
        (
            "{{ range $i, $_ := .Items }}{{ if eq (len (slice $.Items $i)) 1 }}last {{ end }}{{ .A }}{{ end }}",
            "12last 3",
        ),
        ("{{ $a := true }}{{ range $i, $_ := .Items }}{{ if $a }}{{ .A }}{{ $a = false }}{{ end }}{{ end }}", "1"),
        ("{{ $a := .Name }}{{ if .On }}{{ $a := .Empty }}{{ $a }}{{ end }}{{ $a }}", "x"),
    ],
)
def test_what_a_template_writes(template: str, expected: str) -> None:
    assert render(template, DATA) == expected


@pytest.mark.parametrize("text", ["{{ .Name }}", "{", "{{", "a{%b%}}}", "{{/* */}}", '"{"', "{{- x -}}"])
def test_a_literal_means_itself(text: str) -> None:
    assert render(f"<{literal(text)}{{{{ .Name }}}}>", DATA) == f"<{text}x>"


@pytest.mark.parametrize(
    "template",
    [
        *("{{ .Name", "{{ if .On }}a", "{{ end }}", "{{ range $i, $_ := .Items }}a", "{{ if (eq 1 1 }}a{{ end }}"),
        *("{{ printf .Name }}", "{{- .Name }}", "{{ $unknown }}", "{{ }}", "{{ .Name | len }}", "{{{ .Name }}"),
    ],
)
def test_anything_else_is_an_error(template: str) -> None:
    with pytest.raises(ValueError):
        render(template, DATA)
