"""Encoding of more inputs than memory holds."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain, islice
from typing import Any

from ..configuration_metaembed import check_count
from ..inputs_metaembed import is_batch, is_single


def stream(
    model: Any, side: str, inputs: Iterable[Any], num_meta: int | None = None, *, chunk_size: int = 128, **kwargs: Any
) -> Iterator[Any]:
    """Yield embeddings chunk by chunk, of inputs as an iterator gives them: of any number, two chunks in memory.

    Args:
        model: A `MetaEmbedModel`, whose `stream_queries` and `stream_documents` call this.
        side: "query" or "document".
        inputs: Queries or documents. The iterator advances in the caller's thread.
        num_meta: r, the number of vectors of each.
        chunk_size: Inputs of a chunk, among which they are sorted into batches.
        **kwargs: Those of `encode_documents`.

    Returns:
        An iterator of what `encode_documents` returns for each chunk, `[n, r, D]`, in the inputs' order.

    Raises:
        TypeError: If `inputs` is one input, or nothing that has inputs in order.
        ValueError: If a number is out of range. What is wrong with an input is raised when its chunk is due.

    Example:
        >>> for embeddings in model.stream_documents(pages(), num_meta=16):  # [n, 16, D]
        ...     file.write(embeddings.numpy().tobytes())
    """
    chunk_size = check_count("chunk_size", chunk_size, 2**31)
    if is_single(inputs) or not is_batch(inputs):
        raise TypeError(f"inputs to stream must be an iterable of inputs, got one of type {type(inputs).__name__}.")
    num_meta = model.processor.resolve_num_meta(side, num_meta)
    return _stream(model, side, iter(inputs), num_meta, chunk_size, **kwargs)


def _stream(
    model: Any, side: str, inputs: Iterator[Any], num_meta: int, chunk_size: int, **kwargs: Any
) -> Iterator[Any]:
    tokens, to_numpy = kwargs.pop("tokens", False), kwargs.pop("convert_to_numpy", False)
    sizes: deque[int] = deque()

    def chunks() -> Iterator[list[Any]]:
        start = 0
        while chunk := list(islice(inputs, chunk_size)):
            sizes.append(len(chunk))
            yield _parse(model.processor, chunk, start)
            start += len(chunk)

    with closing(model._run(side, chunks(), num_meta, tokens=tokens, **kwargs)) as results:
        for first in results:
            size = sizes.popleft()
            yield model._collect(side, size, num_meta, _take(chain([first], results), size), tokens, to_numpy)


def _take(results: Iterator[tuple[list[int], Any]], size: int) -> Iterator[tuple[list[int], Any]]:
    """Yield results until they are those of `size` inputs."""
    while size:
        places, rows = next(results)
        size -= len(places)
        yield places, rows


def _parse(processor: Any, chunk: list[Any], start: int) -> list[Any]:
    """Parse a chunk; its errors name an input by its place among all inputs."""
    try:
        return processor.parse(chunk)
    except (TypeError, ValueError) as error:
        named = re.sub(r"^input (\d+)", lambda place: f"input {start + int(place[1])}", str(error))
        raise type(error)(named) from error
