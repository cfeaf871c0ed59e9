"""Cascades: a small budget narrows all documents down, and larger ones decide. They rely on trained prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..scoring_metaembed import Budget
from .search import SearchResult, check_k, choose_backend, prepare, search, select_candidates

Stage = tuple[Budget, int]  # (budget, how many documents it keeps)

DEFAULT_STAGES: tuple[Stage, ...] = (((1, 1), 1000), ((4, 8), 200))  # docs/performance.md has their quality and speed


@dataclass(frozen=True, eq=False, repr=False)
class CascadeResult(SearchResult):
    """Result of `cascade`. Unpacks as `scores, indices`.

    Attributes:
        scored: `[Q, stages + 1]` int64, how many documents each stage, and finally the budget, scored for a query.
    """

    scored: Tensor

    def __repr__(self) -> str:
        means = ", ".join(f"{mean:g}" for mean in self.scored.double().mean(dim=0).tolist())
        return f"{super().__repr__()[:-1]}, scored=[{means}])"


@torch.no_grad()
def cascade(
    queries: Any,
    documents: Any,
    k: int,
    budget: Budget | None = None,
    *,
    stages: Sequence[Stage] = DEFAULT_STAGES,
    margin: float | None = None,
    exact: Any = None,
    backend: str = "auto",
) -> CascadeResult:
    """Find nearly the documents of `search` at the same budget, for a fraction of the work.

    Args:
        queries: As in `maxsim`.
        documents: As in `maxsim`.
        k: How many documents to return for a query.
        budget: The budget of the final scores: all vectors by default.
        stages: `(budget, keep)`: the first scores all documents and keeps its best, the next scores those, and so on.
            Without stages this equals `search`.
        margin: Adaptive. After each stage a query keeps, of `keep` at most, only documents whose mean similarity (the
            score divided by the query vectors of the stage) is within the margin of its `k`-th best. An easy query is
            left with `k` and skips the other stages, a hard one goes through all. `None` keeps `keep`.
        exact: The same documents in the same order with less rounding, which give the final scores. Few of them are
            read, so they may stay on disk while `documents` are small and in memory.
        backend: As in `maxsim`.

    Returns:
        `scores, indices`, each `[Q, min(k, N)]`: scores at the last budget, best first, equal scores by lower index.

    Raises:
        TypeError: as `search`, and if `keep` is not a whole number.
        ValueError: as `search`, and if `keep` is less than `k` or grows from one stage to the next, or the margin is
            negative or NaN, or `exact` holds another number of documents.
        RuntimeError: as `search`.

    Example:
        >>> scores, indices = cascade(torch.eye(4)[:1], torch.eye(4).view(2, 2, 4), k=1, stages=[((1, 1), 1)])
        >>> indices
        tensor([[0]])
    """
    _check_stages(stages, k, margin)
    exact = documents if exact is None else exact
    q, last = prepare(queries, exact, budget)
    n = check_same_documents(queries, documents, exact)
    if not stages:
        found = search(queries, exact, k, budget, backend=backend)
        return CascadeResult(found.scores, found.indices, found.backend, torch.full((len(q), 1), n))
    (first, keep), *others = stages
    found = search(queries, documents, keep, first, backend=backend)
    kernel, name = choose_backend(backend, last, q)
    later = [(*prepare(queries, documents, at), keep) for at, keep in others] + [(q, last, k)]
    values, candidates, r_q = found.scores, found.indices, first[0]
    counts = torch.full((len(q),), candidates.shape[1], device=q.device)  # how many of a row are left
    scored = [torch.full_like(counts, n)]
    for vectors, stores, keep in later:
        counts = _near(values, counts, k, margin, r_q)
        waits = (counts <= k) & (stores is not last)  # there is nothing to choose, so these wait for the last stage
        scored.append(counts.masked_fill(waits, 0))
        values, candidates = values[:, :keep].clone(), candidates[:, : counts.max()] if len(q) else candidates
        at = (~waits).nonzero()[:, 0]
        best = select_candidates(vectors[at], stores, kernel, keep, _ascending(candidates[at], counts[at]), counts[at])
        candidates = candidates[:, :keep].clone()
        values[at, : best[0].shape[1]], candidates[at, : best[1].shape[1]] = best
        counts, r_q = counts.clamp(max=keep), vectors.shape[1]
    return CascadeResult(values, candidates, name, torch.stack(scored, dim=1))


def check_same_documents(queries: Any, documents: Any, exact: Any) -> int:
    """Return the number of documents, which must be the same in both."""
    n, others = (sum(map(len, prepare(queries, side, None)[1])) for side in (documents, exact))
    if n != others:
        raise ValueError(f"exact must hold the same documents, but has {others} of them where there are {n}")
    return n


def _near(scores: Tensor, counts: Tensor, k: int, margin: float | None, r_q: int) -> Tensor:
    """How many of every row of scores, best first, are within the margin of the `k`-th best."""
    if margin is None or scores.shape[1] <= k:
        return counts
    near = (scores >= scores[:, k - 1 : k] - margin * r_q).sum(dim=1)
    return torch.minimum(counts, near.clamp(min=k))


def _ascending(candidates: Tensor, counts: Tensor) -> Tensor:
    """The first `counts` of every row sorted, and the others behind them."""
    left_out = torch.arange(candidates.shape[1], device=counts.device) >= counts[:, None]
    return candidates.masked_fill(left_out, torch.iinfo(torch.int64).max).sort(dim=1).values


def _check_stages(stages: Sequence[Stage], k: int, margin: float | None) -> None:
    check_k(k)
    before = None
    for stage in stages:
        if not isinstance(stage, Sequence) or len(stage) != 2:
            raise TypeError(f"a stage must be (budget, keep) such as ((1, 1), 1000), not {stage!r}")
        keep = stage[1]
        if isinstance(keep, bool) or not isinstance(keep, int):
            raise TypeError(f"stage {stage!r}: the number of documents to keep must be an int")
        if keep < k or (before is not None and keep > before):
            raise ValueError(
                f"stage {stage!r} must keep at least k = {k} documents, and no more than the stage before"
            )
        before = keep
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin must be 0 or more, not {margin!r}")
