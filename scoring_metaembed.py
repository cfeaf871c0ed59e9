"""MaxSim at any budget, and exact top-k search. Tensors in, tensors out; this file knows no model.

Documents are a tensor, or anything with `stores` (a list of `Store`) and `rotate` (what was done to the documents, for
queries), such as an `EmbeddingCollection`. The compiled kernel is used where it is at hand and torch everywhere else.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

try:  # the file travels with checkpoints, and its folders do not
    from metaembed.retrieval.quantization import decode, round_queries
except ImportError:  # without the package, documents are floats

    def decode(stored: Tensor, *_: Any) -> Tensor:
        """Return float vectors as they are."""
        return stored

    def round_queries(queries: Tensor, *_: Any) -> Tensor:
        """Return float vectors as they are."""
        return queries


Budget = tuple[int, int]  # (query vectors, document vectors)
Positions: TypeAlias = "Tensor | Sequence[int]"  # of documents: whole numbers, or a bool for every document

_CACHE_FLOATS = 1 << 20  # products are made this many at a time (4 MiB in float32), so that they stay in the cache
_MOST_FLOATS = 1 << 22  # numbers of documents that are widened to float32 at a time
_FEW = 64  # query vectors for which a product of matrices for each document is the fastest
_KERNELS = {"cpu": ("compiled", ".retrieval.kernels.cpu"), "cuda": ("fused", ".retrieval.kernels.cuda")}
_BLOCK_SCORES = 1 << 22  # `search` holds at most about this many scores at once


@dataclass(frozen=True)
class Slab:
    """Some consecutive vectors of every document: `stored` `[n, vectors, ...]`, `scales` `[n, vectors]` or `None`."""

    stored: Tensor
    scales: Tensor | None


@dataclass(frozen=True)
class Store:
    """Documents of one precision, as slabs of their first vectors, their next ones, and so on."""

    slabs: Sequence[Slab]
    precision: str
    dim: int
    checked: bool  # nothing in it is NaN or infinite

    def __len__(self) -> int:
        return len(self.slabs[0].stored)

    @property
    def vectors(self) -> int:
        """How many vectors a document has."""
        return sum(slab.stored.shape[1] for slab in self.slabs)

    def prefix(self, r_c: int) -> Store:
        """The first `r_c` vectors of every document. Copies nothing."""
        slabs = []
        for slab in self.slabs:
            used = min(r_c, slab.stored.shape[1])
            slabs.append(Slab(slab.stored[:, :used], None if slab.scales is None else slab.scales[:, :used]))
            r_c -= used
            if not r_c:
                break
        return Store(slabs, self.precision, self.dim, self.checked)

    def pick(self, which: slice | Tensor) -> Store:
        """Some of the documents. A slice copies nothing."""
        slabs = [Slab(s.stored[which], None if s.scales is None else s.scales[which]) for s in self.slabs]
        return Store(slabs, self.precision, self.dim, self.checked)


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
        return f"{type(self).__name__}(queries={queries}, k={k}, backend={self.backend!r})"


@torch.no_grad()
def maxsim(queries: Any, documents: Any, budget: Budget | None = None, *, backend: str = "auto") -> Tensor:
    """Score every query against every document by late interaction, `sum_i max_j <q_i, d_j>`.

    Args:
        queries: `[Q, R_q, D]`, or one query `[R_q, D]`, or a list of equal `[R_q, D]`; tensors or numpy arrays.
        documents: `[N, R_c, D]`, in the same forms, or an `EmbeddingCollection`.
        budget: `(r_q, r_c)`: only the first vectors of either side count. All of them by default.
        backend: `"torch"`; `"compiled"`, a CPU kernel, built when first used; `"fused"`, for bfloat16 on CUDA, of the
            library late-interaction-kernels; or `"auto"`: the kernel for the device if it can be had, else torch.

    Returns:
        `[Q, N]` float32, on the documents' device. Products are summed in float32. Queries are rounded as
        documents are: to bfloat16 for bfloat16 documents, to int8 for int8, int4 and binary ones.

    Raises:
        TypeError: if an input is neither a tensor, nor an array, nor a list of them, or is not of floating point.
        ValueError: if shapes or the budget do not fit, or a value is NaN or infinite.
        RuntimeError: if the backend was asked for by name and is not to be had; the message says why.

    Example:
        >>> maxsim(torch.eye(2)[None], torch.eye(2)[None], budget=(1, 2))
        tensor([[1.]])
    """
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
    """Find the `k` best documents of every query, exactly. Never holds the scores of all documents at once.

    Args:
        queries: As in `maxsim`.
        documents: As in `maxsim`.
        k: How many documents to return for a query; with fewer documents than that, all of them are returned.
        budget: As in `maxsim`.
        include: Search only these positions: whole numbers, or a bool for every document.
        exclude: Leave these out, in the same forms. `EmbeddingCollection.positions` tells the positions of ids.
        backend: As in `maxsim`.

    Returns:
        `scores, indices`, each `[Q, min(k, N)]`, float32 and int64, best first, equal scores by lower index.

    Raises:
        TypeError: as `maxsim`, and if `k` or a position is not a whole number.
        ValueError: as `maxsim`, and if `k` is less than 1 or a position is not there.
        RuntimeError: as `maxsim`.

    Example:
        >>> scores, indices = search(torch.eye(2)[1:], torch.eye(2)[:, None], k=1)
        >>> indices
        tensor([[1]])
    """
    check_k(k)
    q, stores = prepare(queries, documents, budget)
    kernel, name = choose_backend(backend, stores, q)
    allowed = _allowed(include, exclude, sum(map(len, stores)))
    best = torch.empty(len(q), 0, device=q.device), torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
    start = 0
    for store in stores:
        index = None
        if allowed is not None:
            index = allowed[(allowed >= start) & (allowed < start + len(store))] - start
        for part, scores in _blocks(q, store, kernel, index):
            values, found = top_k(scores, k)
            found = found + part.start if index is None else index.to(q.device)[part][found]
            best = merge_top_k(best, (values, found + start), k)
        start += len(store)
    return SearchResult(*best, backend=name)


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
        ValueError: as `maxsim`, and if candidates are not `[Q, m]` or name a document that is not there.
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


def score_some(query: Tensor, stores: Sequence[Store], which: Tensor, kernel: Any) -> Tensor:
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


def prepare(queries: Any, documents: Any, budget: Budget | None) -> tuple[Tensor, list[Store]]:
    """Check both sides and cut them to the budget: queries `[Q, r_q, D]` float32, and stores of `r_c` vectors."""
    if hasattr(documents, "stores"):
        stores, rotate = list(documents.stores), documents.rotate
        vectors, dim, device = documents.vectors, documents.input_dim, documents.device
    else:
        d = as_stack(documents, "documents")
        precision = "bfloat16" if d.dtype == torch.bfloat16 else "float32"
        stores, rotate = [Store([Slab(d, None)], precision, d.shape[2], checked=False)], None
        vectors, dim, device = d.shape[1], d.shape[2], d.device
    q = as_stack(queries, "queries")
    if q.shape[2] != dim:
        raise ValueError(f"queries have {q.shape[2]} dimensions and documents {dim}: both must come from one model")
    r_q, r_c = check_budget(budget, q.shape[1], vectors)
    q = q[:, :r_q].to(device, torch.float32)
    check_finite(q, "queries")
    return (q if rotate is None else rotate(q)), [store.prefix(r_c) for store in stores]


def choose_backend(backend: str, stores: Sequence[Store], queries: Tensor) -> tuple[Any, str]:
    """The kernel for the queries' device, or `None` for torch, and the name that results carry."""
    if backend not in ("auto", "torch", "compiled", "fused"):
        raise ValueError(f"backend must be 'auto', 'torch', 'compiled' or 'fused', not {backend!r}")
    device = queries.device
    torch_name = f"torch ({device.type})"
    name, file = _KERNELS.get(device.type, ("", ""))
    if backend == "torch" or (backend == "auto" and not name):
        return None, torch_name
    kernel, reason = None, f"it is not for documents on {device.type}"
    if backend in ("auto", name):
        try:  # not at the top: this file travels with checkpoints, the kernels do not
            kernels = importlib.import_module(file, __package__)
        except ImportError:
            reason = "it comes with the installed package metaembed, not with a checkpoint"
        else:
            slabs = [slab.stored for store in stores for slab in store.slabs]
            kernel, reason = None, kernels.LIMITS
            if all(kernels.takes(stored, queries.shape[1]) for stored in slabs):
                kernel, reason = kernels.find_kernel(device, queries.shape[2])
    if kernel:
        used = ", ".join(dict.fromkeys(kernel.instructions[store.precision] for store in stores))
        return kernel, f"{name} ({used})" if used else name
    if backend != "auto":
        raise RuntimeError(f"the {backend} kernel is not to be had: {reason}")
    return None, f"{torch_name}; not {name}: {reason}"


def _blocks(queries: Tensor, store: Store, kernel: Any, index: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
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
            yield part, kernel.scores(slabs, queries, store.precision, at, check=not store.checked)


def _torch_scores(queries: Tensor, store: Store, index: Tensor | None) -> Tensor:
    """Scores `[Q, n]`, of products that are made a cacheful at a time."""
    count, r_q, dim = queries.shape
    n = len(store) if index is None else len(index)
    flat = round_queries(queries, store.precision).reshape(count * r_q, dim)
    chunk = max(1, min(_CACHE_FLOATS // max(1, count * r_q), _MOST_FLOATS // dim) // store.vectors)
    out = torch.empty(count, n, device=queries.device)
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        best = None
        for slab in store.pick(part if index is None else index[part].to(queries.device)).slabs:
            rows = decode(slab.stored, slab.scales, store.precision, dim)  # [n, vectors, D]
            maxima = _maxima(flat, rows, check=not store.checked)
            best = maxima if best is None else torch.maximum(best, maxima)
        assert best is not None
        out[:, part] = best.reshape(count, r_q, best.shape[1]).sum(dim=1)
    return out


def _maxima(queries: Tensor, rows: Tensor, check: bool) -> Tensor:
    """The best product of every query vector `[m, D]` with a vector of every document `[n, r, D]`: `[m, n]`."""
    n, r, dim = rows.shape
    if r == 1:
        maxima = queries @ rows[:, 0].T
        one = maxima[:1]
    elif len(queries) < _FEW:  # a product a document, which all threads share
        products = queries @ rows.transpose(1, 2)  # [n, m, r]
        maxima, one = products.amax(dim=2).T, products[:, :1]
    else:
        products = (rows.reshape(n * r, dim) @ queries.T).view(n, r, len(queries))
        maxima, one = products.amax(dim=1).T, products[:, :, :1]
    if check and not one.sum().isfinite():  # any query vector shows a value that is not finite
        check_finite(rows, "documents")
    return maxima


def _allowed(include: Positions | None, exclude: Positions | None, n: int) -> Tensor | None:
    """The positions to search, in order, or `None` for all."""
    if include is None and exclude is None:
        return None
    mask = torch.ones(n, dtype=torch.bool) if include is None else _mask(include, n, "include")
    if exclude is not None:
        mask = mask & ~_mask(exclude, n, "exclude")
    return mask.nonzero()[:, 0]


def _mask(positions: Positions, n: int, name: str) -> Tensor:
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
    """Raise unless all positions are of documents that are there."""
    if positions.numel() and not (int(positions.min()) >= 0 and int(positions.max()) < n):
        raise ValueError(
            f"positions from 0 to {n - 1} are there, but {positions.min()} to {positions.max()} are asked for"
        )


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


def check_k(k: int) -> None:
    """Raise unless `k` is a number of documents."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, not {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")


def as_stack(value: Any, name: str) -> Tensor:
    """Make a tensor `[n, r, D]` of floating point from all that a caller may hold."""
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


def check_finite(values: Tensor, name: str) -> None:
    """Raise if a value is NaN or infinite. The sum tells in one pass; only a doubtful sum is looked at twice."""
    if not values.sum().isfinite() and not values.isfinite().all():
        raise ValueError(f"{name} hold NaN or infinity; look for an overflow where they were encoded")
