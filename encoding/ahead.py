"""Work that threads do ahead of whoever needs it, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")


@contextmanager
def ahead(
    function: Callable[[Work], Result],
    items: Iterable[Work],
    workers: int,
    stop: Event | None = None,
    first_here: bool = True,
) -> Iterator[Iterator[Result]]:
    """Give an iterator of `function(item)` for all items, in order, while threads compute the next `workers` of them.

    `items` advances in the caller's thread, by `workers` more items than were asked for. An error, of `items` too, is
    raised when its turn comes. Once the context is left, nothing runs any more.

    Args:
        function: What to do with an item.
        items: What to do it with.
        workers: The number of threads. With 0 the caller's thread does everything.
        stop: Is set when the context is left, for a `function` that can end early.
        first_here: Whether the caller's thread, which could only wait, computes the first item: then a single one
            starts no thread.
    """
    with ThreadPoolExecutor(max(1, workers), "ahead") as pool:
        try:
            yield _results(function, iter(items), workers, pool, first_here) if workers else map(function, items)
        finally:
            if stop is not None:
                stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def in_order(
    function: Callable[[Work], Result], items: Iterable[Work], pool: ThreadPoolExecutor, window: int
) -> Iterator[Result]:
    """Yield `function(item)` of all items, in order, while threads of a pool work on the next `window` of them."""
    yield from _awaited(_errors_as_futures(items, lambda item: pool.submit(function, item)), deque(), window)


def _results(
    function: Callable[[Work], Result], items: Iterator[Work], workers: int, pool: ThreadPoolExecutor, first_here: bool
) -> Iterator[Result]:
    submitted = _errors_as_futures(items, lambda item: pool.submit(function, item))
    waiting: deque[Future[Result]] = deque()
    for first in items if first_here else ():
        waiting.extend(_first(submitted, workers))
        yield function(first)
        break
    yield from _awaited(submitted, waiting, workers)


def _awaited(submitted: Iterator[Future[Result]], waiting: deque[Future[Result]], window: int) -> Iterator[Result]:
    waiting.extend(_first(submitted, window - len(waiting)))
    while waiting:
        result = waiting.popleft()
        waiting.extend(_first(submitted, window - len(waiting)))
        yield result.result()


def _errors_as_futures(items: Iterable[Any], submit: Callable[[Any], Future[Any]]) -> Iterator[Future[Any]]:
    """Yield what is submitted for each item; an error of `items` as the last one, to be raised in its turn."""
    try:
        for item in items:
            yield submit(item)
    except Exception as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        yield failed


def _first(items: Iterator[Any], count: int) -> list[Any]:
    return [item for _, item in zip(range(count), items, strict=False)]
