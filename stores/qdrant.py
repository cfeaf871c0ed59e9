"""Qdrant, in this process, on a server or on a cluster."""
