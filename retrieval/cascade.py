"""Cascades: a small budget narrows all documents down, and larger ones decide. They rely on trained prefixes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..scoring_metaembed import Budget
from .kernels import Step
from .search import SearchResult, check_k, prepare, run


@dataclass(frozen=True)
class Stage:
    """A stage of a cascade: score documents with a budget, and keep the best.

    Attributes:
        budget: `(query vectors, document vectors)`.
        keep: How many documents go on to the next stage.
        quantization: Of a `MultiVectorIndex` that keeps several copies of the vectors, the one to score: `"first"`,
            `"main"`, `"exact"`, or the name of a quantization that one of these has.
    """

    budget: Budget
    keep: int
    quantization: str = "main"

    @classmethod
    def of(cls, given: Any) -> Stage:
        """Make a stage of what a caller may give: a `Stage`, `(budget, keep)`, or `(budget, quantization, keep)`.

        Raises:
            TypeError: if it is none of these.
        """
        if isinstance(given, tuple | list) and len(given) == 2:
            given = cls(given[0], given[1])
        elif isinstance(given, tuple | list) and len(given) == 3:
            given = cls(given[0], given[2], "main" if given[1] is None else given[1])
        if not isinstance(given, cls):
            raise TypeError(f"a stage must be a Stage, or (budget, keep) such as ((1, 1), 1000), not {given!r}")
        if isinstance(given.keep, bool) or not isinstance(given.keep, int):
            raise TypeError(f"{given}: the number of documents to keep must be an int")
        return given


DEFAULT_STAGES = (Stage((1, 1), 1000), Stage((4, 8), 200))  # docs/performance.md has their quality and speed


def check_stages(stages: Iterable[Any], k: int) -> list[Stage]:
    """Return stages, or raise unless each keeps at least `k` documents, and no more than the one before.

    Raises:
        TypeError: if one is not a stage.
        ValueError: if it keeps too few or too many.
    """
    check_k(k)
    checked: list[Stage] = []
    for stage in map(Stage.of, stages):
        if stage.keep < k or (checked and stage.keep > checked[-1].keep):
            raise ValueError(f"{stage} must keep at least k = {k} documents, and no more than the stage before")
        checked.append(stage)
    return checked


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
    stages: Iterable[Any] = DEFAULT_STAGES,
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
        stages: Of `Stage` or `(budget, keep)`: the first scores all documents and keeps its best, the next scores
            those, and so on. Without stages this equals `search`.
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
    checked = check_stages(stages, k)
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin must be 0 or more, not {margin!r}")
    for stage in checked:
        if stage.quantization != "main":
            raise ValueError(f"{stage}: only a MultiVectorIndex keeps several copies; give less rounded ones as exact")
    exact = documents if exact is None else exact
    check_same_documents(queries, documents, exact)
    steps = [Step(*prepare(queries, documents, stage.budget), stage.keep) for stage in checked]
    scores, indices, scored, name = run([*steps, Step(*prepare(queries, exact, budget), k)], None, margin, backend)
    return CascadeResult(scores, indices, name, scored)


def check_same_documents(queries: Any, documents: Any, exact: Any) -> int:
    """Return the number of documents, which must be the same in both."""
    n, others = (sum(map(len, prepare(queries, side, None)[1])) for side in (documents, exact))
    if n != others:
        raise ValueError(f"exact must hold the same documents, but has {others} of them where there are {n}")
    return n
