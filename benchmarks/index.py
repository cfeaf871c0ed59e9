"""The speed of the index, from 1,000 documents to 10,000,000, and beside other engines.

    make benchmark-index                                     everything; writes docs/performance.md and its plots
    python benchmarks/index.py --sizes 1000 10000 --peers    these sizes alone, without other engines
    python benchmarks/index.py --report                      writes the document from what was measured

Needs the model that `make quickstart` saves. The first run embeds a million scenes with it and keeps them in
outputs/benchmark, with every measurement: a run that is stopped continues where it was. Delete a file of
outputs/benchmark/cells to measure it again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engines
import numpy as np
import torch
from index_report import write
from scenes_embedded import CACHE, PART, embed_scenes, find_best, iterate_scenes, load_queries, part_file, save_whole
from torch import Tensor
from torch.nn.functional import normalize

from metaembed import MultiVectorIndex, tune_cascade
from metaembed.retrieval.cascade import Stage

SIZES = (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 10_000_000)
REAL = 1_000_000  # scenes that are embedded; a larger index is made of their first 16 vectors
K, TARGET = 10, 0.95
QUERIES = 200  # half of them choose the stages, the other half verify them
FEW = 40  # the same for more documents than REAL
MINUTES = 20  # of processor time for an engine to build its index; and as many of the clock for its searches

Call = Callable[[], Any]


def cell(name: str, measure: Callable[[], dict]) -> dict:
    """Return a measurement, from the cache if it is there."""
    file = CACHE / f"cells/{name}.json"
    if not file.exists():
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        measured = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measured, indent=1))
        print(f"{time.strftime('%H:%M:%S')} {name}: {measured}", file=sys.stderr, flush=True)
    return json.loads(file.read_text())


def take_turns(calls: dict[str, list[Call]], turns: int, clock: Callable[[], float]) -> dict[str, np.ndarray]:
    """Return the best milliseconds of every call, by name. Names take turns, so that all see the same load."""
    for several in calls.values():
        several[0]()
    best = {name: np.full(len(several), np.inf) for name, several in calls.items()}
    for _ in range(turns):
        for i in range(max(map(len, calls.values()))):
            for name, several in calls.items():
                if i < len(several):
                    start = clock()
                    several[i]()
                    best[name][i] = min(best[name][i], (clock() - start) * 1e3)
    return best


# Indexes


def documents(count: int) -> Iterator[Tensor]:
    """Yield documents, a part at a time: scenes; beyond `REAL`, the first 16 vectors of scenes again.

    The first million are the scenes as they are. Of every further million, each vector has noise of half its length
    added and is normalized again, so no two documents are equal.
    """
    if count <= REAL:
        for part in iterate_scenes(count):
            yield part.float()
        return
    generator = torch.Generator().manual_seed(0)
    some = next(iterate_scenes(PART))[:, :16]
    noise = torch.randn(2 * PART, *some.shape[1:], generator=generator) * (0.5 / some.shape[2] ** 0.5)
    for turn in range(count // REAL):
        for part in iterate_scenes(REAL):
            vectors = part[:, :16].float()
            start = int(torch.randint(PART, (1,), generator=generator))
            yield normalize(vectors + noise[start : start + PART], dim=-1) if turn else vectors


def metadata(first: int, count: int) -> list[dict]:
    """Return metadata to filter by."""
    return [{"percent": i % 100} for i in range(first, first + count)]


def folder(count: int) -> Path:
    """Return where the index of a size is."""
    return CACHE / f"indexes/{count}"


def write_plainly(file: Path, size: int) -> float:
    """Write so many bytes to a file, wait until the disk has them, and return the seconds."""
    content = (os.urandom(1 << 20) * (size // (1 << 20) + 1))[:size]
    start = time.perf_counter()
    with file.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    return time.perf_counter() - start


def build(count: int) -> dict:
    """Build an index in adds of 10,000 documents; after each, write as many bytes to a plain file."""
    place = folder(count)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    raw, seconds = place.parent / "raw", {"add": 0.0, "add, processor": 0.0, "write": 0.0}
    index, done = None, 0
    for part in documents(count):
        if index is None:
            # The first stage reads a copy of its own, so that it stays in memory.
            kept = {"first": ("binary", 1), "main": "int8"} if count > REAL else "int8"
            index = MultiVectorIndex.create(place, *part.shape[1:], quantization=kept)
        ids = [f"scene-{i}" for i in range(done, done + len(part))]
        about = metadata(done, len(part)) if count <= REAL else None
        start, processor = time.perf_counter(), time.process_time()
        index.add(part, ids, about)
        seconds["add"] += time.perf_counter() - start
        seconds["add, processor"] += time.process_time() - processor
        if count <= REAL:
            seconds["write"] += write_plainly(raw, index.bytes_per_document * len(part))
        done += len(part)
        if done % (10 * PART) == 0:
            print(f"added {done:,} of {count:,}", file=sys.stderr, flush=True)
    raw.unlink(missing_ok=True)
    index.close()
    bytes_on_disk = sum(path.stat().st_blocks * 512 for path in place.iterdir())
    return seconds | {"bytes": bytes_on_disk, "bytes a document": index.bytes_per_document}


def open_index(count: int) -> MultiVectorIndex:
    """Open the index of a size, building it if it is not there."""
    cell(f"build-{count}", lambda: build(count))
    if not folder(count).exists():
        (CACHE / f"cells/build-{count}.json").unlink()
        return open_index(count)
    return MultiVectorIndex.open(folder(count))


def recall(found: list[list[str]], truth: Tensor) -> float:
    """Return the share of the true best ten that were found."""
    shares = [
        len({int(i.split("-")[1]) for i in f} & set(t)) / len(t) for f, t in zip(found, truth.tolist(), strict=True)
    ]
    return sum(shares) / len(shares)


def best(index: MultiVectorIndex, count: int) -> Tensor:
    """Return the true best ten of every query: by float32; for more than `REAL`, by the index's full scan."""
    if count <= REAL:
        return find_best(count, K, QUERIES)
    file = CACHE / f"best/{count}.npy"
    if not file.exists():
        found = index.search(load_queries(FEW), K, stages=None).ids
        save_whole(file, np.array([[int(i.split("-")[1]) for i in ids] for ids in found]))
    return torch.from_numpy(np.load(file))


# Measurements


def tune(index: MultiVectorIndex, queries: Tensor, truth: Tensor) -> list[dict]:
    """Return stages for every recall, by `tune_cascade`, cheapest first, with their recall of the truth.

    From a million documents on, where each full scan of `tune_cascade` takes its time, a few stages are tried instead.
    """
    first = "first" if "first" in index.quantization else "main"
    if len(index) >= REAL:
        pairs = ((1000, 100), (2000, 100), (3000, 200), (6000, 200), (10_000, 300), (30_000, 300), (100_000, 500))
        options = [(Stage((1, 1), n, first), Stage((4, 8), m, "main")) for n, m in pairs]
        triples = ((2500, 700, 60), (3000, 800, 100), (4000, 1000, 100))
        options += [(Stage((1, 1), a, first), Stage((2, 4), b), Stage((4, 8), c)) for a, b, c in triples]
    else:
        tuned = tune_cascade(index, queries, TARGET)
        options = [tuned.stages, *(option.stages for option in tuned.curve)]
    tried: list[dict] = []
    for stages in dict.fromkeys(filter(None, options)):
        recalled = recall(index.search(queries, K, stages=stages).ids, truth)
        if recalled > 0.1 and all(abs(recalled - one["recall"]) > 0.004 for one in tried):
            tried.append({"stages": [[s.budget, s.quantization, s.keep] for s in stages], "recall": recalled})
    return sorted(tried, key=lambda one: one["recall"])


def latency(count: int) -> dict:
    """Choose stages on half of the queries; on the other half compare them with a full scan and with reading."""
    torch.set_num_threads(1)
    index = open_index(count)
    queries, truth = load_queries(QUERIES if count <= REAL else FEW), best(index, count)
    curve = tune(index, queries[::2], truth[::2])
    verify, expected = queries[1::2], truth[1::2]
    for one in curve:
        calls = [lambda q=q, s=one["stages"]: index.search(q, K, stages=s) for q in verify[:20]]
        one["p50"] = float(np.median(take_turns({"search": calls}, 2, time.process_time)["search"]))
        one["verified"] = recall(index.search(verify, K, stages=one["stages"]).ids, expected)
    # The fastest of those that reach the recall on both halves.
    good = [one for one in curve if one["recall"] >= TARGET and one["verified"] >= TARGET]
    stages = min(good, key=lambda one: one["p50"])["stages"] if good else curve[-1]["stages"]
    first = index.quantization[stages[0][1]][0]
    size = count * stages[0][0][1] * {"binary": index.dim // 8 + 4, "int8": index.dim + 4}[first]
    memory = torch.ones(size // 4 + 1)
    best_ms = take_turns(
        {
            "cascade": [lambda q=q: index.search(q, K, stages=stages) for q in verify],
            "auto": [lambda q=q: index.search(q, K) for q in verify[:50]],
            "full scan": [lambda q=q: index.search(q, K, stages=None) for q in verify[: 3 if count > 1e5 else 20]],
            "read": [memory.sum] * 20,
        },
        2 if count > REAL else 3,
        time.process_time,
    )
    few = verify[: 20 if count > 1e5 else 100]
    return {
        "stages": stages,
        "recall": recall(index.search(verify, K, stages=stages).ids, expected),
        "auto recall": recall(index.search(verify, K).ids, expected),
        "full scan recall": recall(index.search(few, K, stages=None).ids, expected[: len(few)]),
        "p50": float(np.median(best_ms["cascade"])),
        "p95": float(np.percentile(best_ms["cascade"], 95)),
        "auto": float(np.median(best_ms["auto"])),
        "full scan": float(np.median(best_ms["full scan"])),
        "read": float(np.median(best_ms["read"])),
        "read bytes": memory.nbytes,
        "scenes": min(count, REAL),
        "curve": curve,
    }


def batch(count: int) -> dict:
    """Compare 64 queries in one call with one query: milliseconds a query, of the processor and of the clock."""
    index, stages = open_index(count), cell(f"latency-{count}", lambda: latency(count))["stages"]
    queries, best_ms = load_queries(64), {}
    alone = [lambda q=q: index.search(q, K, stages=stages) for q in queries[:16]]
    together = [lambda: index.search(queries, K, stages=stages)]
    for _ in range(10):
        for threads, clock in ((1, time.process_time), (1, time.perf_counter), (2, time.perf_counter)):
            torch.set_num_threads(threads)
            spent = take_turns({"alone": alone, "together": together}, 1, clock)
            for name, each in (("one", np.median(spent["alone"])), ("batch", spent["together"][0] / 64)):
                key = f"{name}, {threads}, {'clock' if clock is time.perf_counter else 'processor'}"
                best_ms[key] = min(best_ms.get(key, np.inf), float(each))
    torch.set_num_threads(1)
    return best_ms


def filtered(count: int) -> dict:
    """Compare filters of 1% and 50% of the documents with none: milliseconds of a query."""
    torch.set_num_threads(1)
    index, stages = open_index(count), cell(f"latency-{count}", lambda: latency(count))["stages"]
    queries = load_queries(50)
    search = lambda i, where: index.search(queries[i], K, stages=stages, where=where)  # noqa: E731
    index.search(queries[0], K, where={"percent": 0})  # reads the metadata
    wheres: dict[str, Callable[[int], dict | None]] = {
        "no filter": lambda i: None,
        "1%, the same filter again": lambda i: {"percent": 7},
        "50%, the same filter again": lambda i: {"percent": {"$lt": 50}},
    }
    calls = {name: [lambda i=i, w=w: search(i, w(i)) for i in range(50)] for name, w in wheres.items()}
    best_ms = take_turns(calls, 3, time.process_time)
    new = {
        "no filter, once": lambda i: None,
        "1%, a new filter each time": lambda i: {"percent": {"$in": [i + 0.0, i + 0.5]}},
        "50%, a new filter each time": lambda i: {"percent": {"$gte": i, "$lt": i + 50}},
    }
    calls = {name: [lambda i=i, w=w: search(i, w(i)) for i in range(1, 50)] for name, w in new.items()}
    best_ms |= take_turns(calls, 1, time.process_time)
    return {name: float(np.median(ms)) for name, ms in best_ms.items()}


def small_adds(count: int) -> dict:
    """Compare an index of 1,000 adds, before `compact`, with one that was compacted: milliseconds of a query."""
    torch.set_num_threads(1)
    whole, stages = open_index(count), cell(f"latency-{count}", lambda: latency(count))["stages"]
    place, step, done = CACHE / "indexes/small-adds", count // 1000, 0
    shutil.rmtree(place, ignore_errors=True)
    many = MultiVectorIndex.create(place, whole.vectors, whole.dim, quantization="int8")
    start = time.perf_counter()
    for part in documents(count):
        for some in part.split(step):
            many.add(some, [f"scene-{i}" for i in range(done, done + len(some))])
            done += len(some)
    seconds = time.perf_counter() - start
    many.close()
    many = MultiVectorIndex.open(place)
    whole.compact()
    calls = {
        name: [lambda q=q, i=i: i.search(q, K, stages=stages) for q in load_queries(50)]
        for name, i in (("1,000 adds", many), ("compacted", whole))
    }
    best_ms = take_turns(calls, 3, time.process_time)
    many.close()
    shutil.rmtree(place)
    return {"seconds": seconds, **{name: float(np.median(ms)) for name, ms in best_ms.items()}}


def peer(module: str, count: int) -> dict:
    """Build an engine's index and measure its searches."""
    it, place = engines.PEERS[module], CACHE / f"engines/{module}-{count}"
    parts = [part_file(i) for i in range(-(-count // PART))]
    built = cell(f"built-{module}-{count}", lambda: engines.build(it, place, parts, count, MINUTES))
    if "failed" in built:
        return built
    truth = CACHE / f"truth-{count}.npy"
    save_whole(truth, find_best(count, K, QUERIES).numpy())
    queries = CACHE / f"queries-{QUERIES}.npy"
    save_whole(queries, load_queries(QUERIES).numpy())
    return built | engines.run(it, "search", [place, queries, truth, str(TARGET)], MINUTES)


def main() -> None:
    """Measure what the command line names, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--peers", nargs="*", choices=list(engines.PEERS), default=list(engines.PEERS))
    parser.add_argument("--peer-sizes", nargs="+", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--report", action="store_true", help="only write the report")
    arguments = parser.parse_args()
    if not arguments.report:
        torch.set_num_threads(1)
        embed_scenes(min(REAL, max(arguments.sizes)))
        for count in arguments.sizes:
            cell(f"latency-{count}", lambda count=count: latency(count))
        for count in {100_000, REAL} & set(arguments.sizes):
            cell(f"batch-{count}", lambda count=count: batch(count))
            cell(f"filtered-{count}", lambda count=count: filtered(count))
            cell(f"small-adds-{count}", lambda count=count: small_adds(count))
        for count in sorted(set(arguments.peer_sizes) & set(arguments.sizes)):
            for module in arguments.peers:
                cell(f"peer-{module}-{count}", lambda module=module, count=count: peer(module, count))
    write({file.stem: json.loads(file.read_text()) for file in sorted((CACHE / "cells").glob("*.json"))})


if __name__ == "__main__":
    main()
