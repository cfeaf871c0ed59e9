"""Exact search over documents of any quantization, with a kernel if one is available, else with torch.

Documents are a tensor, or an index: anything with the attributes of `Documents`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from ..scoring_metaembed import Budget, as_stack, check_finite, cut_queries, torch_scores
from .kernels import Kernel, SelectingKernel, Slab, Step, Store, choose_kernel, kernel_name
from .quantization import decode, round_queries

Positions: TypeAlias = "Tensor | Sequence[int]"  # of documents: whole numbers, or a bool for every document

_BLOCK_SCORES = 1 << 22  # the approximate number of scores in memory at a time


@runtime_checkable
class Documents(Protocol):
    """The interface of an index that can be searched."""

    vectors: int  # of a document
    input_dim: int  # dimensions of queries

    @property
    def stores(self) -> Sequence[Store]:
        """The documents, in order."""

    @property
    def device(self) -> torch.device:
        """Device of the documents."""

    def project(self, embeddings: Tensor) -> Tensor:
        """Apply the projection of the documents to queries `[..., input_dim]`: `[..., dim]`."""


@dataclass(frozen=True, eq=False, repr=False)
class SearchResult:
    """Result of `search`. Unpacks as `scores, indices`.

    Attributes:
        scores: `[Q, k]` float32, best first.
        indices: `[Q, k]` int64, positions in the documents; equal scores are ordered by position.
        backend: Name of the kernel, or torch, that computed the scores.
    """

    scores: Tensor
    indices: Tensor
    backend: str

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.scores, self.indices))

    def __repr__(self) -> str:
        queries, k = self.scores.shape
        return f"{type(self).__name__}(queries={queries}, k={k}, backend={self.backend!r})"


def score_all(queries: Any, documents: Any, budget: Budget | None, backend: str) -> Tensor:
    """Score every query against every document: `maxsim` for indexes and kernels, with its arguments."""
    q, stores = prepare(queries, documents, budget)
    kernel, _ = choose_backend(backend, stores, q)
    out = torch.empty(len(q), sum(map(len, stores)), device=q.device)
    start = 0
    for store in stores:
        for part, scores in _blocks(q, store, kernel):
            out[:, start + part.start : start + part.stop] = scores
        start += len(store)
    return out


@torch.no_grad()
def search(
    queries: Any,
    documents: Any,
    k: int,
    budget: Budget | None = None,
    *,
    include: Positions | None = None,
    exclude: Positions | None = None,
    backend: str = "auto",
) -> SearchResult:
    """Find the `k` best documents of every query, exactly, in bounded memory.

    Args:
        queries: As in `maxsim`.
        documents: As in `maxsim`.
        k: How many documents to return for a query; all documents, if there are fewer.
        budget: As in `maxsim`.
        include: Search only these positions: whole numbers, or a bool for every document.
        exclude: Leave these out, in the same forms. `EmbeddingCollection.positions` gives the positions of ids.
        backend: As in `maxsim`.

    Returns:
        `scores, indices`, each `[Q, min(k, N)]`, float32 and int64, best first, equal scores by lower index.

    Raises:
        TypeError: as `maxsim`, and if `k` or a position is not a whole number.
        ValueError: as `maxsim`, and if `k` is less than 1 or a position is out of range.
        RuntimeError: as `maxsim`.

    Example:
        >>> scores, indices = search(torch.eye(2)[1:], torch.eye(2)[:, None], k=1)
        >>> indices
        tensor([[1]])
    """
    check_k(k)
    q, stores = prepare(queries, documents, budget)
    allowed = _allowed(include, exclude, sum(map(len, stores)))
    scores, indices, _, name = run([Step(q, stores, k)], allowed, backend=backend)
    return SearchResult(scores, indices, name)


@torch.no_grad()
def rescore(
    queries: Any, documents: Any, candidates: Tensor, budget: Budget | None = None, *, backend: str = "auto"
) -> Tensor:
    """Score every query against its own candidates.

    Args:
        queries: As in `maxsim`.
        documents: As in `maxsim`.
        candidates: `[Q, m]` int64, positions of documents, such as the indices that `search` returns.
        budget: As in `maxsim`.
        backend: As in `maxsim`.

    Returns:
        `[Q, m]` float32.

    Raises:
        TypeError: as `maxsim`, and if candidates are not whole numbers.
        ValueError: as `maxsim`, and if candidates are not `[Q, m]` or a position is out of range.
        RuntimeError: as `maxsim`.

    Example:
        >>> rescore(torch.eye(2)[:, None], torch.eye(2)[:, None], torch.tensor([[1], [1]]))
        tensor([[0.],
                [1.]])
    """
    q, stores = prepare(queries, documents, budget)
    kernel, _ = choose_backend(backend, stores, q)
    if not isinstance(candidates, Tensor) or candidates.dtype != torch.int64:
        raise TypeError("candidates must be an int64 tensor of positions")
    if candidates.ndim != 2 or len(candidates) != len(q):
        raise ValueError(f"candidates must be [{len(q)}, m], a row for every query, not {list(candidates.shape)}")
    check_positions(candidates, sum(map(len, stores)))
    return torch.stack([score_some(one[None], stores, some, kernel) for one, some in zip(q, candidates, strict=True)])


def score_some(query: Tensor, stores: Sequence[Store], which: Tensor, kernel: Kernel | None) -> Tensor:
    """Score one prepared query `[1, r_q, D]` against the documents `which` `[m]`: `[m]`."""
    out = torch.empty(len(which), device=query.device)
    start = 0
    for store in stores:
        here = slice(None) if len(stores) == 1 else (which >= start) & (which < start + len(store))
        index = which[here] - start
        parts = [scores[0] for _, scores in _blocks(query, store, kernel, index)]
        out[here] = torch.cat(parts) if parts else out.new_empty(0)
        start += len(store)
    return out


def run(
    steps: Sequence[Step], allowed: Tensor | None = None, margin: float | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, str]:
    """Score all documents, keep the best, score those again, and so on: every search is this.

    Args:
        steps: Of the same documents; the last one keeps `k`.
        allowed: `[N]` bool: the documents that may be found, or `None` for all.
        margin: As in `cascade`.
        backend: As in `maxsim`.

    Returns:
        Scores and positions, each `[Q, min(k, allowed documents)]`, best first, equal scores by position;
        how many documents each step scored `[Q, steps]`; and the name of the backend.
    """
    chosen = [choose_backend(backend, step.stores, step.queries) for step in steps]
    kernels, name = [kernel for kernel, _ in chosen], chosen[-1][1]
    if _selects(kernels[0]) and all(one is kernels[0] for one in kernels) and all(map(_alike, steps)):
        return *kernels[0].cascade(steps, allowed, margin), name
    return *_run_with_torch(steps, kernels, allowed, margin), name


def _selects(kernel: Kernel | None) -> TypeGuard[SelectingKernel]:
    return hasattr(kernel, "cascade")  # isinstance with a protocol takes longer than all else that a search does here


def _alike(step: Step) -> bool:
    return len({(store.quantization, len(store.slabs)) for store in step.stores}) == 1


def _run_with_torch(
    steps: Sequence[Step], kernels: Sequence[Kernel | None], allowed: Tensor | None, margin: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `SelectingKernel.cascade`: the reference, and the way for all other kernels."""
    first, k = steps[0], steps[-1].keep
    values, places = _select(first, kernels[0], allowed)
    n = sum(map(len, first.stores)) if allowed is None else int(allowed.sum())
    scored = torch.zeros(len(values), len(steps), dtype=torch.int64, device=values.device)
    scored[:, 0] = n
    best = []
    for q, (scores, kept) in enumerate(zip(values, places, strict=True)):
        for i, step in enumerate(steps[1:], start=1):
            if margin is not None and len(kept) > k:
                kept = kept[scores >= scores[k - 1] - margin * steps[i - 1].queries.shape[1]]
            if len(kept) <= k and i + 1 < len(steps):
                continue  # there is nothing to choose, only to score at last
            scored[q, i] = len(kept)
            kept = kept.sort().values
            again = score_some(step.queries[q : q + 1], step.stores, kept, kernels[i])
            scores, order = (x[0] for x in top_k(again[None], step.keep))
            kept = kept[order]
        best.append((scores, kept))
    if len(steps) > 1 and best:
        values, places = (torch.stack(parts) for parts in zip(*best, strict=True))
    return values[:, :k], places[:, :k], scored


def _select(step: Step, kernel: Kernel | None, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores and positions of the best documents of every query, of those that are allowed."""
    best = top_k(step.queries.new_empty(len(step.queries), 0), step.keep)
    start = 0
    for store in step.stores:
        here = None if allowed is None else allowed[start : start + len(store)].nonzero()[:, 0]
        for part, scores in _blocks(step.queries, store, kernel, here):
            values, found = top_k(scores, step.keep)
            found = found + part.start if here is None else here.to(found.device)[part][found]
            best = merge_top_k(best, (values, found + start), step.keep)
        start += len(store)
    return best


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `min(k, N)` largest of `scores` `[Q, N]` and their positions; equal scores by position."""
    n = scores.shape[1]
    if k >= n:
        values, indices = torch.sort(scores, dim=1, descending=True, stable=True)
        return values, indices
    values, indices = torch.topk(scores, k + 1, dim=1)
    tied = values[:, k - 1] == values[:, k]  # torch.topk may return either of them
    indices = indices[:, :k].sort(dim=1).values
    values, order = torch.sort(scores.gather(1, indices), dim=1, descending=True, stable=True)
    indices = indices.gather(1, order)
    if tied.any():
        exact = torch.sort(scores[tied], dim=1, descending=True, stable=True)
        values[tied], indices[tied] = exact.values[:, :k], exact.indices[:, :k]
    return values, indices


def merge_top_k(first: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Merge two results of `top_k`, of which the first holds the lower positions."""
    values = torch.cat([first[0], later[0]], dim=1)
    indices = torch.cat([first[1], later[1]], dim=1)
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    return values[:, :k], indices.gather(1, order)[:, :k]


def prepare(queries: Any, documents: Any, budget: Budget | None) -> tuple[Tensor, list[Store]]:
    """Check both sides and cut them to the budget: queries `[Q, r_q, D]` float32, and stores of `r_c` vectors."""
    if not hasattr(documents, "stores"):
        d = as_stack(documents, "documents")
        q, r_c = cut_queries(queries, budget, d.shape[1:], d.device)
        quantization = "bfloat16" if d.dtype == torch.bfloat16 else "float32"
        return q, [Store([Slab(d[:, :r_c], None)], quantization, d.shape[2], checked=False)]
    q, r_c = cut_queries(queries, budget, (documents.vectors, documents.input_dim), documents.device)
    return documents.project(q), [store.prefix(r_c) for store in documents.stores]


def choose_backend(backend: str, stores: Sequence[Store], queries: Tensor) -> tuple[Kernel | None, str]:
    """Return the kernel for the queries' device, or `None` for torch, and the name that results carry.

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if a kernel was asked for by name and is unavailable.
    """
    if backend not in ("auto", "torch", "compiled", "fused"):
        raise ValueError(f"backend must be 'auto', 'torch', 'compiled' or 'fused', not {backend!r}")
    device = queries.device
    name = kernel_name(device)
    if backend == "torch" or (backend == "auto" and not name):
        return None, f"torch ({device.type})"
    choice: Kernel | str = f"it is not for documents on {device.type}"
    if backend in ("auto", name):
        stored = (tensor for store in stores for tensor in store.kinds)
        choice = choose_kernel(device, stored, queries.shape[1], queries.shape[2])
    if not isinstance(choice, str):
        used = ", ".join(dict.fromkeys(choice.instructions[store.quantization] for store in stores))
        return choice, f"{name} ({used})" if used else name
    if backend != "auto":
        raise RuntimeError(f"backend={backend!r} is unavailable: {choice}")
    return None, f"torch ({device.type}); not {name}: {choice}"


def _blocks(
    queries: Tensor, store: Store, kernel: Kernel | None, index: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield `(part, scores [Q, n])` over the documents, or over those of the index, a bounded number at a time."""
    n = len(store) if index is None else len(index)
    block = max(1, _BLOCK_SCORES // max(1, len(queries)))
    for start in range(0, n, block):
        part = slice(start, min(start + block, n))
        some = store.pick(part) if index is None else store
        at = None if index is None else index[part]
        if kernel is None:
            yield part, _torch_scores(queries, some, at)
        else:
            slabs = [(slab.stored, slab.scales) for slab in some.slabs]
            yield part, kernel.scores(slabs, queries, store.quantization, at, check=not store.checked)


def _torch_scores(queries: Tensor, store: Store, index: Tensor | None) -> Tensor:
    """Scores `[Q, n]` of all documents, or of those of the index `[n]`."""

    def read(part: slice) -> Iterator[Tensor]:
        for slab in store.pick(part if index is None else index[part].to(queries.device)).slabs:
            rows = decode(slab.stored, slab.scales, store.quantization, store.dim)
            yield rows if store.checked else check_finite(rows, "documents")

    n = len(store) if index is None else len(index)
    return torch_scores(round_queries(queries, store.quantization), n, store.vectors, read)


def _allowed(include: Positions | None, exclude: Positions | None, n: int) -> Tensor | None:
    """A bool for every document, whether to search it, or `None` for all."""
    if include is None and exclude is None:
        return None
    mask = torch.ones(n, dtype=torch.bool) if include is None else _mask(include, n, "include")
    if exclude is not None:
        mask = mask & ~_mask(exclude, n, "exclude")
    return mask


def _mask(positions: Positions, n: int, name: str) -> Tensor:
    if isinstance(positions, (str, list, tuple)) and any(isinstance(position, str) for position in positions):
        raise TypeError(
            f"{name} must be positions (whole numbers), got ids: search a MultiVectorIndex, which takes {name}_ids."
        )
    at = torch.as_tensor(positions).cpu()
    if at.dtype == torch.bool and at.shape == (n,):
        return at
    if at.numel() == 0 and at.ndim == 1:
        return torch.zeros(n, dtype=torch.bool)
    if at.dtype.is_floating_point or at.dtype.is_complex or at.ndim != 1 or at.dtype == torch.bool:
        raise TypeError(f"{name} must be positions (whole numbers), or a bool for each of the {n} documents")
    check_positions(at, n)
    return torch.zeros(n, dtype=torch.bool).index_fill_(0, at.long(), True)


def check_positions(positions: Tensor, n: int) -> None:
    """Raise unless all positions are from 0 to `n - 1`."""
    if positions.numel() and not (int(positions.min()) >= 0 and int(positions.max()) < n):
        raise ValueError(f"positions must be from 0 to {n - 1}, but {positions.min()} to {positions.max()} were given")


def check_k(k: int) -> None:
    """Raise unless `k` is a number of documents."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, not {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
