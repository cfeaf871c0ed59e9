"""Qdrant Edge: a named vector for each budget, and nested prefetch: (1, 1), then (4, 8), then (16, 64)."""

from __future__ import annotations

from pathlib import Path

import qdrant_edge as q

BUDGETS = {"1": (1, 1), "8": (4, 8), "64": (16, 64)}
BATCH = 500


def vector(vectors: int, dim: int) -> q.EdgeVectorParams:
    """Return how a named vector is kept: float16, and a graph for the first vector only."""
    return q.EdgeVectorParams(
        size=dim,
        distance=q.Distance.Dot,
        datatype=q.VectorStorageDatatype.Float16,
        multivector_config=None if vectors == 1 else q.MultiVectorConfig(q.MultiVectorComparator.MaxSim),
        hnsw_config=q.HnswIndexConfig(m=16 if vectors == 1 else 0, ef_construct=100, full_scan_threshold=1000),
    )


class Engine:
    """See `runner.py`."""

    settings = [
        {"ef": ef, "first": first, "second": second, "exact": exact}
        for exact in (False, True)
        for first, second in ((300, 50), (600, 50), (600, 100), (1000, 100), (2000, 200), (4000, 200))
        for ef in ((first,) if not exact else (0,))
    ]

    def build(self, folder, parts, count):
        """Insert all documents and let the engine optimize."""
        Path(folder).mkdir(parents=True)
        shard = None
        done = 0
        for part in parts():
            if shard is None:
                vectors = {name: vector(c, part.shape[2]) for name, (_, c) in BUDGETS.items()}
                shard = q.EdgeShard.create(folder, q.EdgeConfig(vectors=vectors))
            for start in range(0, len(part), BATCH):
                points = [
                    q.Point(
                        done + start + i,
                        {"1": one[0].tolist(), "8": one[:8].tolist(), "64": one.tolist()},
                        {"half": i % 2},
                    )
                    for i, one in enumerate(part[start : start + BATCH])
                ]
                shard.update(q.UpdateOperation.upsert_points(points))
            done += len(part)
            shard.flush()
        shard.optimize()
        shard.close()

    def open(self, folder):
        """Open it."""
        self.shard = q.EdgeShard.load(folder)

    def search(self, query, setting, k):
        """Return the positions of the best `k`."""
        params = q.SearchParams(exact=True) if setting["exact"] else q.SearchParams(hnsw_ef=setting["ef"])
        first = q.Prefetch(setting["first"], q.Query.Nearest(query[0].tolist(), using="1"), params=params)
        second = q.Prefetch(setting["second"], q.Query.Nearest(query[:4].tolist(), using="8"), prefetches=[first])
        request = q.QueryRequest(k, query=q.Query.Nearest(query.tolist(), using="64"), prefetches=[second])
        return [point.id for point in self.shard.query(request)]
