"""The data room alone: conversations a second with one and with two processes, memory against file size, first and second start.

Every figure is of a process of its own, with a cache of its own. Writes a JSON file to benchmarks/results/ and tables to stdout.
Knows nothing of models.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from machine import environment

HERE = Path(__file__).parent
WORK = HERE / "work"
TINY_TOKENIZER = HERE.parent / "mlx_sft" / "model" / "tiny"
STATUS = Path("/proc/self/status")
MEGABYTE = 1_000_000
PACKAGES = ("mlx-sft", "transformers", "tokenizers", "jinja2", "numpy")


# Rows


def write_rows(path: Path, size: int, seed: int = 0) -> int:
    """Conversations of one to four turns of random words, 2 kB each on average, until the file has `size` bytes; their number."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfw"))
    words = np.array(["".join(rng.choice(letters, rng.integers(1, 10))) for _ in range(4000)])
    written = rows = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            written += file.write(json.dumps({"messages": conversation(rng, words)}) + "\n")
            rows += 1
    return rows


def conversation(rng: np.random.Generator, words: np.ndarray) -> list[dict[str, str]]:
    def text(mean: int) -> str:
        chosen = np.minimum(rng.zipf(1.3, 1 + rng.poisson(mean)), len(words)) - 1
        return " ".join(words[chosen])

    turns = int(rng.integers(1, 5))
    return [
        {"role": role, "content": text(mean)} for _ in range(turns) for role, mean in (("user", 20), ("assistant", 120))
    ]


def long_text(kind: str, size: int) -> str:
    """A text of about so many bytes of a kind that costs the tokenizer little or much."""
    rng = np.random.default_rng(0)
    if kind == "base64":
        return base64.b64encode(rng.bytes(size * 3 // 4)).decode()
    if kind == "words":
        words = ["the", "house", "of", "language", "never", "memory", "and", "which", "before", "a", "model"]
        return " ".join(rng.choice(words, size // 5))[:size]
    first, last = {"letters": (0x61, 0x7B), "chinese": (0x4E00, 0x9FFF), "rare": (0x20000, 0x2A6D0)}[kind]
    return "".join(map(chr, rng.integers(first, last, size // len(chr(first).encode()))))


ROWS = ("words", "letters", "base64", "chinese", "rare")


# One process


class Clock:
    """A progress that notes when it was first and last told of rows."""

    def __init__(self) -> None:
        self.told: list[tuple[float, int]] = []
        self.cached = False

    def reading(self, name: str, rows: int, bytes_done: int, bytes_total: int | None) -> None:
        now = (time.perf_counter(), rows)
        self.told = [self.told[0], now] if self.told else [now]

    def finished(self, name: str, rows: int, *, cached: bool) -> None:
        self.cached = cached

    def note(self, message: str) -> None:
        raise SystemExit(f"error: {message}")

    def rate(self) -> float | None:
        """Rows a second once the processes are up; None where there was nothing to tokenize."""
        if len(self.told) < 2 or self.told[0][1] == self.told[1][1]:
            return None
        (begun, before), (ended, after) = self.told
        return (after - before) / (ended - begun)


def measure(data: str, tokenizer: str, workers: int) -> dict[str, Any]:
    """One start on a file: seconds, rows a second and peak memory."""
    from transformers import AutoTokenizer

    from mlx_sft.config import TrainConfig
    from mlx_sft.data import prepare

    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    clock = Clock()
    before = memory_so_far()
    started = time.perf_counter()
    prepared = prepare(TrainConfig(data=[data], data_workers=workers, valid_fraction=0), loaded, clock)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "cached": clock.cached,
        "conversations": len(prepared.train),
        "tokens": prepared.report.train.tokens,
        "conversations_per_second": len(prepared.train) / seconds,
        "conversations_per_second_once_up": clock.rate(),
        "peak_bytes": peak_bytes(),
        "bytes_before": before,
        "peak_bytes_of_largest_worker": kilobytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss),
        "fingerprint": prepared.report.fingerprint,
    }


def measure_row(kind: str, tokenizer: str) -> str:
    """What one row of the longest text that is tokenized takes, as text and as an answer."""
    from transformers import AutoTokenizer

    from mlx_sft.config import TrainConfig
    from mlx_sft.data.encode import MOST_TEXT
    from mlx_sft.data.pipeline import Pipeline
    from mlx_sft.data.readers import Row

    pipeline = Pipeline.from_config(TrainConfig(), AutoTokenizer.from_pretrained(tokenizer, local_files_only=True))
    text = long_text(kind, MOST_TEXT - 1000)
    lines = []
    for value in ({"text": text}, {"prompt": "Write.", "completion": text}):
        before, started = memory_so_far(), time.process_time()
        outcome = pipeline.process(Row("row:1", value))
        tokens = sum(len(example.token_ids) for example in outcome.examples)
        taken, seconds = peak_bytes() - before, time.process_time() - started
        lines.append(
            f"{kind:8} {next(iter(value)):8} {tokens:>10,} tokens  {seconds:5.1f} s  {taken / MEGABYTE:,.0f} MB"
        )
    return "\n".join(lines)


def memory_so_far() -> int:
    """Bytes of this process's memory, from which its peak is counted anew where the system can do so (Linux)."""
    if not STATUS.exists():
        return peak_bytes()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return status("VmRSS")


def peak_bytes() -> int:
    """This process's memory at its highest, pages of mapped files included, which the system may take back at any time."""
    return status("VmHWM") if STATUS.exists() else kilobytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0


def kilobytes(rusage: int) -> int:
    """What getrusage calls memory, in bytes: macOS counts bytes, Linux kilobytes."""
    return rusage if sys.platform == "darwin" else rusage * 1024


def run(data: Path, tokenizer: Path, workers: int, cache: Path) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [
        sys.executable,
        str(HERE / "data.py"),
        "--measure",
        str(data),
        str(workers),
        "--tokenizer",
        str(tokenizer),
    ]
    environment = os.environ | {"MLX_SFT_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr[-4000:]}\nerror: ended with code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# All of them


def benchmark(sizes: list[int], tokenizer: Path) -> list[dict[str, Any]]:
    """Of each size in MB: a first start with one process, a second one from the cache, a first start with two."""
    results = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            data = Path(folder) / "rows.jsonl"
            write_rows(data, size * MEGABYTE)
            result: dict[str, Any] = {"megabytes": size}
            for name, workers, cache in (("one", 1, "a"), ("again", 1, "a"), ("two", 2, "b")):
                load = os.getloadavg()[0]
                result[name] = run(data, tokenizer, workers, Path(folder) / cache) | {"load_before": round(load, 2)}
                print(f"{size} MB, {name}: {result[name]['seconds']:.1f} s", file=sys.stderr)
            result["cache_bytes"] = sum(
                file.stat().st_size for file in (Path(folder) / "a").rglob("*") if file.is_file()
            )
        if [result[name]["cached"] for name in ("one", "again", "two")] != [False, True, False]:
            raise SystemExit(
                "error: the second start did not find what the first one wrote; was the code changed meanwhile?"
            )
        if len({result[name]["fingerprint"] for name in ("one", "again", "two")}) > 1:
            raise SystemExit("error: the three starts did not give the same examples")
        results.append(result)
    return results


def table(results: list[dict[str, Any]]) -> str:
    def rate(run: dict[str, Any]) -> str:
        return f"{run['conversations_per_second']:,.0f} ({run['conversations_per_second_once_up']:,.0f})"

    header = (
        "file",
        "conversations",
        "one process, a second",
        "two, a second",
        "first start",
        "second",
        "memory",
        "cache",
    )
    lines = ["".join(f"{title:>23}" for title in header)]
    for result in results:
        one, again, two = result["one"], result["again"], result["two"]
        cells = (
            f"{result['megabytes']} MB",
            f"{one['conversations']:,}",
            rate(one),
            rate(two),
            f"{one['seconds']:.1f} s",
            f"{again['seconds']:.2f} s",
            f"{(one['peak_bytes'] - one['bytes_before']) / MEGABYTE:,.0f} MB",
            f"{result['cache_bytes'] / MEGABYTE:,.0f} MB",
        )
        lines.append("".join(f"{cell:>23}" for cell in cells))
    before = min(result["one"]["bytes_before"] for result in results) / MEGABYTE
    lines.append(
        "In brackets: once the processes are up. Memory: the peak of the first start with one process, mapped files included, "
        f"above the {before:,.0f} MB of libraries and tokenizer."
    )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how files of conversations are read, tokenized and cached.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 400], help="of the generated files, in MB")
    parser.add_argument(
        "--tokenizer", type=Path, default=TINY_TOKENIZER, help="a folder with tokenizer.json and a chat template"
    )
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "WORKERS"), help="one start on a file, as JSON")
    parser.add_argument("--row", choices=ROWS, help="what one row of the longest text takes, and nothing else")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.measure:
        data, workers = arguments.measure
        print(json.dumps(measure(data, str(arguments.tokenizer), int(workers))))
        return
    if arguments.row:
        print(measure_row(arguments.row, str(arguments.tokenizer)))
        return
    WORK.mkdir(exist_ok=True)
    about = environment(PACKAGES) | {"tokenizer": arguments.tokenizer.resolve().name}
    results = benchmark(arguments.sizes, arguments.tokenizer)
    print(table(results))
    file = HERE / "results" / f"data-{about['time'].replace(':', '').split('+')[0]}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"environment": about, "results": results}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
