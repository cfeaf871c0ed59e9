"""Retrieval metrics of ranked documents that are relevant or not. Each returns a float64 value for every query."""

from __future__ import annotations

import torch
from torch import Tensor


def ndcg(ranked: Tensor, num_relevant: Tensor, k: int = 10) -> Tensor:
    """Return nDCG@k: the discounted gain of the relevant documents found, divided by the best possible.

    Args:
        ranked: Whether each of the documents that were found is relevant [Q, n], best first, n >= k.
        num_relevant: Number of relevant documents of each query, found or not [Q].
        k: Number of ranks that count.

    Returns:
        The values [Q], in 0..1.

    Raises:
        ValueError: If fewer than `k` documents were ranked, or a query has no relevant document.

    Example:
        >>> ranked = relevant.gather(1, search(queries, documents, k=10).indices)  # relevant: [Q, N], boolean
        >>> ndcg(ranked, relevant.sum(dim=1), k=10).mean()
    """
    hits = _hits(ranked, num_relevant, k)
    discounts = 1 / torch.arange(2, k + 2, dtype=torch.float64, device=hits.device).log2()  # [k]
    best = discounts.cumsum(0)[num_relevant.clamp(max=k) - 1]  # [Q]
    return (hits * discounts).sum(dim=1) / best


def recall(ranked: Tensor, num_relevant: Tensor, k: int = 10) -> Tensor:
    """Return recall@k [Q]: the share of a query's relevant documents that are in the first `k`. See [`ndcg`]."""
    return _hits(ranked, num_relevant, k).sum(dim=1) / num_relevant


def mrr(ranked: Tensor, num_relevant: Tensor, k: int = 10) -> Tensor:
    """Return MRR@k [Q]: 1 / the rank of the first relevant document, or 0 if that is above `k`. See [`ndcg`]."""
    hits = _hits(ranked, num_relevant, k)
    return hits.amax(dim=1) / (hits.argmax(dim=1) + 1)


def _hits(ranked: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """Return the first `k` columns as 0.0 and 1.0, after checking that the metrics are defined."""
    if not 1 <= k <= ranked.shape[1]:
        raise ValueError(f"k must be between 1 and the {ranked.shape[1]} documents that were ranked, got {k}.")
    if (num_relevant < 1).any():
        raise ValueError("every query needs a relevant document: leave out the queries where num_relevant is 0.")
    return ranked[:, :k].bool().double()
