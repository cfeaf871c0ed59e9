"""XTR-WARP in Rust (xtr-warp-rs): centroids and residuals of 4 bits of all vectors, on the CPU."""

from __future__ import annotations

import torch
from xtr_warp.search import XTRWarp


class Engine:
    """See `runner.py`."""

    settings = [{"probe": probe, "bound": 1024} for probe in (16, 64, 128, 256, 512)]

    def build(self, folder, parts, count):
        """Build with the defaults, but for a smaller sample to find the centroids."""
        torch.set_num_threads(1)
        documents = torch.cat([torch.from_numpy(part).half() for part in parts()])
        XTRWarp(folder).create(documents, device="cpu", n_samples_kmeans=10_000, show_progress=False)

    def open(self, folder):
        """Open it."""
        torch.set_num_threads(1)
        self.index = XTRWarp(folder, device="cpu").load("cpu")

    def search(self, query, setting, k):
        """Return the positions of the best `k`."""
        found = self.index.search(
            torch.from_numpy(query)[None],
            top_k=k,
            num_threads=1,
            nprobe=setting["probe"],
            bound=setting["bound"],
            show_progress=False,
        )
        return [document for document, _ in found[0]]
