"""Metrics at every budget, MTEB and MMEB."""
