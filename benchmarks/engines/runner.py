"""Builds one engine's index, or measures its searches, in that engine's environment; prints JSON.

    python runner.py build faiss_rescored FOLDER EMBEDDINGS... COUNT
    python runner.py search faiss_rescored FOLDER QUERIES TRUTH TARGET

An engine is a module beside this file with an `Engine` class: see `qdrant.py`. Searches run on one core.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

K = 10
TURNS = 2  # over all queries; the faster time of each query counts, in processor time


def read(parts: list[str], count: int):
    """Yield the embeddings, a part at a time: `[n, 64, D]` float32, unit vectors."""
    for part in parts:
        embeddings = np.load(part)[:count].astype(np.float32)
        count -= len(embeddings)
        yield embeddings


def build(engine, folder: str, *rest: str) -> dict:
    """Build the index and return the seconds of processor time and the bytes on disk."""
    *parts, count = rest
    start = time.process_time()
    engine.build(folder, lambda: read(parts, int(count)), int(count))
    seconds = time.process_time() - start
    blocks = sum(path.stat().st_blocks for path in Path(folder).rglob("*") if path.is_file())
    return {"seconds": seconds, "bytes": blocks * 512}


def search(engine, folder: str, queries: str, truth: str, target: str) -> dict:
    """Try every setting on half of the queries, and measure on the other half the fastest that reaches the target."""
    queries, truth = np.load(queries), np.load(truth)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    engine.open(folder)
    curve = []
    for setting in engine.settings:
        curve.append({"setting": setting, **measure(engine, setting, queries[::2], truth[::2], turns=1)})
        print(*(f"{k}: {v:.3g}" for k, v in (setting | curve[-1]).items() if k != "setting"), file=sys.stderr)
    good = [tried for tried in curve if tried["recall"] >= float(target)]
    chosen = min(good, key=lambda tried: tried["p50"]) if good else max(curve, key=lambda tried: tried["recall"])
    verified = measure(engine, chosen["setting"], queries[1::2], truth[1::2], turns=TURNS)
    return {"curve": curve, "setting": chosen["setting"], **verified}


def measure(engine, setting: dict, queries: np.ndarray, truth: np.ndarray, turns: int) -> dict:
    """Search with one query at a time: recall, and milliseconds of a query."""
    engine.search(queries[0], setting, K)
    best = np.full(len(queries), np.inf)
    for _ in range(turns):
        found = []
        for i, query in enumerate(queries):
            start = time.process_time()
            found.append(engine.search(query, setting, K))
            best[i] = min(best[i], time.process_time() - start)
    recall = np.mean([len(set(map(int, f)) & set(t.tolist())) / K for f, t in zip(found, truth, strict=True)])
    p50, p95 = np.percentile(best * 1e3, [50, 95])
    return {"recall": float(recall), "p50": float(p50), "p95": float(p95)}


if __name__ == "__main__":
    action, name, *arguments = sys.argv[1:]
    engine = importlib.import_module(name).Engine()
    print(json.dumps({"build": build, "search": search}[action](engine, *arguments)))
