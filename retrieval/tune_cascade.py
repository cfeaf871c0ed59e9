"""Find the cheapest cascade for a target recall, on the user's own documents and queries: measure, choose, verify."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configuration_metaembed import DEFAULT_BUDGETS
from ..scoring_metaembed import Budget, as_stack
from .cascade import Stage, cascade, check_same_documents
from .kernels import Step
from .search import check_k, prepare, run

_DEEPEST = 1 << 14  # documents that a stage keeps at most
_LONGEST = 3  # stages before the final scores
_TIMED = 25  # queries that a cost is measured on
_VERIFIED = 8  # cascades that reach the recall, of which the fastest is returned: costs are only estimates

Scan = tuple[Budget, str]  # a budget, and the copy of the documents that it scores


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
        stages: What to pass to `cascade`, or to the search of the index; empty if nothing is cheaper than scoring
            everything.
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

    Half of the queries choose the stages and the other half verify them, and time the cheapest that pass.

    Args:
        documents: As in `maxsim`, or a `MultiVectorIndex`, of which stages may use all copies of the vectors.
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
    stack = as_stack(queries, "queries")
    task = _Task.of(documents, exact, stack, k, budget, backend)
    if len(stack) < 2 or task.available == 0:
        raise ValueError(f"there must be at least 2 queries and a document, not {len(stack)} and {task.available}")
    chosen_on, verified_on = stack[::2], stack[1::2]

    scans = task.scans(budgets)
    truth = task.best(chosen_on, [task.final])
    depth = min(task.available, _DEEPEST)
    ranks = {scan: _ranks(task.best(chosen_on, [Stage(scan[0], depth, scan[1])]), truth) for scan in scans}
    costs = task.measure(chosen_on, scans)
    curve = _cheapest(_chains(ranks, costs, task.full, k, depth))

    truth = task.best(verified_on, [task.final])
    one_by_one = verified_on[:50].split(1)
    full_time = _median_time(partial(task.search, x, ()) for x in one_by_one)
    fastest, verified = TunedCascade((), 1.0, full_time * 1e3, full_time * 1e3, tuple(curve)), 0
    for option in curve:
        if option.recall < target_recall or not option.stages:
            continue
        recall = _recall(task.best(verified_on, [*option.stages, task.final]), truth)
        if recall >= target_recall:
            spent = 1e3 * _median_time(partial(task.search, x, option.stages) for x in one_by_one)
            if spent < fastest.milliseconds:
                fastest = replace(fastest, stages=option.stages, recall=recall, milliseconds=spent)
            verified += 1
            if verified == _VERIFIED:
                break
    return fastest


@dataclass(frozen=True)
class _Cost:
    """Seconds for one query: to score all documents, to begin rescoring some, and for each of them."""

    scan: float
    start: float = 0.0
    each: float = 0.0


@dataclass(frozen=True)
class _Task:
    """What is tuned: the documents, and how a user searches them."""

    copies: Mapping[str, Any]  # of the documents, by role
    allowed: Tensor | None
    available: int
    full: Scan
    k: int
    backend: str
    search: Callable[[Tensor, Sequence[Stage]], Any]

    @classmethod
    def of(cls, documents: Any, exact: Any, queries: Tensor, k: int, budget: Budget | None, backend: str) -> _Task:
        if hasattr(documents, "copies"):  # a MultiVectorIndex
            if exact is not None:
                raise ValueError("an index keeps its own exact copy: create it with one, and leave out exact")
            copies, allowed = documents.copies()
            best = "exact" if "exact" in copies else "main"
            options = {"k": k, "budget": budget, "backend": backend}
            find = lambda x, stages: documents.search(x, stages=stages, **options)  # noqa: E731
        else:
            best, allowed = ("main" if exact is None else "exact"), None
            copies = {"main": documents, "exact": documents if exact is None else exact}
            check_same_documents(queries, documents, copies["exact"])
            options = {"k": k, "budget": budget, "exact": exact, "backend": backend}
            find = lambda x, stages: cascade(x, documents, stages=stages, **options)  # noqa: E731
        q, stores = prepare(queries, copies[best], budget)
        full = (q.shape[1], stores[0].vectors if stores else 0)
        available = sum(map(len, stores)) if allowed is None else int(allowed.sum())
        return cls(copies, allowed, available, (full, best), k, backend, find)

    @property
    def final(self) -> Stage:
        return Stage(self.full[0], self.k, self.full[1])

    def scans(self, budgets: Sequence[Budget] | None) -> list[Scan]:
        """What stages may score: smaller budgets of every copy, and the full one of less exact copies."""
        (r_q, r_c), best = self.full
        if budgets is None:
            pairs = [(q, c) for q, c in DEFAULT_BUDGETS[:-1] if q <= r_q]
            budgets = [b for b in dict.fromkeys(pairs + [(r_q, c) for _, c in pairs]) if b[1] < r_c]
            if best == "exact" and self.copies["main"] is not self.copies["exact"]:
                budgets.append((r_q, r_c))
        every = [(b, role) for role in self.copies for b in ((b[0], b[1]) for b in budgets)]
        fewest = {role: _vectors(copy) for role, copy in self.copies.items()}
        usable = [s for s in every if s[1] != "exact" and (s[1] != "first" or s[0][1] <= fewest["first"])]
        return [scan for scan in usable if scan != self.full]

    def best(self, queries: Tensor, stages: Sequence[Stage]) -> Tensor:
        """Positions of what a cascade of these stages, the final one included, finds."""
        steps = [Step(*prepare(queries, self.copies[s.quantization], s.budget), s.keep) for s in stages]
        return run(steps, self.allowed, None, self.backend)[1]

    def measure(self, queries: Tensor, scans: Sequence[Scan]) -> dict[Scan, _Cost]:
        """What everything costs. Rescoring is measured behind the first scan, whose own time is taken off."""
        some = queries[:_TIMED].split(1)
        few, many = min(self.available, 32), min(self.available, 1024)

        def seconds(*stages: tuple[Scan, int]) -> float:
            cascade_of = [Stage(budget, keep, role) for (budget, role), keep in stages]
            return _median_time(partial(self.best, x, cascade_of) for x in some)

        costs = {scan: _Cost(seconds((scan, min(self.available, 1000)))) for scan in scans}
        costs[self.full] = _Cost(_median_time(partial(self.best, x, [self.final]) for x in some[:9]))
        if scans:
            first = min(scans, key=lambda scan: costs[scan].scan)
            alone = {m: seconds((first, m)) for m in (few, many)}
            for scan, cost in costs.items():
                less, more = (max(0.0, seconds((first, m), (scan, 1)) - alone[m]) for m in (few, many))
                each = max(0.0, more - less) / max(1, many - few)
                costs[scan] = _Cost(cost.scan, max(0.0, less - few * each), each)
        return costs


def _vectors(copy: Any) -> int:
    return int(getattr(copy, "vectors", 0))


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


def _median_time(calls: Iterable[Callable[[], Any]]) -> float:
    calls = list(calls)
    calls[0]()
    seconds = []
    for call in calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _chains(
    ranks: Mapping[Scan, Tensor], costs: Mapping[Scan, _Cost], full: Scan, k: int, depth: int
) -> Iterator[TunedStages]:
    """Yield the cascades worth considering. The rank of a document among all bounds its rank among those left."""
    yield TunedStages((), 1.0, costs[full].scan * 1e3)
    steps = max(1, math.ceil(math.log(max(depth / k, 1), 1.5)))
    keeps = np.array(sorted({min(depth, math.ceil(k * 1.5**i)) for i in range(steps + 1)}))
    # How many of the keeps are too few for each true document; one that no keep saves counts as lost.
    short = {scan: np.searchsorted(keeps, rank.numpy(), side="right") for scan, rank in ranks.items()}
    order = sorted(ranks, key=lambda scan: costs[scan].scan)
    for length in range(1, _LONGEST + 1):
        sizes = np.meshgrid(*[np.arange(len(keeps))] * length, indexing="ij")
        falling = np.logical_and.reduce(
            [a > b for a, b in itertools.pairwise(sizes)] or [np.ones_like(sizes[0], bool)]
        )
        for chain in itertools.combinations(order, length):
            seconds = costs[chain[0]].scan + sum(
                costs[scan].start + costs[scan].each * keeps[size]
                for scan, size in zip((*chain[1:], full), sizes, strict=True)
            )
            alive = np.zeros([len(keeps) + 1] * length)
            np.add.at(alive, tuple(short[scan] for scan in chain), 1 / len(ranks[chain[0]]))
            for axis in range(length):
                alive = alive.cumsum(axis)
            recalls = alive[(slice(-1),) * length]
            useful = np.argwhere(falling & (seconds < costs[full].scan))
            for at in map(tuple, useful[_front(seconds[tuple(useful.T)], recalls[tuple(useful.T)])]):
                stages = tuple(Stage(scan[0], int(keeps[i]), scan[1]) for scan, i in zip(chain, at, strict=True))
                yield TunedStages(stages, min(1.0, float(recalls[at])), float(seconds[at]) * 1e3)


def _front(costs: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Places of the options that no other beats in both, cheapest first."""
    order = np.lexsort((-recalls, costs))
    best = np.maximum.accumulate(recalls[order])
    return order[np.r_[True, best[1:] > best[:-1]][: len(order)]]


def _cheapest(options: Iterable[TunedStages]) -> list[TunedStages]:
    """Return the options that no other beats in both recall and cost, cheapest first."""
    every = list(options)
    costs, recalls = (np.array([getattr(o, name) for o in every]) for name in ("milliseconds", "recall"))
    return [every[i] for i in _front(costs, recalls)]
