"""fast-plaid: centroids and residuals of 4 bits of all vectors, on the CPU."""

from __future__ import annotations

import torch
from fast_plaid import search


class Engine:
    """See `runner.py`."""

    settings = [
        {"probe": probe, "full": full}
        for probe, full in ((4, 512), (8, 1024), (8, 4096), (16, 4096), (32, 4096), (32, 8192))
    ]

    def build(self, folder, parts, count):
        """Build with the defaults, but for a smaller sample to find the centroids."""
        torch.set_num_threads(1)
        documents = [document for part in parts() for document in torch.from_numpy(part).half()]
        search.FastPlaid(folder, device="cpu").create(documents, n_samples_kmeans=10_000)

    def open(self, folder):
        """Open it."""
        torch.set_num_threads(1)
        self.index = search.FastPlaid(folder, device="cpu")

    def search(self, query, setting, k):
        """Return the positions of the best `k`."""
        found = self.index.search(
            torch.from_numpy(query)[None],
            top_k=k,
            n_full_scores=setting["full"],
            n_ivf_probe=setting["probe"],
            show_progress=False,
            n_processes=1,
        )
        return [document for document, _ in found[0]]
