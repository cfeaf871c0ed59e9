"""The speed of MaxSim, compared with other implementations and with the limits of the machine.

    make benchmark                                       everything; writes docs/performance.md
    python benchmarks/scoring.py --quick                 a tenth of the documents, prints only
    python benchmarks/scoring.py --full                  more documents, dimensions and threads; needs memory and time
    python benchmarks/scoring.py --sections quality      speed, or quality, or both

All implementations take turns in one process, and the best turn of each counts; their scores are checked first.
A part of `quality` needs the model that `make quickstart` saves, and embeds scenes with it once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import psutil
import sentence_transformers
import torch
from peers import find_peers, install_peers
from quality import measure_quality
from report import describe_load, describe_machine, write_report
from torch import Tensor
from torch.nn.functional import normalize

from metaembed.configuration_metaembed import DEFAULT_BUDGETS
from metaembed.evaluation.tables import markdown_table
from metaembed.retrieval.collection import EmbeddingCollection
from metaembed.retrieval.kernels.cpu import load_kernel
from metaembed.retrieval.quantization import QUANTIZATIONS, bytes_per_vector
from metaembed.scoring_metaembed import maxsim

BUDGETS = list(DEFAULT_BUDGETS)
PATIENCE = 0.6  # seconds after which an implementation gets no more turns for a cell of a table
MOST_TURNS = 15

Call = Callable[[], Tensor]


def best_times(calls: dict[str, Call], check: Callable[[str, Tensor], None]) -> dict[str, float]:
    """Return the seconds of the fastest turn of each call, after a warm-up, which also counts if it is long.

    With one thread these are seconds of processor time, on which other work on the machine has less effect.

    Args:
        calls: The functions to time, by name.
        check: Called with the name and the result of every warm-up.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best: dict[str, float] = {}
    spent = dict.fromkeys(calls, 0.0)
    for turn in range(MOST_TURNS + 1):
        for name, call in calls.items():
            if turn and spent[name] > PATIENCE:
                continue
            start = clock()
            answer = call()
            seconds = clock() - start
            if not turn:
                check(name, answer)
            spent[name] += seconds
            if turn or seconds > PATIENCE:
                best[name] = min(best.get(name, seconds), seconds)
    return best


class Limits:
    """The limits of this machine: products a second of each type, and bytes read a second.

    They take turns with the implementations, because other work on the machine slows both down.
    """

    def __init__(self) -> None:
        x = torch.randn(1024, 1024)
        half, integers = x.bfloat16(), torch.randint(-127, 127, (1024, 1024), dtype=torch.int8)
        memory = torch.ones(1 << 26)  # 256 MiB
        self.calls: dict[str, Call] = {
            "float32": lambda: x @ x,
            "bfloat16": lambda: half @ half,
            "int8": lambda: torch._int_mm(integers, integers),
            "read": memory.sum,
        }
        self.bytes = memory.nbytes

    def seconds(
        self, measured: dict[str, float], p: str, query_vectors: int, document_vectors: int, dim: int
    ) -> float:
        """Return the least time that scoring can take."""
        products = query_vectors * document_vectors * dim
        stored = document_vectors * bytes_per_vector(p, dim)
        return max(products * measured[p] / 1024**3, stored * measured["read"] / self.bytes)


def make_embeddings(n: int, vectors: int, dim: int, seed: int) -> Tensor:
    """Return random unit vectors [n, vectors, dim]."""
    x = torch.randn(n, vectors, dim, generator=torch.Generator().manual_seed(seed))
    return normalize(x, dim=-1, out=x)


def checker(exact: set[str], queries: Tensor, documents: Tensor) -> Callable[[str, Tensor], None]:
    """Return a check that stops unless scores that should be exact are within 1e-4 of float64 on some documents."""
    some = documents[:50].double()
    expected = torch.einsum("qid,njd->qnij", queries[:4].double(), some).amax(dim=3).sum(dim=2)

    def check(name: str, answer: Tensor) -> None:
        if name in exact and (error := (answer[:4, :50] - expected).abs().max().item()) > 1e-4:
            raise SystemExit(f"{name} is off by {error:.1e}")

    return check


def measure_speed(n: int, dim: int, threads: int, sides: list[int]) -> tuple[list[str], dict]:
    """Time every implementation at all budgets: Markdown, and seconds by (queries, budget, implementation)."""
    torch.set_num_threads(threads)
    limits, peers = Limits(), find_peers()
    documents = make_embeddings(n, 64, dim, seed=0)
    collections = {p: EmbeddingCollection.from_embeddings(documents, quantization=p) for p in QUANTIZATIONS}
    lines = [f"### {title(n, dim, threads)}", ""]
    results = {}
    exact = {*peers, "metaembed, torch, float32", "metaembed, compiled, float32"}
    for count in sides:
        for r_q, r_c in BUDGETS:
            queries = make_embeddings(count, r_q, dim, seed=1)
            prefix = documents[:, :r_c].contiguous()  # a copy for the peers, which know no budgets
            calls: dict[str, Call] = {name: partial(f, queries, prefix) for name, f in peers.items()}
            calls["metaembed, torch, float32"] = partial(maxsim, queries, prefix, backend="torch")
            for p, collection in collections.items():
                calls[f"metaembed, compiled, {p}"] = partial(maxsim, queries, collection, (r_q, r_c))
            seconds = best_times(calls | limits.calls, checker(exact, queries, prefix))
            best = {name: seconds[name] for name in calls}
            for p in ("float32", "bfloat16", "int8"):
                best[f"the limit, {p}"] = limits.seconds(seconds, p, count * r_q, n * r_c, dim)
            results |= {(count, (r_q, r_c), name): s for name, s in best.items()}
        lines += [f"{count} quer{'y' if count == 1 else 'ies'}, milliseconds:", ""]
        names = [key[2] for key in results if key[:2] == (count, BUDGETS[0])]
        rows = [[name, *(f"{results[count, b, name] * 1e3:.2f}" for b in BUDGETS)] for name in names]
        lines += [markdown_table(["", *map(str, BUDGETS)], rows), ""]
        print("\n".join(lines[-4:]), flush=True)
    return lines, results | {"peers": list(peers)}


def compare(results: dict, count: int) -> dict[str, str]:
    """Return the ratios of one measurement at (16, 64), by what they compare."""
    s = {key[2]: value for key, value in results.items() if key[:2] == (count, BUDGETS[-1])}
    ours, st = s["metaembed, compiled, float32"], s["sentence-transformers"]
    least = min(
        min(results[count, b, name] for name in results["peers"]) / results[count, b, "metaembed, compiled, float32"]
        for b in BUDGETS
    )
    ratios = {
        "torch: times faster than sentence-transformers": st / s["metaembed, torch, float32"],
        "compiled: times faster than sentence-transformers": st / ours,
        "compiled: times faster than the fastest peer": min(s[name] for name in results["peers"]) / ours,
        "the same, the smallest of all budgets": least,
        "compiled: time over the limit's": ours / s["the limit, float32"],
        "bfloat16: times faster than float32": ours / s["metaembed, compiled, bfloat16"],
        "int8: times faster than float32": ours / s["metaembed, compiled, int8"],
    }
    return {what: f"{ratio:.2f}" for what, ratio in ratios.items()}


def title(n: int, dim: int, threads: int) -> str:
    """Return the title of a measurement."""
    return f"{n:,} documents, {dim} dimensions, {threads} thread{'s' * (threads > 1)}"


def describe_method() -> list[str]:
    """Return a description of the machine and of the method."""
    kernel = ", ".join(f"{p}: {i}" for p, i in load_kernel().instructions.items())
    return [
        f"{describe_machine()}, sentence-transformers {sentence_transformers.__version__}.",
        f"The compiled kernel uses {kernel}.",
        "",
        "All implementations in a table take turns, and the best turn of each counts: milliseconds of processor time",
        "with one thread, and of the clock with two. The limit is the time that the best matrix product, or reading",
        "the documents once, takes in the same turns. Documents are 64 random unit vectors each.",
    ]


def speed(size: str) -> list[str]:
    """Return all timings, the ratios first."""
    install_peers()
    plan = {
        "quick": [(1000, 128, 1, [1, 32]), (1000, 128, 2, [1, 32])],
        "usual": [
            (10_000, 128, 1, [1, 32]),
            (10_000, 128, 2, [1, 32]),
            (100_000, 128, 1, [1, 32]),
            (10_000, 2048, 1, [1, 32]),
        ],
        "full": [(n, dim, t, [1, 32]) for n in (10_000, 100_000) for dim in (128, 2048) for t in (1, 2)],
    }[size]
    ratios: dict[str, dict[str, str]] = {}
    notes, details = [], []
    for n, dim, threads, sides in plan:
        kept = (*QUANTIZATIONS, "float32")  # an index of each, and a tensor
        needed = n * 64 * sum(bytes_per_vector(p, dim) for p in kept)
        if needed > 0.7 * psutil.virtual_memory().available:
            notes += [f"{title(n, dim, threads)}: left out, because it needs {needed / 2**30:.0f} GiB of memory.", ""]
            continue
        lines, results = measure_speed(n, dim, threads, sides)
        details += lines if not details else []  # all are printed, the first goes into the document
        for count in sides:
            column = (
                f"{n:,} x {dim}, {threads} thread{'s' * (threads > 1)}, {count} quer{'y' if count == 1 else 'ies'}"
            )
            ratios[column] = compare(results, count)
    whats = next(iter(ratios.values()))
    table = markdown_table(["", *ratios], [[what, *(column[what] for column in ratios.values())] for what in whats])
    head = ["Ratios at (16, 64), by documents x dimensions:", "", table, ""]
    return ["## Scoring", "", *describe_method(), "", describe_load(), "", *head, *notes, *details]


def main() -> None:
    """Run the sections that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", default="usual")
    sizes.add_argument("--full", dest="size", action="store_const", const="full", help="hours, and 140 GiB of memory")
    parser.add_argument("--sections", nargs="+", choices=["speed", "quality"])
    arguments = parser.parse_args()
    sections = {"speed": speed, "quality": measure_quality}
    wanted = arguments.sections or list(sections)
    parts = {name: "\n".join(sections[name](arguments.size)) for name in sections if name in wanted}
    print("\n\n".join(parts.values()))
    if arguments.size != "quick":
        write_report(parts)


if __name__ == "__main__":
    main()
