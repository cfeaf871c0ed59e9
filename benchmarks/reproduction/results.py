"""The results of the runs, one JSON file each, and the intervals drawn from them."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import numpy as np

from .runs import Run

LEVELS = 250  # a value of 0..1 is kept in so many steps
DRAWS = 1000  # of the bootstrap


def pack(values) -> str:
    """Return values of 0..1, one for each query, as a short string."""
    levels = np.rint(np.asarray(values, dtype=np.float64) * LEVELS).astype(np.uint8)
    return base64.b85encode(zlib.compress(levels.tobytes(), 9)).decode()


def unpack(packed: str) -> np.ndarray:
    """Return the values that `pack` was given, to 1/250."""
    return np.frombuffer(zlib.decompress(base64.b85decode(packed)), np.uint8) / LEVELS


class Results:
    """The folder of results.

    Args:
        folder: With a file for every run.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, run: Run) -> Path:
        """Return the run's file."""
        return self.folder / f"{run.key}.json"

    def has(self, run: Run) -> bool:
        """Return whether the run was finished."""
        return self.path(run).is_file()

    def write(self, run: Run, result: dict) -> None:
        """Write a finished run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.path(run).with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(self.path(run))

    def read(self, run: Run) -> dict | None:
        """Return a run's result, or None."""
        return json.loads(self.path(run).read_text()) if self.has(run) else None


def bootstrap(values: np.ndarray) -> np.ndarray:
    """Return means of resampled values: over the queries, and over the seeds where there are several.

    Args:
        values: One for each seed and query [S, Q]; all seeds have the same queries.

    Returns:
        The means, `DRAWS` of them.
    """
    rng = np.random.default_rng(0)
    seeds, queries = values.shape
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        # How often each query was drawn, and the same for the seeds: faster than taking the values themselves.
        often = np.bincount(rng.integers(0, queries, queries), minlength=queries)
        chosen = np.bincount(rng.integers(0, seeds, seeds), minlength=seeds)
        means[draw] = chosen @ (values @ often) / (seeds * queries)
    return means


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of values [S, Q] and the ends of its 95% interval."""
    low, high = np.quantile(bootstrap(values), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
