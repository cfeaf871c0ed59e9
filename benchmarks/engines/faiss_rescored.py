"""faiss: a graph (HNSW) of the first vectors; metaembed scores what it finds, from int8."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import torch

from metaembed import search
from metaembed.retrieval.collection import EmbeddingCollection


class Engine:
    """See `runner.py`."""

    settings = [{"ef": ef, "keep": keep} for keep in (300, 600, 1000, 2000) for ef in (keep, 2 * keep)]

    def build(self, folder, parts, count):
        """Build the graph, and keep the documents in int8 beside it."""
        Path(folder).mkdir(parents=True)
        faiss.omp_set_num_threads(1)
        graph = documents = None
        for part in parts():
            if graph is None:
                graph = faiss.IndexHNSWFlat(part.shape[2], 32, faiss.METRIC_INNER_PRODUCT)
                documents = EmbeddingCollection(
                    *part.shape[1:], folder=Path(folder) / "documents", quantization="int8"
                )
            graph.add(np.ascontiguousarray(part[:, 0]))
            documents.append(torch.from_numpy(part))
        faiss.write_index(graph, str(Path(folder) / "graph"))

    def open(self, folder):
        """Open it."""
        faiss.omp_set_num_threads(1)
        torch.set_num_threads(1)
        self.graph = faiss.read_index(str(Path(folder) / "graph"))
        self.documents = EmbeddingCollection.load(Path(folder) / "documents")

    def search(self, query, setting, k):
        """Return the positions of the best `k`."""
        parameters = faiss.SearchParametersHNSW(efSearch=setting["ef"])
        near = self.graph.search(query[:1], setting["keep"], params=parameters)[1][0]
        near = torch.from_numpy(np.sort(near[near >= 0]))
        return search(torch.from_numpy(query)[None], self.documents, k, include=near).indices[0].tolist()
