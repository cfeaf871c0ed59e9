"""The losses: InfoNCE within the batch, on late interaction of whatever vectors a method trains."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from .runs import Method
from .vectors import Vectors, pool_agc, pool_ward


def late_interaction(queries: Tensor, documents: Tensor, present: Tensor | None = None) -> Tensor:
    """Return the scores [Q, M] of vectors [Q, i, D] and [M, j, D], of which those `present` [M, j] count."""
    products = torch.einsum("qid,mjd->qimj", queries, documents)
    if present is not None:
        products = products.masked_fill(~present, -1)
    return products.amax(dim=3).sum(dim=1)


def objective(method: Method, queries: Vectors, documents: Vectors, done: float = 1.0) -> Tensor:
    """Return the loss of a batch, whose first documents are the queries' own.

    Args:
        method: Says what is trained.
        queries: Of the batch.
        documents: Of the batch, hard negatives at the end.
        done: The share of the training's steps that are behind.
    """
    targets = torch.arange(len(queries.mask))

    def loss(scores: Tensor, counts: Tensor | int) -> Tensor:
        counts = torch.as_tensor(counts)
        divided = scores / {"sum": torch.ones_like(counts), "mean": counts, "sqrt": counts.sqrt()}[method.normalize]
        return cross_entropy(divided / method.temperature, targets)

    if method.kind in ("mean", "last"):
        dims = [*method.dims, queries.one.shape[1]]
        pairs = [(normalize(queries.one[:, :d], dim=1), normalize(documents.one[:, :d], dim=1)) for d in dims]
        return sum(loss(query @ document.T, 1) for query, document in pairs)
    lengths = queries.mask.sum(dim=1, keepdim=True).float()
    total = torch.zeros(())
    if method.kind in ("tokens", "agc") or "t" in method.terms:
        total += method.term_weights[0] * loss(
            late_interaction(queries.tokens, documents.tokens, documents.mask), lengths
        )
    if method.pooled:
        pool = pool_agc if method.kind == "agc" else pool_ward
        for pooled, present in pool(documents, method.pooled):
            total += loss(late_interaction(queries.tokens, pooled, present), lengths)
    if done < method.tokens_first:
        return total
    for (r_q, r_c), weight in zip(method.budgets, method.weights or (1,) * len(method.budgets), strict=True):
        total += weight * loss(late_interaction(queries.meta[:, :r_q], documents.meta[:, :r_c]), r_q)
    if "c" in method.terms:
        crossed = loss(late_interaction(queries.meta, documents.tokens, documents.mask), queries.meta.shape[1])
        crossed += loss(late_interaction(queries.tokens, documents.meta), lengths)
        total += method.term_weights[1] * crossed
    return total
