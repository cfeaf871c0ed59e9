"""The loop of `encode_*` that does not wait: batches are read and processed ahead, and computed on all devices."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from threading import Event
from typing import Any

from torch import Tensor

from ..configuration_metaembed import check_count
from ..inputs_metaembed import InputPolicy, Item
from .ahead import ahead
from .batches import plan
from .devices import spread


def run(
    model: Any,
    chunks: Iterable[Sequence[Item]],
    process: Callable[[list[Item], list[int]], Any],
    compute: Callable[[Any, list[int], Any], Tensor],
    policy: InputPolicy | None,
    batch_size: int | None,
    *,
    batch_tokens: int | None = None,
    workers: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield where the inputs of each batch are in their chunk, and their rows.

    Args:
        model: The model.
        chunks: Inputs; those of a batch are of one chunk. A chunk is asked for when one of its batches is prepared.
        process: Makes model inputs of items with the numbers that errors call them by.
        compute: Makes rows of model inputs, with these numbers, on a model.
        policy: What may be read for the items. None: the model's `policy`.
        batch_size: The most inputs of a batch; None: 32, or any number with `batch_tokens`.
        batch_tokens: The most tokens of a batch, padding included; an input that is longer has one of its own.
        workers: Threads that prepare the next batches. None: two for each device, on as many spare processors.
        devices: Where to compute, several batches at once. None: where the model is.
    """
    if batch_tokens is not None:
        batch_tokens = check_count("batch_tokens", batch_tokens, 2**40)
    elif batch_size is None:
        batch_size = 32
    if devices is not None and (isinstance(devices, str) or not isinstance(devices, Sequence) or not devices):
        raise TypeError(f"devices must be a list such as ['cuda:0', 'cuda:1'], got {devices!r}.")
    if workers is None:
        workers = default_workers(len(devices or [None]))
    elif workers != 0:
        workers = check_count("workers", workers, 1024)
    overhead, stop = 0, Event()
    if batch_tokens is not None:  # the template, an instruction, the Meta Tokens
        overhead = process(model.processor.parse([""]), [0])["input_ids"].shape[1]

    def batches() -> Iterator[tuple[Sequence[Item], list[int], int]]:
        start = 0
        for items in chunks:
            for places in plan(model.processor, items, policy or model.policy, batch_size, batch_tokens, overhead):
                yield items, places, start
            start += len(items)

    def prepare(batch: tuple[Sequence[Item], list[int], int]) -> list[tuple[list[int], int, Any]]:
        items, places, start = batch
        features = process([_stoppable(items[i], stop) for i in places], [start + i for i in places])
        if batch_tokens is None or len(places) == 1 or features["input_ids"].numel() <= batch_tokens:
            return [(places, start, features)]
        half = len(places) // 2  # they are longer than was estimated
        return [*prepare((items, places[:half], start)), *prepare((items, places[half:], start))]

    def embed(parts: list[tuple[list[int], int, Any]], on: Any) -> list[tuple[list[int], Tensor]]:
        return [(places, compute(features, [start + i for i in places], on)) for places, start, features in parts]

    with ExitStack() as stack:
        prepared = stack.enter_context(ahead(prepare, batches(), workers, stop))
        if devices is None:
            results: Iterator[Any] = (embed(parts, model) for parts in prepared)
        else:
            results = stack.enter_context(spread(embed, prepared, model, devices))
        for parts in results:
            yield from parts


def default_workers(devices: int = 1) -> int:
    """Return how many threads prepare batches for so many devices: one reads while another has the tokenizer.

    One processor is left to whoever launches the model's work.
    """
    return max(1, min((os.cpu_count() or 1) - 1, 2 * devices))


def _stoppable(item: Item, stop: Event) -> Item:
    """Return a copy of an item that is no longer read once `stop` is set: a batch of URLs could take minutes."""

    def load(*args: Any) -> Any:
        if stop.is_set():
            raise InterruptedError("encoding has ended")
        return item.load(*args)

    stoppable = copy.copy(item)
    object.__setattr__(stoppable, "load", load)  # it is frozen
    return stoppable
