"""Find how many vectors, dimensions and bits a document should have for its bytes, on the user's own data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..configuration_metaembed import DEFAULT_BUDGETS
from ..scoring_metaembed import Budget, as_stack
from .index import MultiVectorIndex
from .metrics import ndcg, recall
from .pca import fit_pca
from .quantization import QUANTIZATIONS, bytes_per_vector, check_quantization
from .search import check_k, search
from .storage import Layout

_SIZES = (512, 1024, 2048, 4096, 8192)  # bytes of a document, in the curve
_METRICS = {"ndcg": ndcg, "recall": recall}


@dataclass(frozen=True)
class BudgetSetting:
    """One way to keep documents.

    Attributes:
        vectors: How many vectors of a document are kept.
        dim: How many dimensions of a vector are kept.
        quantization: How a number is kept.
        query_vectors: How many vectors of a query to search with.
        bytes_per_document: Bytes of a document's vectors.
        quality: From 0 to 1, the mean over the queries.
    """

    vectors: int
    dim: int
    quantization: str
    query_vectors: int
    bytes_per_document: int
    quality: float

    @property
    def budget(self) -> Budget:
        """What to pass to `search`."""
        return self.query_vectors, self.vectors


@dataclass(frozen=True, eq=False)
class FittedBudget(BudgetSetting):
    """Result of `fit_budget`: the best setting for the bytes that were asked for.

    Attributes:
        pca: `[input dimensions, dim]`, or `None` if all dimensions are kept.
        curve: For every size in bytes the best setting that is no larger, smallest first.
        tried: All settings, smallest first.
        kwargs: The arguments of `MultiVectorIndex.create`.
    """

    pca: Tensor | None
    curve: dict[int, BudgetSetting]
    tried: tuple[BudgetSetting, ...]
    kwargs: dict[str, Any]

    def create(self, folder: str | os.PathLike[str] | None, **kwargs: Any) -> MultiVectorIndex:
        """Create an empty index with this setting: `MultiVectorIndex.create(folder, **fitted.kwargs, **kwargs)`."""
        return MultiVectorIndex.create(folder, **self.kwargs, **kwargs)

    def __repr__(self) -> str:
        return (
            f"FittedBudget({self.vectors} vectors of {self.dim} dimensions in {self.quantization}, "
            f"{self.bytes_per_document} bytes, budget={self.budget}, quality={self.quality:.3f})"
        )


@torch.no_grad()
def fit_budget(
    documents: Any,
    queries: Any,
    bytes_per_document: int = 4096,
    k: int = 10,
    *,
    relevant: Tensor | None = None,
    metric: str | None = None,
    sizes: Sequence[int] = _SIZES,
    dims: Sequence[int] | None = None,
    quantizations: Sequence[str] = QUANTIZATIONS,
    query_vectors: Sequence[int] | None = None,
    sample: int = 5000,
    seed: int = 0,
) -> FittedBudget:
    """Find the vectors, dimensions (by PCA) and quantization that give the best quality for the bytes.

    Every combination that fits is measured, on all queries. Give it some hundreds of them: settings of nearly equal
    quality are told apart by chance, and the best of many measurements is a little too good.

    Args:
        documents: `[n, R_c, D]`, or a `MultiVectorIndex`, best of float32.
        queries: `[Q, R_q, D]`.
        bytes_per_document: Bytes that the vectors of a document may take.
        k: How many documents of a ranking count.
        relevant: Whether a document is relevant to a query, bool `[Q, n]`, to measure real quality. Without it,
            quality is the agreement with the exact search over the documents as they are given.
        metric: `"recall"` or `"ndcg"`, at `k`; by default nDCG if `relevant` is given, else recall.
        sizes: Further bytes a document for the curve.
        dims: Dimensions to try; by default D and seven smaller ones down to D / 8.
        quantizations: Quantizations to try.
        query_vectors: Numbers of query vectors to try; by default all, and those that the default budgets have for
            about as many document vectors.
        sample: How many documents to measure on, at most, chosen at random with all that are relevant.
        seed: Of this choice.

    Returns:
        The best setting, with the best ones for the other sizes as `curve`.

    Raises:
        TypeError: if embeddings are not of floating point, or `relevant` is not bool.
        ValueError: if an argument does not fit, there are no queries, or nothing fits into the bytes.

    Example:
        >>> fitted = fit_budget(documents, queries, bytes_per_document=1024)
        >>> index = fitted.create("my-index")  # or MultiVectorIndex.create("my-index", **fitted.kwargs)
        >>> index.search(queries, budget=fitted.budget)
    """
    d, q, before, ordered = _read(documents, queries)
    check_k(k)
    sizes = sorted({bytes_per_document, *sizes})
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"bytes_per_document and sizes must be whole numbers of at least 1, not {sizes}")
    metric = metric or ("recall" if relevant is None else "ndcg")
    if metric not in _METRICS:
        raise ValueError(f"metric must be 'recall' or 'ndcg', not {metric!r}")
    d, relevant = _sample(d, _check_relevant(relevant, len(q), len(d)), sample, seed)
    k = min(k, len(d))
    if relevant is None:
        found = search(q, d, k).indices
        relevant = torch.zeros(len(q), len(d), dtype=torch.bool).scatter_(1, found, True)

    def measure(side: Any, budget: Budget) -> float:
        ranked = relevant.gather(1, search(q, side, k, budget).indices)
        return _METRICS[metric](ranked, relevant.sum(dim=1), k).mean().item()

    pca = fit_pca(d, d.shape[2])
    tried = list[BudgetSetting]()
    for dim in _check_dims(dims, d.shape[2]):
        for quantization in map(check_quantization, quantizations):
            one = bytes_per_vector(quantization, dim)
            counts = sorted({min(size // one, d.shape[1]) for size in sizes} - {0})
            if not counts:
                continue
            side = _encoded(d[:, : counts[-1]], pca[:, :dim] if dim < d.shape[2] else None, quantization)
            for vectors in counts:
                for r_q in _query_vectors(query_vectors, vectors, q.shape[1], ordered):
                    quality = measure(side, (r_q, vectors))
                    tried.append(BudgetSetting(vectors, dim, quantization, r_q, vectors * one, quality))
    curve = {size: best for size in sizes if (best := _best(tried, size))}
    if bytes_per_document not in curve:
        least = min(bytes_per_vector(name, dim) for name in quantizations for dim in _check_dims(dims, d.shape[2]))
        raise ValueError(f"a document of one vector takes {least} bytes, which is more than {bytes_per_document}")
    best = curve[bytes_per_document]
    matrix = before if best.dim == d.shape[2] else _product(before, pca[:, : best.dim])
    kwargs = {"vectors": best.vectors, "dim": d.shape[2] if matrix is None else len(matrix)}
    kwargs |= {"quantization": best.quantization, "pca": matrix}
    if isinstance(documents, MultiVectorIndex) and not ordered:
        kwargs["pooling"] = documents.pooling
    tried.sort(key=lambda setting: setting.bytes_per_document)
    return FittedBudget(**vars(best), pca=matrix, curve=curve, tried=tuple(tried), kwargs=kwargs)


def _read(documents: Any, queries: Any) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Documents and queries of equal dimensions, the PCA that made them so, and whether queries are ordered."""
    q, pca, ordered = as_stack(queries, "queries").float(), None, True
    if isinstance(documents, MultiVectorIndex):
        d, pca = documents.embeddings(), documents.pca
        ordered = documents.pooling is None
    else:
        d = as_stack(documents, "documents").float()
    wanted = d.shape[2] if pca is None else len(pca)
    if q.shape[2] != wanted:
        raise ValueError(f"queries must have {wanted} dimensions, as the documents have, not {q.shape[2]}")
    if not len(q) or not len(d):
        raise ValueError(f"fit_budget needs documents and queries, not {len(d)} and {len(q)}")
    return d.cpu(), (q if pca is None else q @ pca).cpu(), pca, ordered


def _check_relevant(relevant: Any, queries: int, documents: int) -> Tensor | None:
    if relevant is None:
        return None
    if not isinstance(relevant, Tensor) or relevant.dtype != torch.bool:
        raise TypeError("relevant must be a tensor of bool")
    if relevant.shape != (queries, documents):
        raise ValueError(f"relevant must be [{queries}, {documents}], not {list(relevant.shape)}")
    if not relevant.any(dim=1).all():
        raise ValueError("every query needs a relevant document: leave out the others")
    return relevant.cpu()


def _sample(d: Tensor, relevant: Tensor | None, most: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Choose documents at random, and all that are relevant to a query."""
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"sample must be a whole number of at least 1, not {most!r}")
    if len(d) <= most:
        return d, relevant
    order = torch.rand(len(d), generator=torch.Generator().manual_seed(seed))
    if relevant is not None:
        order -= relevant.any(dim=0).float()
        most = max(most, int((order < 0).sum()))
    chosen = order.argsort()[:most].sort().values
    return d[chosen], None if relevant is None else relevant[:, chosen]


def _check_dims(dims: Sequence[int] | None, full: int) -> list[int]:
    if dims is None:
        return sorted({max(1, full * eighths // 8) for eighths in range(1, 9)})
    for dim in dims:
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= full:
            raise ValueError(f"dims must be whole numbers from 1 to {full}, not {dim!r}")
    return sorted(set(dims))


def _query_vectors(given: Sequence[int] | None, vectors: int, most: int, ordered: bool) -> list[int]:
    """Numbers of query vectors to try: queries and documents are trained to shrink together."""
    if given is not None:
        return sorted(set(given))
    if not ordered:
        return [most]
    smaller = [r_q for r_q, r_c in DEFAULT_BUDGETS if r_c <= vectors][-1:]
    larger = [r_q for r_q, r_c in DEFAULT_BUDGETS if r_c >= vectors][:1]
    return sorted({min(r_q, most) for r_q in (*smaller, *larger, most)})


def _encoded(d: Tensor, pca: Tensor | None, quantization: str) -> Any:
    """Documents as an index would keep them, in the form that `search` takes."""

    def project(x: Tensor) -> Tensor:
        return x if pca is None else x @ pca

    layout = Layout({"main": (quantization, d.shape[1])}, d.shape[2] if pca is None else pca.shape[1])
    blocks = [layout.encode(project(block)) for block in layout.blocks(d)]
    stores = [layout.stores([torch.cat(parts) for parts in zip(*blocks, strict=True)])["main"]]
    return SimpleNamespace(
        stores=stores, project=project, vectors=d.shape[1], input_dim=d.shape[2], device=torch.device("cpu")
    )


def _best(tried: Sequence[BudgetSetting], size: int) -> BudgetSetting | None:
    """The best setting of at most so many bytes; of equals the smallest, with the fewest query vectors."""
    fit = [setting for setting in tried if setting.bytes_per_document <= size]
    return max(fit, key=lambda s: (s.quality, -s.bytes_per_document, -s.query_vectors), default=None)


def _product(first: Tensor | None, second: Tensor) -> Tensor:
    return second.contiguous() if first is None else (first @ second).contiguous()
