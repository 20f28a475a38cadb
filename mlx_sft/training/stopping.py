"""Signals that ask a run to end: the first lets it finish what it computes now and save, the second ends the process at once.

While a micro-step is computed, Python's own handlers wait for it. So a thread of this module reads the signals as they come, and
answers at once. Knows nothing of runs.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlx_sft.streams import hurry

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_ASKED = b"\nstopping after this micro-step, with a checkpoint; once more ends it at once\n"


class Stopped(Exception):
    """A run was asked to stop, and is between two micro-steps."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Whether there was a signal."""

    def __init__(self) -> None:
        self.number: int | None = None

    def check(self) -> None:
        """Raise `Stopped` where there was one."""
        if self.number is not None:
            raise Stopped(self.number)

    def receive(self, number: int) -> None:
        """Take note of a signal; end the process where it is the second."""
        if self.number is not None:
            os._exit(128 + number)  # whatever is on the disk is whole
        self.number = number
        hurry()
        # A thread of its own: where nobody reads what is written, it waits, and the next signal must be heard all the same.
        with suppress(RuntimeError):  # no threads are left
            threading.Thread(target=_say, name="signal heard", daemon=True).start()


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """While the block runs, SIGINT, SIGTERM and SIGHUP are requests to stop, but for those that the process ignores.

    Only the main thread may handle signals; in another one nothing changes, and there is never a request.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    hurry(False)  # of a run before
    read, write = socket.socketpair()
    write.setblocking(False)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    wakeup = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    reader = threading.Thread(target=_read, args=(read, request), name="signals", daemon=True)
    reader.start()
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _noted)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        write.close()
        reader.join()
        read.close()


def _read(signals: socket.socket, request: StopRequest) -> None:
    while received := signals.recv(16):
        for number in received:
            if number in _SIGNALS:
                request.receive(number)


def _say() -> None:
    with suppress(OSError):
        os.write(2, _ASKED)


def _noted(*_: object) -> None:
    """The thread has heard of it."""
