"""LanceDB: its multivector column, with the index that it offers for it (IVF-PQ, cosine)."""

from __future__ import annotations

import lancedb
import pyarrow as pa


class Engine:
    """See `runner.py`."""

    settings = [
        {"nprobes": nprobes, "refine": refine}
        for nprobes, refine in ((5, 10), (10, 10), (20, 10), (20, 30), (50, 30), (100, 30))
    ]

    def build(self, folder, parts, count):
        """Insert all documents and build the index."""
        database = lancedb.connect(folder)
        dim = next(iter(parts())).shape[2]
        vectors = pa.list_(pa.list_(pa.float16(), dim))
        schema = pa.schema([("id", pa.int64()), ("vectors", vectors)])

        def batches():
            done = 0
            for part in parts():
                for start in range(0, len(part), 1000):
                    some = part[start : start + 1000].astype("float16")
                    flat = pa.FixedSizeListArray.from_arrays(pa.array(some.reshape(-1)), dim)
                    offsets = pa.array(range(0, some.shape[0] * some.shape[1] + 1, some.shape[1]), pa.int32())
                    ids = pa.array(range(done + start, done + start + len(some)), pa.int64())
                    lists = pa.ListArray.from_arrays(offsets, flat)
                    yield pa.RecordBatch.from_arrays([ids, lists], schema=schema)
                done += len(part)

        table = database.create_table("documents", data=batches(), schema=schema)
        table.create_index(metric="cosine", vector_column_name="vectors", index_type="IVF_PQ")

    def open(self, folder):
        """Open it."""
        self.table = lancedb.connect(folder).open_table("documents")

    def search(self, query, setting, k):
        """Return the positions of the best `k`."""
        search = self.table.search(query, vector_column_name="vectors").select(["id"]).limit(k)
        found = search.nprobes(setting["nprobes"]).refine_factor(setting["refine"]).to_arrow()
        return found["id"].to_pylist()
