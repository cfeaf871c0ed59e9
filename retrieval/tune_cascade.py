"""Find the cheapest cascade for a target recall, on the user's own documents and queries."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..configuration_metaembed import DEFAULT_BUDGETS
from ..scoring_metaembed import Budget, as_stack
from .cascade import Stage, cascade, check_same_documents
from .search import check_k, prepare, rescore, search

_DEEPEST = 4096  # documents that a stage keeps at most


@dataclass(frozen=True)
class TunedStages:
    """A cascade, with its `recall` of the true best `k` and its `milliseconds` for one query at a time."""

    stages: tuple[Stage, ...]
    recall: float
    milliseconds: float


@dataclass(frozen=True)
class TunedCascade(TunedStages):
    """Result of `tune_cascade`.

    Attributes:
        stages: What to pass to `cascade`; empty if nothing is cheaper than scoring everything.
        recall: Measured on the queries that were not tuned on.
        milliseconds: Measured, the median of those queries.
        full_milliseconds: The same for `search` at the full budget.
        curve: The cheapest stages for every recall, with their estimated recall and cost; cheapest first.
    """

    full_milliseconds: float
    curve: tuple[TunedStages, ...]


@torch.no_grad()
def tune_cascade(
    documents: Any,
    queries: Any,
    target_recall: float,
    k: int = 10,
    budget: Budget | None = None,
    *,
    budgets: Sequence[Budget] | None = None,
    exact: Any = None,
    backend: str = "auto",
) -> TunedCascade:
    """Find the cheapest stages that keep a share of the best `k` documents, on your own data.

    Half of the queries choose the stages and the other half verify them; costlier ones replace those that fail.

    Args:
        documents: As in `maxsim`.
        queries: At least 2, as in `maxsim`; a hundred or more make the answer dependable.
        target_recall: The share of the `k` documents found by `search` at the full budget, from 0 to 1.
        k: How many documents a search returns.
        budget: The full budget: all vectors by default.
        budgets: What stages may use: by default (1, 1), (2, 4), (4, 8), (8, 16), and as many document vectors with all
            query vectors, as far as they are smaller than the full budget.
        exact: As in `cascade`: recall is then the share of what `search` finds in it.
        backend: As in `maxsim`.

    Returns:
        A `TunedCascade`.

    Raises:
        TypeError: as `search`.
        ValueError: as `search`, and if the recall is not from 0 to 1 or there are fewer than 2 queries.
    """
    check_k(k)
    if not 0 <= target_recall <= 1:
        raise ValueError(f"target_recall must be from 0 to 1, not {target_recall!r}")
    exact = documents if exact is None else exact
    q, stores = prepare(queries, exact, budget)
    full, n = (q.shape[1], stores[0].vectors if stores else 0), check_same_documents(queries, documents, exact)
    if len(q) < 2 or n == 0:
        raise ValueError(f"there must be at least 2 queries and a document, not {len(q)} and {n}")
    if budgets is None:
        pairs = [(r, c) for r, c in DEFAULT_BUDGETS[:-1] if r <= full[0]]
        budgets = [b for b in dict.fromkeys(pairs + [(full[0], c) for _, c in pairs]) if b[1] < full[1]]
    for tried in budgets:
        prepare(queries, exact, tried)  # raises if it does not fit
    budgets = [(b[0], b[1]) for b in budgets]
    raw = as_stack(queries, "queries")
    chosen_on, verified_on = raw[::2], raw[1::2]

    truth = search(chosen_on, exact, k, full, backend=backend).indices
    depth = min(n, _DEEPEST)
    ranks = {b: _ranks(search(chosen_on, documents, depth, b, backend=backend).indices, truth) for b in budgets}
    costs = {b: _measure_cost(chosen_on, documents, b, backend) for b in budgets}
    costs[full] = _measure_cost(chosen_on, exact, full, backend)
    curve = _cheapest(_candidates(ranks, costs, full, k, depth))

    truth = search(verified_on, exact, k, full, backend=backend).indices
    one_by_one = verified_on[:50].split(1)
    full_time = _median_time(partial(search, x, exact, k, full, backend=backend) for x in one_by_one)
    for option in curve:
        if option.recall < target_recall:
            continue
        options = {"budget": full, "stages": option.stages, "exact": exact, "backend": backend}
        run = partial(cascade, documents=documents, k=k, **options)
        recall = _recall(run(verified_on).indices, truth)
        if recall >= target_recall:
            spent = _median_time(partial(run, x) for x in one_by_one)
            if spent < full_time:
                return TunedCascade(option.stages, recall, spent * 1e3, full_time * 1e3, tuple(curve))
    return TunedCascade((), 1.0, full_time * 1e3, full_time * 1e3, tuple(curve))


def _ranks(found: Tensor, truth: Tensor) -> Tensor:
    """Return the ranks in `found` `[Q, depth]` of `truth` `[Q, k]`: `[Q * k]`, the depth where it is missing."""
    depth = found.shape[1]
    ranks = torch.full(truth.shape, depth)
    for j in range(truth.shape[1]):
        there = found == truth[:, j : j + 1]
        ranks[:, j] = torch.where(there.any(dim=1), there.int().argmax(dim=1), depth)
    return ranks.flatten()


def _recall(found: Tensor, truth: Tensor) -> float:
    return (_ranks(found, truth) < found.shape[1]).double().mean().item()


@dataclass(frozen=True)
class _Cost:
    """Seconds for one query: to score all documents, to begin rescoring some, and for each of them."""

    scan: float
    start: float
    each: float


def _measure_cost(queries: Tensor, documents: Any, budget: Budget, backend: str) -> _Cost:
    n = sum(map(len, prepare(queries, documents, budget)[1]))
    few, many = min(n, 32), min(n, 1024)
    some = queries[:9].split(1)
    scan = _median_time(partial(search, x, documents, min(n, 100), budget, backend=backend) for x in some)
    seconds = []
    for m in (few, many):
        at = [torch.randint(0, n, (1, m)).sort().values for _ in some]
        calls = [partial(rescore, x, documents, p, budget, backend=backend) for x, p in zip(some, at, strict=True)]
        seconds.append(_median_time(calls))
    each = max(0.0, seconds[1] - seconds[0]) / max(1, many - few)
    return _Cost(scan, max(0.0, seconds[0] - few * each), each)


def _median_time(calls: Iterable[Callable[[], Any]]) -> float:
    calls = list(calls)
    calls[0]()
    seconds = []
    for call in calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _candidates(
    ranks: dict[Budget, Tensor], costs: dict[Budget, _Cost], full: Budget, k: int, depth: int
) -> Iterator[TunedStages]:
    """Yield all chains of up to three stages. The rank of a document among all bounds its rank among those left."""
    steps = max(1, math.ceil(math.log(max(depth / k, 1), 1.5)))
    keeps = sorted({min(depth, math.ceil(k * 1.5**i)) for i in range(steps + 1)})
    survives = {(b, keep): ranks[b] < keep for b in ranks for keep in keeps}
    order = sorted(ranks, key=lambda b: costs[b].scan)
    yield TunedStages((), 1.0, costs[full].scan * 1e3)
    for length in (1, 2, 3):
        for chain in itertools.combinations(order, length):
            for sizes in itertools.combinations(reversed(keeps), length):
                seconds = costs[chain[0]].scan
                for b, incoming in zip((*chain[1:], full), sizes, strict=True):
                    seconds += costs[b].start + costs[b].each * incoming
                if seconds >= costs[full].scan:
                    continue
                alive = torch.stack([survives[stage] for stage in zip(chain, sizes, strict=True)]).all(dim=0)
                stages = tuple(zip(chain, sizes, strict=True))
                yield TunedStages(stages, alive.double().mean().item(), seconds * 1e3)


def _cheapest(options: Iterator[TunedStages]) -> list[TunedStages]:
    """Return the options that no other beats in both recall and cost, cheapest first."""
    front: list[TunedStages] = []
    for option in sorted(options, key=lambda o: (o.milliseconds, -o.recall)):
        if not front or option.recall > front[-1].recall:
            front.append(option)
    return front
