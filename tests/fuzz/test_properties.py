"""Properties, for which hypothesis finds the smallest input that breaks them."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from mlx_sft.common_settings import public_name
from mlx_sft.config import all_fields
from mlx_sft.errors import UserError
from mlx_sft.model.weights import Checkpoint
from tests.fuzz.models import SAFETENSORS
from tests.fuzz.mutators import as_json, as_yaml, changed
from tests.fuzz.parser import Materials, Parser
from tests.fuzz.settings import CONFIG

few = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

_NAMES = [public_name(name) for name in all_fields()]
_NO_MATERIALS = Materials(Path("/nowhere"))

_WORDS = ["epoch", "auto", "1e-4", "12GB", "a=b", "q_proj,v_proj"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(_WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
weight_maps = st.dictionaries(st.text(max_size=3), st.text(max_size=5) | json_values, max_size=3)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "BOOL", "F4", "F8_E4M3", "F33"]),
        "shape": st.lists(st.integers(-1, 4), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 12), min_size=1, max_size=3),
    },
    optional={"more": json_values},
)


def parse(parser: Parser, folder: Path) -> None:
    """It is read rightly or refused; anything else is raised."""
    with suppress(UserError):
        parser.attempt(folder, _NO_MATERIALS)


@few
@given(
    st.dictionaries(st.text(max_size=3), entries, max_size=3),
    st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    st.binary(max_size=16),
)
def test_a_safetensors_file_is_read_as_its_own_library_reads_it(
    tmp_path: Path, header: dict[str, Any], metadata: dict[str, str] | None, body: bytes
) -> None:
    text = json.dumps(header | ({"__metadata__": metadata} if metadata else {})).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    parse(SAFETENSORS, tmp_path)


@few
@given(
    st.dictionaries(st.text(min_size=1, max_size=2), st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=3), st.data()
)
def test_a_good_safetensors_file_is_never_refused(tmp_path: Path, sizes: dict[str, int], data: st.DataObject) -> None:
    header, end = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "F16", "shape": [size], "data_offsets": [end, end + 2 * size]}
        end += 2 * size
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(end)
    try:
        deserialize(content)
    except SafetensorError:
        return
    (tmp_path / "x.safetensors").write_bytes(content)
    SAFETENSORS.attempt(tmp_path, _NO_MATERIALS)


@few
@given(st.dictionaries(st.sampled_from(_NAMES), json_values, max_size=3))
def test_settings_are_kept_as_they_are_written_or_refused(tmp_path: Path, given_settings: dict[str, Any]) -> None:
    text = as_yaml({"data": "x.jsonl"} | given_settings, random.Random(0))
    (tmp_path / "config.yaml").write_bytes(text)
    parse(CONFIG, tmp_path)


@pytest.mark.parametrize("setting", ["lr: no", "rank: yes", "eval_every: on", "betas: [no, yes]", "model: no"])
def test_a_truth_value_is_no_number(tmp_path: Path, setting: str) -> None:
    (tmp_path / "config.yaml").write_text(f"data: x.jsonl\n{setting}\n")
    with pytest.raises(UserError):
        CONFIG.attempt(tmp_path, _NO_MATERIALS)


@few
@given(json_values | st.fixed_dictionaries({"weight_map": weight_maps}))
def test_an_index_leads_to_files_of_its_folder_or_is_refused(tmp_path: Path, index: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):  # there is no shard that it could name
        Checkpoint.open(tmp_path)


@few
@given(st.integers(), json_values)
def test_what_is_not_changed_is_written_as_it_is(seed: int, value: Any) -> None:
    chance = random.Random(seed)
    assert repr(json.loads(as_json(value, chance))) == repr(json.loads(json.dumps(value)))
    assert changed(chance, [value], times=0) == json.loads(json.dumps([value])) or value != value
