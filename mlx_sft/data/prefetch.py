"""What an iterator yields, made in a thread a little before it is asked for.

The order is the iterator's. An error in it comes out where the item was asked for, with the thread's traceback. Knows nothing of
what the items are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """An iterator over the items, and a context: when it ends, however it ends, so has the thread.

    Args:
        items: Gone through in the thread alone, one item after another.
        ahead: How many items are made before they are asked for.

    Attributes:
        waited: Seconds that the last item was waited for.
    """

    def __init__(self, items: Iterable[T], ahead: int = 2) -> None:
        self.waited = 0.0
        self._take = iter(items).__next__
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: deque[Future[T]] = deque(self._thread.submit(self._take) for _ in range(ahead))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._coming:  # closed
            raise StopIteration
        started = time.perf_counter()
        try:
            item = self._coming.popleft().result()
        except BaseException:  # the end of the items is one too
            self.close()
            raise
        self.waited = time.perf_counter() - started
        self._coming.append(self._thread.submit(self._take))
        return item

    def close(self) -> None:
        """End the thread; an item that it is at is finished first, and what was not asked for is forgotten."""
        self._coming.clear()
        self._thread.shutdown(cancel_futures=True)
