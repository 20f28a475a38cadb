"""Items made ahead in a thread: the same ones in their order, never too many, no thread left behind."""

from __future__ import annotations

import gc
import threading
import traceback
import weakref
from collections.abc import Iterator

import pytest

from mlx_sft.data.feed import Prefetch

pytestmark = pytest.mark.fast


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("ahead", [1, 2, 50])
def test_the_items_come_in_their_order(ahead: int) -> None:
    with Prefetch((number * number for number in range(20)), ahead) as items:
        assert list(items) == [number * number for number in range(20)]
        assert list(items) == []
    assert not _threads()


def test_they_are_made_in_another_thread_before_they_are_asked_for() -> None:
    made: dict[int, str] = {}
    third = threading.Event()

    def make() -> Iterator[int]:
        for number in range(9):
            made[number] = threading.current_thread().name
            if number == 2:
                third.set()
            yield number

    with Prefetch(make(), ahead=2) as items:
        next(items)
        assert third.wait(10), "the two behind the first were not made"
    assert set(made) == {0, 1, 2}
    assert all(name.startswith("prefetch") for name in made.values())


class Item:
    """Something that can be watched."""


def test_no_more_than_asked_for_lie_ready_and_none_is_kept() -> None:
    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    most = 0

    def make() -> Iterator[Item]:
        nonlocal most
        for _ in range(30):
            item = Item()
            alive.add(item)
            most = max(most, len(alive))
            yield item

    with Prefetch(make(), ahead=2) as items:
        for number, _ in enumerate(items):
            if number == 20:
                break
    # Two ready, the one at hand, and the one that the generator is still at.
    assert most <= 4
    del items, _
    gc.collect()
    assert not alive


def test_an_error_comes_out_in_its_place_with_the_lines_that_made_it() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise LookupError("row 7 is gone")

    with Prefetch(broken()) as items:
        assert next(items) == 1
        with pytest.raises(LookupError, match="row 7") as caught:
            next(items)
        assert "broken" in "".join(traceback.format_tb(caught.value.__traceback__))
        assert not _threads()
        assert list(items) == []


def test_an_error_of_whoever_asks_ends_the_thread() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    def ask() -> None:
        with Prefetch(endless()) as items:
            next(items)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask()
    assert not _threads()


def test_the_wait_for_a_late_item_is_measured() -> None:
    go_on = threading.Event()

    def late() -> Iterator[int]:
        yield 1
        go_on.wait(10)
        yield 2

    with Prefetch(late()) as items:
        next(items)
        threading.Timer(0.05, go_on.set).start()
        next(items)
        assert 0.02 < items.waited < 10
