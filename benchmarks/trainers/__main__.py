"""One trainer on one task, in this process: `python -m benchmarks.trainers NAME TASK.json RESULT.json`."""

import time

BEGAN = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402

from benchmarks.task import Task  # noqa: E402
from benchmarks.trainers import TRAINERS  # noqa: E402


def main() -> None:
    name, task_file, result_file = sys.argv[1:]
    task = Task(**json.loads(Path(task_file).read_text(encoding="utf-8")))
    result = TRAINERS[name].run(task, BEGAN)
    Path(result_file).write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
