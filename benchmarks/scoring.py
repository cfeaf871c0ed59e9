"""How fast MaxSim is, side by side with other implementations and with what the machine could do at best.

    make benchmark                                       everything; writes docs/performance.md
    python benchmarks/scoring.py --quick                 a tenth of the documents, prints only
    python benchmarks/scoring.py --full                  more documents, dimensions and threads; needs memory and time
    python benchmarks/scoring.py --sections quality      one or more of: speed, cascade, quality

Every implementation is timed in one process, in turns, and the best turn counts; answers are checked first. `cascade`
and a part of `quality` need the model that `make quickstart` saves, and embed scenes with it once.
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
from quality import measure_cascade, measure_quality
from report import describe_load, describe_machine, write_report
from torch import Tensor
from torch.nn.functional import normalize

from metaembed.evaluation.tables import markdown_table
from metaembed.retrieval.collection import EmbeddingCollection
from metaembed.retrieval.kernels.cpu import load_kernel
from metaembed.retrieval.quantization import QUANTIZATIONS, bytes_per_vector
from metaembed.scoring_metaembed import maxsim

BUDGETS = [(1, 1), (2, 4), (4, 8), (8, 16), (16, 64)]
PATIENCE = 0.6  # seconds of turns that one implementation is given for one cell of a table, at least one turn
MOST_TURNS = 15

Call = Callable[[], Tensor]


def best_times(calls: dict[str, Call], check: Callable[[str, Tensor], None]) -> dict[str, float]:
    """Seconds of the fastest turn of each, in turns, after a warm-up that also counts if it is long.

    With one thread these are seconds of the processor, which other work on the machine does not stretch as much.

    Args:
        calls: What is timed, by name.
        check: Given the name and the answer of every warm-up.
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
    """What this machine does at best: products a second of each type, and bytes read a second.

    Measured in turns with what is compared with it, because other work on the machine slows both down.
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
        """The time that scoring takes at the least."""
        products = query_vectors * document_vectors * dim
        stored = document_vectors * bytes_per_vector(p, dim)
        return max(products * measured[p] / 1024**3, stored * measured["read"] / self.bytes)


def make_embeddings(n: int, vectors: int, dim: int, seed: int) -> Tensor:
    """Random unit vectors [n, vectors, dim]."""
    x = torch.randn(n, vectors, dim, generator=torch.Generator().manual_seed(seed))
    return normalize(x, dim=-1, out=x)


def checker(exact: set[str], queries: Tensor, documents: Tensor) -> Callable[[str, Tensor], None]:
    """Make what stops unless answers that claim to be exact are within 1e-4 of float64 on the first documents."""
    some = documents[:50].double()
    expected = torch.einsum("qid,njd->qnij", queries[:4].double(), some).amax(dim=3).sum(dim=2)

    def check(name: str, answer: Tensor) -> None:
        if name in exact and (error := (answer[:4, :50] - expected).abs().max().item()) > 1e-4:
            raise SystemExit(f"{name} is off by {error:.1e}")

    return check


def measure_speed(n: int, dim: int, threads: int, sides: list[int]) -> tuple[list[str], dict]:
    """Time everything at all budgets. Returns Markdown, and seconds by (queries, budget, implementation)."""
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
            prefix = documents[:, :r_c].contiguous()  # of which the peers, that know no budgets, are given a copy
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


def compare(results: dict) -> list[list[str]]:
    """The ratios that were aimed at, of one measurement."""
    rows = []
    for count, torch_aim, st_aim, peer_aim, limit_aim in ((1, 1.5, 3.5, 2.5, 1.5), (32, 2, 3, 1.5, 1.15)):
        s = {key[2]: value for key, value in results.items() if key[:2] == (count, BUDGETS[-1])}
        if not s:
            continue
        ours, st = s["metaembed, compiled, float32"], s["sentence-transformers"]
        least = min(
            min(results[count, b, name] for name in results["peers"])
            / results[count, b, "metaembed, compiled, float32"]
            for b in BUDGETS
        )
        for what, aim, ratio in (
            ("torch against sentence-transformers", f">= {torch_aim}", st / s["metaembed, torch, float32"]),
            ("compiled against sentence-transformers", f">= {st_aim}", st / ours),
            (
                "compiled against the best exact peer",
                f">= {peer_aim}",
                min(s[name] for name in results["peers"]) / ours,
            ),
            ("the same at the budget where it is least", ">= 1", least),
            ("compiled, times the limit", f"<= {limit_aim}", ours / s["the limit, float32"]),
            ("bfloat16 against float32", "> 1", ours / s["metaembed, compiled, bfloat16"]),
            ("int8 against float32", "> 1", ours / s["metaembed, compiled, int8"]),
        ):
            rows.append([str(count), what, aim, f"{ratio:.2f}"])
    return rows


def title(n: int, dim: int, threads: int) -> str:
    """What is measured."""
    return f"{n:,} documents, {dim} dimensions, {threads} thread{'s' * (threads > 1)}"


def describe_method() -> list[str]:
    """What this was measured on, and how."""
    kernel = ", ".join(f"{p}: {i}" for p, i in load_kernel().instructions.items())
    return [
        f"{describe_machine()}, sentence-transformers {sentence_transformers.__version__}.",
        f"The compiled kernel uses {kernel}.",
        "",
        "Milliseconds of the best of several turns, in which everything in a table is run one after another: of",
        "processor time with one thread, of the clock with two. The limit is what the best matrix product, or reading",
        "the documents once, would take in the same turns. Documents are random unit vectors, 64 each.",
    ]


def speed(size: str) -> list[str]:
    """All timings, the ratios first."""
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
    ratios, details = [], []
    for n, dim, threads, sides in plan:
        needed = (
            n * 64 * sum(bytes_per_vector(p, dim) for p in (*QUANTIZATIONS, "float32"))
        )  # collections, and a tensor
        if needed > 0.7 * psutil.virtual_memory().available:
            details += [
                f"{title(n, dim, threads)}: left out, {needed / 2**30:.0f} GiB are more than this machine has.",
                "",
            ]
            continue
        lines, results = measure_speed(n, dim, threads, sides)
        details += lines
        rows = compare(results)
        ratios += [
            f"{title(n, dim, threads)}:",
            "",
            markdown_table(["queries", "at (16, 64)", "aim", "measured"], rows),
            "",
        ]
        print("\n".join(ratios[-4:]), flush=True)
    return ["## Speed", "", *describe_method(), "", describe_load(), "", "### Ratios", "", *ratios, *details]


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", default="usual")
    sizes.add_argument("--full", dest="size", action="store_const", const="full", help="hours, and 140 GiB of memory")
    parser.add_argument("--sections", nargs="+", choices=["speed", "cascade", "quality"])
    arguments = parser.parse_args()
    sections = {"speed": speed, "cascade": measure_cascade, "quality": measure_quality}
    wanted = arguments.sections or list(sections)
    parts = {name: "\n".join(sections[name](arguments.size)) for name in sections if name in wanted}
    print("\n\n".join(parts.values()))
    if arguments.size != "quick":
        write_report(parts)


if __name__ == "__main__":
    main()
