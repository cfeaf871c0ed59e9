"""Coarse to fine: a small budget narrows all documents down, larger ones decide. Trained prefixes make it work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..scoring_metaembed import Budget
from .search import SearchResult, check_k, choose_backend, prepare, score_some, search, top_k

Stage = tuple[Budget, int]  # (budget, how many documents it keeps)

DEFAULT_STAGES: tuple[Stage, ...] = (((1, 1), 1000), ((4, 8), 200))  # docs/performance.md has what they give


@dataclass(frozen=True, eq=False, repr=False)
class CascadeResult(SearchResult):
    """What `cascade` found. Unpacks as `scores, indices`.

    Attributes:
        scored: `[Q, stages + 1]` int64, how many documents each stage, and at last the budget, scored for a query.
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
    """Find nearly what `search` at the same budget finds, for a fraction of the work.

    Args:
        queries: As in `maxsim`.
        documents: As in `maxsim`.
        k: How many documents to return for a query.
        budget: What the last documents are scored with: all vectors by default.
        stages: `(budget, keep)`: the first scores all documents and keeps its best, the next scores those, and so on.
            With no stages this is `search`.
        margin: Adaptive. After each stage a query keeps, of `keep` at most, only documents whose mean similarity (the
            score divided by the query vectors of the stage) is within the margin of its `k`-th best. An easy query is
            left with `k` and skips the other stages, a hard one goes through all. `None` keeps `keep`.
        exact: The same documents in the same order at a higher precision, from which the last documents are scored:
            few are read, so they may stay on disk while `documents` are kept small and near.
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
    later = [(*prepare(queries, documents, at), at[0], keep) for at, keep in others] + [(q, last, q.shape[1], k)]
    scores, indices, scored = [], [], []
    for i, (values, candidates) in enumerate(zip(*found, strict=True)):
        counts, r_q = [n], first[0]
        for vectors, stores, next_r_q, keep in later:
            candidates = _near(values, candidates, k, margin, r_q).sort().values
            if len(candidates) <= k and stores is not last:
                counts.append(0)
                continue
            values, order = top_k(score_some(vectors[i : i + 1], stores, candidates, kernel)[None], keep)
            counts.append(len(candidates))
            values, candidates, r_q = values[0], candidates[order[0]], next_r_q
        scores.append(values)
        indices.append(candidates)
        scored.append(counts)
    if not scores:
        nothing = torch.empty(0, len(later) + 1, dtype=torch.int64)
        return CascadeResult(q.new_empty(0, min(k, n)), found.indices[:, :k], name, nothing)
    return CascadeResult(torch.stack(scores), torch.stack(indices), name, torch.tensor(scored))


def check_same_documents(queries: Any, documents: Any, exact: Any) -> int:
    """Return how many documents there are, if both hold as many."""
    n, others = (sum(map(len, prepare(queries, side, None)[1])) for side in (documents, exact))
    if n != others:
        raise ValueError(f"exact must hold the same documents, but has {others} of them where there are {n}")
    return n


def _near(scores: Tensor, candidates: Tensor, k: int, margin: float | None, r_q: int) -> Tensor:
    """Of candidates, best first, those within the margin of the `k`-th best."""
    if margin is None or len(candidates) <= k:
        return candidates
    return candidates[scores >= scores[k - 1] - margin * r_q]


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
