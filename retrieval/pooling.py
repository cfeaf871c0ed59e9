"""Documents of any number of vectors, as ColBERT, ColPali and their like make them, pooled to a fixed, ordered set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from ..scoring_metaembed import check_finite


@torch.no_grad()
def pool(embeddings: Any, vectors: int, method: str = "nested") -> Tensor:
    """Pool documents of any number of vectors to `vectors` each.

    All methods begin with Ward's tree of a document's vectors, in which those that are most alike are merged first.

        "nested"  every prefix is a summary: the mean of all vectors, then, from the means of all nodes of the tree,
                  always the one that improves the document's MaxSim with itself the most
        "tree"    every prefix is a summary: the mean of all vectors, then, split after split, the mean of the smaller
                  half
        "ward"    the means of `vectors` clusters, largest first: for that size alone, as the hierarchical pooling of
                  sentence-transformers does it

    Means have length 1. A document of fewer vectors than that repeats its own, which changes no score.

    Args:
        embeddings: A list of `[r, dim]` of any lengths, tensors or arrays, or a tensor `[n, r, dim]` without padding.
        vectors: How many vectors every document gets.
        method: `"nested"`, `"tree"` or `"ward"`.

    Returns:
        `[n, vectors, dim]` float32, each vector of length 1.

    Raises:
        TypeError: if embeddings are not of floating point.
        ValueError: if there is no such method, a document has no vectors, or a value is NaN or infinite.

    Example:
        >>> pool([torch.eye(2), torch.eye(2)[:1]], vectors=1)
        tensor([[[0.7071, 0.7071]],
        <BLANKLINE>
                [[1.0000, 0.0000]]])
    """
    choose = _METHODS[check_pooling(method)]
    if isinstance(vectors, bool) or not isinstance(vectors, int) or vectors < 1:
        raise ValueError(f"vectors must be a whole number of at least 1, not {vectors!r}")
    pooled = [_fill(choose(document, vectors), vectors) for document in _documents(embeddings)]
    if not pooled:
        raise ValueError("embeddings are an empty list, which has no shape")
    if len({document.shape[1] for document in pooled}) > 1:
        raise ValueError("all documents must have the same number of dimensions")
    return torch.stack(pooled)


@torch.no_grad()
def pool_padded(embeddings: Tensor, vectors: int) -> Tensor:
    """Pool each of `[n, r, dim]`, in which rows of zeros at the end are padding, to at most `vectors`, nested.

    What has fewer vectors keeps as many, in the nested order: `[n, <= vectors, dim]`, padded with rows of zeros.

    Raises:
        TypeError: if `vectors` is not a whole number.
        ValueError: if it is less than 1.
    """
    from ..configuration_metaembed import check_count  # here, as it imports transformers, and an index needs none

    vectors = check_count("tokens", vectors, 1_000_000)
    rows = (document[: max(1, int(document.any(dim=1).sum()))] for document in embeddings.detach().cpu())
    pooled = [pool([document], min(vectors, len(document)))[0] for document in rows]
    return pad_sequence(pooled, batch_first=True).to(embeddings)


def check_pooling(method: str) -> str:
    """Return the method if there is such a one."""
    if method not in _METHODS:
        raise ValueError(f"pooling must be one of {', '.join(map(repr, _METHODS))}, or None, not {method!r}")
    return method


def _documents(embeddings: Any) -> Iterator[Tensor]:
    if not isinstance(embeddings, Sequence) and not hasattr(embeddings, "__array__"):
        raise TypeError(f"embeddings must be a list of [r, dim] or a tensor, not {type(embeddings).__name__}")
    for i, document in enumerate(embeddings):
        if not isinstance(document, Tensor) and not hasattr(document, "__array__"):
            raise TypeError(f"document {i} must be a tensor or an array, not {type(document).__name__}")
        x = torch.as_tensor(document).detach().cpu()
        if not x.is_floating_point():
            raise TypeError(f"document {i} must be of floating point, not {x.dtype}")
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"document {i} must be [r, dim] with at least one vector, not {list(x.shape)}")
        check_finite(x, "embeddings")
        yield normalize(x.float(), dim=1)


def _fill(chosen: Tensor, vectors: int) -> Tensor:
    chosen = normalize(chosen, dim=1)
    return chosen if len(chosen) == vectors else chosen[torch.arange(vectors) % len(chosen)]


def _tree(tokens: Tensor) -> np.ndarray:
    """Ward's merges `[n - 1, 2]`: nodes from 0 to n - 1 are the tokens, node n + i is made by merge i."""
    from scipy.cluster.hierarchy import ward  # here, because importing it takes a while

    return ward(tokens.double().numpy())[:, :2].astype(np.int64)


def _sums(tokens: Tensor, merges: np.ndarray) -> Tensor:
    """The sum of the tokens below every node of the tree."""
    sums = torch.cat([tokens, tokens.new_empty(len(merges), tokens.shape[1])])
    for i, (a, b) in enumerate(merges):
        torch.add(sums[a], sums[b], out=sums[len(tokens) + i])
    return sums


def _nested(tokens: Tensor, vectors: int) -> Tensor:
    if len(tokens) == 1:
        return tokens
    candidates = normalize(_sums(tokens, _tree(tokens)), dim=1)
    similar = candidates @ tokens.T  # [nodes, tokens]
    chosen = [len(candidates) - 1]  # the mean of all
    best = similar[-1]
    while len(chosen) < min(vectors, len(tokens)):
        chosen.append(int(torch.clamp(similar - best, min=0).sum(dim=1).argmax()))
        best = torch.maximum(best, similar[chosen[-1]])
    return candidates[chosen]


def _top_down(tokens: Tensor, vectors: int) -> Tensor:
    n = len(tokens)
    if n == 1:
        return tokens
    merges = _tree(tokens)
    sums, sizes = _sums(tokens, merges), [1] * n
    for a, b in merges:
        sizes.append(sizes[a] + sizes[b])
    halves = [min(merge, key=lambda node: sizes[node]) for merge in merges[::-1][: vectors - 1]]
    return sums[[len(sums) - 1, *halves]]


def _ward(tokens: Tensor, vectors: int) -> Tensor:
    n = len(tokens)
    if n <= vectors:
        return tokens
    merges = _tree(tokens)
    sums, sizes, roots = _sums(tokens, merges), [1] * n, set(range(n))
    for i, (a, b) in enumerate(merges):
        sizes.append(sizes[a] + sizes[b])
        if i < n - vectors:
            roots = roots - {a, b} | {n + i}
    return sums[sorted(roots, key=lambda node: (-sizes[node], node))]


_METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {"nested": _nested, "tree": _top_down, "ward": _ward}
