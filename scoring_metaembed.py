"""MaxSim in plain torch, the reference. The package metaembed adds kernels and indexes, used if it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Budget = tuple[int, int]  # (query vectors, document vectors)
LARGEST = 1e15  # sums of products of larger values could overflow float32
_PRODUCTS = 1 << 20  # made at a time, so that they stay in the cache (4 MiB in float32)
_WIDENED = 1 << 22  # numbers of documents that are converted to float32 at a time
Reader = Callable[[slice], Iterable[Tensor]]  # of some documents, in groups of their vectors: `[m, r, D]` float32


class Embeddings(NamedTuple):
    """What a model returns for `tokens`: the vectors of Meta Tokens [N, r, D], and of tokens [N, T, D]."""

    meta: Any
    tokens: Any


@torch.no_grad()
def maxsim(
    queries: Any, documents: Any, budget: Budget | None = None, *, tokens: int | bool = True, backend: str = "auto"
) -> Tensor:
    """Score every query against every document by late interaction, `sum_i max_j <q_i, d_j>`.

    Args:
        queries: `[Q, R_q, D]`, or one query `[R_q, D]`, or a list of equal `[R_q, D]`; tensors or numpy arrays.
        documents: `[N, R_c, D]`, in the same forms, or an index of the package metaembed.
        budget: `(r_q, r_c)`: how many vectors of either side count, from the first. All of them by default.
            Of [`Embeddings`], a budget scores the Meta Tokens; without one, the tokens are scored.
        tokens: Of [`Embeddings`]: score all tokens of a query against all of a document, or its first so many.
        backend: `"torch"`, or a kernel of the package: `"compiled"` (CPU, built when first used) or `"fused"` (CUDA,
            bfloat16, by late-interaction-kernels). `"auto"` takes the kernel for the device if it is available.

    Returns:
        `[Q, N]` float32, on the documents' device. Queries are rounded like the documents: to bfloat16 for bfloat16
        documents, to int8 for int8, int4 and binary ones. Products are summed in float32.

    Raises:
        TypeError: if an input is neither a tensor, nor an array, nor a list of them, or is not floating point.
        ValueError: if shapes or the budget do not fit, or a value or score is NaN, infinite or beyond 1e15.
        RuntimeError: if the backend asked for by name is unavailable.
    """
    if isinstance(queries, tuple) and hasattr(queries, "tokens"):
        part = "meta" if budget else "tokens"
        queries, documents = getattr(queries, part), getattr(documents, part, documents)
        budget = (queries.shape[-2], tokens) if tokens and tokens is not True else budget
    if backend != "torch" or hasattr(documents, "stores"):
        try:
            from metaembed.retrieval.search import score_all
        except Exception as error:  # not installed, or another version
            if backend != "auto" or hasattr(documents, "stores"):
                raise RuntimeError("kernels and indexes belong to the package: pip install metaembed") from error
        else:
            return score_all(queries, documents, budget, backend)
    d = as_stack(documents, "documents")
    q, r_c = cut_queries(queries, budget, d.shape[1:], d.device)
    q = q.bfloat16().float() if d.dtype == torch.bfloat16 else q
    return torch_scores(q, len(d), r_c, lambda part: [check_finite(d[part, :r_c].float(), "documents")])


def torch_scores(queries: Tensor, n: int, vectors: int, read: Reader) -> Tensor:
    """Score `[Q, r_q, D]` against `n` documents of so many vectors, in bounded memory: `[Q, n]`."""
    out = queries.new_empty(len(queries), n)
    at_once = max(1, _PRODUCTS // (queries.shape[1] * vectors))
    for rows, scores in zip(queries.split(at_once), out.split(at_once), strict=True):
        flat = rows.flatten(0, 1)
        step = max(1, min(_PRODUCTS // max(1, len(flat)), _WIDENED // flat.shape[1]) // vectors)
        for part in (slice(start, min(start + step, n)) for start in range(0, n, step)):
            best = torch.stack([_maxima(flat, group) for group in read(part)]).amax(dim=0)
            scores[:, part] = best.view(*rows.shape[:2], best.shape[1]).sum(dim=1)
    return check_finite(out, "scores")


def _maxima(queries: Tensor, documents: Tensor) -> Tensor:
    """The largest product of every query vector `[m, D]` with a vector of every document `[n, r, D]`: `[m, n]`."""
    if documents.shape[1] > 1 and len(queries) < 64:  # a matrix product for each document is the fastest
        return (queries @ documents.transpose(1, 2)).amax(dim=2).T
    return (documents.flatten(0, 1) @ queries.T).view(*documents.shape[:2], len(queries)).amax(dim=1).T


def cut_queries(queries: Any, budget: Budget | None, shape: Sequence[int], device: Any) -> tuple[Tensor, int]:
    """Check queries and the budget against documents of a shape `(R_c, D)`: `[Q, r_q, D]` float32, and `r_c`."""
    q, (most, dim) = as_stack(queries, "queries"), shape
    if q.shape[2] != dim:
        raise ValueError(f"queries have {q.shape[2]} dimensions and documents {dim}: both must come from one model")
    if budget is not None and (isinstance(budget, str) or not isinstance(budget, Sequence) or len(budget) != 2):
        raise TypeError(f"budget must be a pair (query vectors, document vectors) such as (4, 8), not {budget!r}")
    r_q, r_c = budget or (q.shape[1], most)
    for name, value, limit in (("query", r_q, q.shape[1]), ("document", r_c, most)):
        if type(value) is not int:
            raise TypeError(f"budget {budget!r}: the number of {name} vectors must be an int")
        if not 1 <= value <= limit:
            raise ValueError(f"budget {budget!r} asks for {value} {name} vectors; from 1 to {limit} are available")
    return check_finite(q[:, :r_q].to(device, torch.float32), "queries"), r_c


def as_stack(value: Any, name: str) -> Tensor:
    """Return a tensor `[n, r, D]` of floating point from a tensor, an array, or a list of `[r, D]`."""
    if isinstance(value, list | tuple):
        parts = [as_stack(part, name) for part in value]
        if len({part.shape for part in parts}) != 1 or len(parts[0]) != 1:
            raise ValueError(f"a list of {name} must hold equally shaped [r, D] entries, and at least one")
        return torch.cat(parts)
    if not isinstance(value, Tensor) and not hasattr(value, "__array__"):
        raise TypeError(f"{name} must be a tensor, an array or a list of them, not {type(value).__name__}")
    value = torch.as_tensor(value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {value.dtype}")
    value = value[None] if value.ndim == 2 else value
    if value.ndim != 3 or 0 in value.shape[1:]:
        raise ValueError(f"{name} must be [n, r, D], or one of them [r, D], not {list(value.shape)}")
    return value


def check_finite(values: Tensor, name: str) -> Tensor:
    """Return `values`, or raise if one is NaN, infinite or beyond `LARGEST`."""
    if values.numel() and not (values.amin() >= -LARGEST and values.amax() <= LARGEST):  # NaN is neither
        raise ValueError(f"{name} hold NaN or infinity, or values beyond {LARGEST:g}: look for an overflow")
    return values
