"""Retrieval metrics, quality at every budget, MTEB and MMEB, and tables of results."""
