"""MaxSim at any budget, and exact top-k search. Tensors in, tensors out; this file knows no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Budget = tuple[int, int]  # (query vectors, document vectors)

_CACHE_FLOATS = 1 << 20  # products are made this many at a time (4 MiB in float32), so that they stay in the cache
_BLOCK_SCORES = 1 << 22  # `search` holds at most about this many scores at once


class SearchResult(tuple[Tensor, Tensor]):
    """What `search` found. Unpacks as `scores, indices`.

    Attributes:
        scores: `[Q, k]` float32, best first.
        indices: `[Q, k]` int64, positions in the documents; equal scores are ordered by position.
        backend: What computed the scores.
    """

    backend: str

    def __new__(cls, scores: Tensor, indices: Tensor, backend: str) -> SearchResult:
        """Pair scores with indices, and remember who computed them."""
        self = super().__new__(cls, (scores, indices))
        self.backend = backend
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.backend)

    @property
    def scores(self) -> Tensor:
        """`[Q, k]` float32, best first."""
        return self[0]

    @property
    def indices(self) -> Tensor:
        """`[Q, k]` int64."""
        return self[1]

    def __repr__(self) -> str:
        queries, k = self.scores.shape
        return f"SearchResult(queries={queries}, k={k}, backend={self.backend!r})"


@torch.no_grad()
def maxsim(queries: Any, documents: Any, budget: Budget | None = None) -> Tensor:
    """Score every query against every document by late interaction, `sum_i max_j <q_i, d_j>`.

    Args:
        queries: `[Q, R_q, D]`, or one query `[R_q, D]`, or a list of equal `[R_q, D]`; tensors or numpy arrays.
        documents: `[N, R_c, D]`, in the same forms.
        budget: `(r_q, r_c)`: only the first vectors of either side count. All of them by default.

    Returns:
        `[Q, N]` float32, on the documents' device. bfloat16 and float16 are multiplied in float32.

    Raises:
        TypeError: if an input is neither a tensor, nor an array, nor a list of them, or is not of floating point.
        ValueError: if shapes or the budget do not fit, or a value is NaN or infinite.

    Example:
        >>> maxsim(torch.eye(2)[None], torch.eye(2)[None], budget=(1, 2))
        tensor([[1.]])
    """
    q, d = _sides(queries, documents, budget)
    out = torch.empty(len(q), len(d), device=d.device)
    for start, scores in _score_in_chunks(q, d):
        out[:, start : start + scores.shape[1]] = scores
    return out


@torch.no_grad()
def search(queries: Any, documents: Any, k: int, budget: Budget | None = None) -> SearchResult:
    """Find the `k` best documents of every query, exactly. Never holds the scores of all documents at once.

    Args:
        queries: As in `maxsim`.
        documents: As in `maxsim`.
        k: How many documents to return for a query; with fewer documents than that, all of them are returned.
        budget: As in `maxsim`.

    Returns:
        `scores, indices`, each `[Q, min(k, N)]`, float32 and int64, best first, equal scores by lower index.

    Raises:
        TypeError: as `maxsim`, and if `k` is not an integer.
        ValueError: as `maxsim`, and if `k` is less than 1.

    Example:
        >>> scores, indices = search(torch.eye(2)[1:], torch.eye(2)[:, None], k=1)
        >>> indices
        tensor([[1]])
    """
    _check_k(k)
    q, d = _sides(queries, documents, budget)
    best = torch.empty(len(q), 0, device=d.device), torch.empty(len(q), 0, dtype=torch.int64, device=d.device)
    block = max(1, _BLOCK_SCORES // max(1, len(q)))
    for start in range(0, len(d), block):
        part = d[start : start + block]
        scores = torch.empty(len(q), len(part), device=d.device)
        for at, chunk in _score_in_chunks(q, part):
            scores[:, at : at + chunk.shape[1]] = chunk
        values, indices = top_k(scores, k)
        best = merge_top_k(best, (values, indices + start), k)
    return SearchResult(*best, backend=f"torch ({d.device.type})")


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the `min(k, N)` largest of `scores` `[Q, N]`, best first, equal scores by lower index."""
    n = scores.shape[1]
    if k >= n:
        values, indices = torch.sort(scores, dim=1, descending=True, stable=True)
        return values, indices
    values, indices = torch.topk(scores, k + 1, dim=1)
    tied = values[:, k - 1] == values[:, k]  # torch.topk says nothing about which of them it took
    indices = indices[:, :k].sort(dim=1).values
    values, order = torch.sort(scores.gather(1, indices), dim=1, descending=True, stable=True)
    indices = indices.gather(1, order)
    if tied.any():
        exact = torch.sort(scores[tied], dim=1, descending=True, stable=True)
        values[tied], indices[tied] = exact.values[:, :k], exact.indices[:, :k]
    return values, indices


def merge_top_k(first: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Merge two results of `top_k`, of which the first holds the lower indices."""
    values = torch.cat([first[0], later[0]], dim=1)
    indices = torch.cat([first[1], later[1]], dim=1)
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    return values[:, :k], indices.gather(1, order)[:, :k]


def _score_in_chunks(queries: Tensor, documents: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield `(start, scores [Q, n])` over documents `[N, r_c, D]`, whose products fit the cache."""
    count, r_q, dim = queries.shape
    n, r_c = documents.shape[:2]
    flat = queries.reshape(count * r_q, dim).float()  # [Q * r_q, D]
    chunk = max(1, _CACHE_FLOATS // max(1, r_c * max(count * r_q, dim)))
    for start in range(0, n, chunk):
        part = documents[start : start + chunk]
        rows = part.reshape(len(part) * r_c, dim).float()  # [n * r_c, D]
        _check_finite(rows, "documents")
        if count * r_q < 64:  # few query vectors: maxima along rows that lie together in memory
            products = (flat @ rows.T).view(count, r_q, len(part), r_c)
            yield start, products.amax(dim=3).sum(dim=1)
        else:  # many: maxima of whole rows, one with another
            products = (rows @ flat.T).view(len(part), r_c, count * r_q)
            yield start, products.amax(dim=1).view(len(part), count, r_q).sum(dim=2).T


def _sides(queries: Any, documents: Any, budget: Budget | None) -> tuple[Tensor, Tensor]:
    """Both sides as `[Q, r_q, D]` and `[N, r_c, D]`, cut to the budget, on one device."""
    q, d = _as_stack(queries, "queries"), _as_stack(documents, "documents")
    if q.shape[2] != d.shape[2]:
        raise ValueError(
            f"queries have {q.shape[2]} dimensions and documents {d.shape[2]}: both must come from one model"
        )
    r_q, r_c = check_budget(budget, q.shape[1], d.shape[1])
    q = q[:, :r_q].to(d.device, torch.float32)
    _check_finite(q, "queries")
    return q, d[:, :r_c]


def check_budget(budget: Budget | None, most_query: int, most_document: int) -> Budget:
    """Return the budget as a pair of ints that fits what is there; `None` stands for all of it."""
    if budget is None:
        return most_query, most_document
    if isinstance(budget, str) or not isinstance(budget, Sequence) or len(budget) != 2:
        raise TypeError(f"budget must be a pair (query vectors, document vectors) such as (4, 8), not {budget!r}")
    for name, value, most in (("query", budget[0], most_query), ("document", budget[1], most_document)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"budget {budget!r}: the number of {name} vectors must be an int")
        if not 1 <= value <= most:
            raise ValueError(f"budget {budget!r} asks for {value} {name} vectors; from 1 to {most} are there")
    return budget[0], budget[1]


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, not {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")


def _as_stack(value: Any, name: str) -> Tensor:
    """A tensor `[n, r, D]` of floating point from all that a caller may hold."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{name} is an empty list, which has no shape; pass a tensor [0, r, D] instead")
        parts = [_as_tensor(part, name) for part in value]
        if any(part.shape != parts[0].shape or part.ndim != 2 for part in parts):
            shapes = sorted({tuple(part.shape) for part in parts})
            raise ValueError(f"a list of {name} must hold equally shaped [r, D] entries, not {shapes[:4]}")
        value = torch.stack(parts)
    tensor = _as_tensor(value, name)
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or 0 in tensor.shape[1:]:
        raise ValueError(f"{name} must be [n, r, D], or one of them [r, D], not {list(tensor.shape)}")
    return tensor


def _as_tensor(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        if not hasattr(value, "__array__"):
            raise TypeError(f"{name} must be a tensor, an array or a list of them, not {type(value).__name__}")
        value = torch.as_tensor(value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of floating point, not {value.dtype}")
    return value


def _check_finite(values: Tensor, name: str) -> None:
    """Raise if a value is NaN or infinite. The sum tells in one pass; only a doubtful sum is looked at twice."""
    if not values.sum().isfinite() and not values.isfinite().all():
        raise ValueError(f"{name} hold NaN or infinity; look for an overflow where they were encoded")
