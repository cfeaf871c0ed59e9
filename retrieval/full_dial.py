"""Search over two indexes of the same documents: their Meta Tokens find candidates, and their tokens rank these."""

from __future__ import annotations

from typing import Any

import torch

from ..scoring_metaembed import Embeddings
from .index import MultiVectorIndex, SearchHits


def search_full_dial(
    queries: Embeddings,
    meta: MultiVectorIndex,
    tokens: MultiVectorIndex,
    k: int = 10,
    *,
    keep: int = 100,
    size: int | None = None,
    **search: Any,
) -> SearchHits:
    """Find the best documents of every query by all its tokens, among the best by Meta Tokens.

    Args:
        queries: What `encode_queries(..., tokens=True)` returned, for several queries.
        meta: Index of the documents' Meta Token vectors: of `encode_documents(..., tokens=n)`, the part `meta`.
        tokens: Index of the part `tokens`, under the same ids. Metadata are read here.
        k: How many documents to return for a query.
        keep: How many documents the Meta Tokens select, from which the tokens choose.
        size: How many token vectors of a document are scored. None: all in the index.
        **search: For `meta.search`: `budget`, `stages`, `where`, ...

    Raises:
        TypeError: If `queries` have no tokens.
        ValueError: If `keep` is less than `k`, or as `MultiVectorIndex.search`.

    Example:
        >>> documents = model.encode_documents(pages, tokens=16)
        >>> meta.add(documents.meta, ids=ids), tokens.add(documents.tokens, ids=ids)
        >>> search_full_dial(model.encode_queries(["a red apple"], tokens=True), meta, tokens, k=10).ids
    """
    if not isinstance(queries, tuple) or not hasattr(queries, "tokens"):
        raise TypeError(f"queries must be of encode_queries(..., tokens=True), got {type(queries).__name__}.")
    if keep < k:
        raise ValueError(f"keep must be at least k = {k}, got {keep}.")
    candidates = meta.search(queries.meta, keep, **search).ids
    budget = None if size is None else (queries.tokens.shape[1], size)
    found = [
        tokens.search(query, k, budget, stages=None, include_ids=ids)
        for query, ids in zip(queries.tokens, candidates, strict=True)
    ]
    scores = torch.cat([hits.scores for hits in found]) if found else torch.empty(0, 0)
    return SearchHits([hits.ids[0] for hits in found], scores, [hits.metadata[0] for hits in found])
