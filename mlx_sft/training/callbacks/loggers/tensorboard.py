"""TensorBoard: event files in the run folder, for `tensorboard --logdir runs`; its own package writes them, without PyTorch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mlx_sft.run_folder import RunFolder
from mlx_sft.training.callbacks.loggers import Logger


class TensorBoard(Logger):
    """The logger `tensorboard`."""

    package: ClassVar = "tensorboard"
    takes_back: ClassVar = True

    def begin(self, folder: Path, kept: str, config: Mapping[str, Any], step: int, *, resumed: bool) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(RunFolder(folder).tensorboard))
        self.go_back(step)
        shown = "\n".join(f"    {line}" for line in json.dumps(dict(config), indent=1).splitlines())
        text = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING,
            string_val=[shown.encode()],
            tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)]),
        )
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
        self._add(step, summary_pb2.Summary.Value(tag="config", metadata=metadata, tensor=text))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, *(self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()))

    def go_back(self, step: int) -> None:
        """Its reader leaves out what was logged before and is of this step or a later one, where a session starts anew with it."""
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def end(self, *, finished: bool) -> None:
        self._writer.close()

    def _add(self, step: int, *values: Any) -> None:
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()
