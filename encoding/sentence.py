"""The loop of a `MultiVectorEncoder` stays its own, and its next batches are prepared in threads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .ahead import ahead
from .batches import by_size
from .run import default_workers


@dataclass(frozen=True)
class _Place:
    """Stands for an input in the loop: where it comes in its order, and where the batches of that order come from."""

    rank: int
    batches: Iterator[dict[str, Any]]


def prepare_ahead(encoder: Any) -> None:
    """Let an encoder prepare its next batches while it computes; order, batches and errors stay those of its loop.

    sentence-transformers sorts inputs by `_input_length` and alternates between `preprocess` and computing. Here its
    loop sorts places, one for each input, whose order is known beforehand, and its `preprocess` takes the batch that
    is ready. A version without that loop stays as it is.
    """
    if hasattr(type(encoder), "_inference"):
        encoder._input_length = partial(_input_length, type(encoder)._input_length)
        encoder.preprocess = partial(_preprocess, encoder)
        encoder._inference = partial(_inference, encoder)


def _input_length(otherwise: Any, value: Any) -> int:
    if isinstance(value, _Place):
        return value.rank
    try:
        return otherwise(value)
    except RecursionError:  # what nests too deep, the processor refuses
        return 0


def _preprocess(encoder: Any, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    if inputs and isinstance(inputs[0], _Place):
        return next(inputs[0].batches)
    return type(encoder).preprocess(encoder, inputs, *args, **kwargs)


def _inference(encoder: Any, inputs: Sequence[Any], *, batch_size: int, **options: Any) -> Any:
    loop, processor = type(encoder)._inference, encoder[0].processor
    try:
        items = processor.parse(inputs)
    except (TypeError, ValueError):  # it is due when its batch is
        return loop(encoder, inputs, batch_size=batch_size, **options)
    order, _ = by_size(processor, items, options.get("policy") or processor.policy)
    batches = [[inputs[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    own = inspect.signature(loop).parameters.keys() - {"prompt", "task"}
    processing = {name: value for name, value in options.items() if name not in own}
    with ahead(partial(_preprocess, encoder, **processing), batches, default_workers()) as ready:
        ranks = {i: len(order) - place for place, i in enumerate(order)}
        places = [_Place(ranks[i], ready) for i in range(len(order))]
        return loop(encoder, places, batch_size=batch_size, **options)
