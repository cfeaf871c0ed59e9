"""Which inputs are encoded together, so that batches pad little and hold no more tokens than they may."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..backbones.lengths import estimate_tokens
from ..inputs_metaembed import InputPolicy, Item


def plan(
    processor: Any,
    items: Sequence[Item],
    policy: InputPolicy,
    batch_size: int | None,
    batch_tokens: int | None = None,
    overhead: int = 0,
) -> Iterator[list[int]]:
    """Yield the indices of each batch: most tokens first within each number of images, as a picture's size tells.

    Args:
        processor: A `MetaEmbedProcessor`.
        items: Parsed inputs.
        policy: What may be read for them: the headers of pictures' files are.
        batch_size: The most inputs of a batch. None: any number.
        batch_tokens: The most tokens of a batch, padding included, by estimate. None: any number.
        overhead: How many tokens every prompt has besides, Meta Tokens included.
    """
    order, estimated = by_size(processor, items, policy)
    # A picture has a token before and after it with most backbones.
    tokens = [count + overhead + 2 * item.num_images for count, item in zip(estimated, items, strict=True)]
    for group in processor.group([items[i] for i in order]):
        yield from _cut([order[i] for i in group], tokens, batch_size or len(order), batch_tokens or float("inf"))


def by_size(processor: Any, items: Sequence[Item], policy: InputPolicy) -> tuple[list[int], list[float]]:
    """Return the indices of inputs, most tokens first within each number of images, and how many tokens each has."""
    tokens = estimate_tokens(processor, items, policy)
    return sorted(range(len(items)), key=lambda i: (items[i].num_images, tokens[i]), reverse=True), tokens


def _cut(order: list[int], tokens: list[float], batch_size: int, batch_tokens: float) -> Iterator[list[int]]:
    """Yield runs of `order` of at most so many inputs and padded tokens; a longer input has one of its own."""
    chunk: list[int] = []
    longest = 0.0
    for i in order:
        longest = max(longest, tokens[i])
        if chunk and (len(chunk) == batch_size or (len(chunk) + 1) * longest > batch_tokens):
            yield chunk
            chunk, longest = [], tokens[i]
        chunk.append(i)
    if chunk:
        yield chunk
