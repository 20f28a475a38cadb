"""Every parser that is fuzzed, by its name."""

from __future__ import annotations

from tests.fuzz.models import ADAPTER, FOLDER, MODEL, SAFETENSORS, TOKENIZER
from tests.fuzz.rows import DATA, TOKENS
from tests.fuzz.runs import CHECKPOINT, RUN
from tests.fuzz.settings import CONFIG, OPTIONS

PARSERS = {
    parser.name: parser
    for parser in (CONFIG, OPTIONS, DATA, TOKENS, SAFETENSORS, ADAPTER, MODEL, FOLDER, TOKENIZER, CHECKPOINT, RUN)
}
