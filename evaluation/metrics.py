"""Retrieval metrics. They are in `retrieval`, which chooses settings by them and may not import from here."""

from ..retrieval.metrics import mrr, ndcg, recall

__all__ = ["mrr", "ndcg", "recall"]
