"""Quality of cascades and of smaller documents: on the quickstart's task, and on embeddings of the paper's size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from scenes_embedded import MODEL, embed_scenes
from torch import Tensor
from torch.nn.functional import normalize

from metaembed.evaluation.metrics import ndcg, recall
from metaembed.evaluation.tables import markdown_table
from metaembed.retrieval.cascade import DEFAULT_STAGES, cascade
from metaembed.retrieval.collection import EmbeddingCollection
from metaembed.retrieval.pca import fit_pca
from metaembed.retrieval.quantization import QUANTIZATIONS, bytes_per_vector
from metaembed.retrieval.search import search
from metaembed.retrieval.tune_cascade import tune_cascade

QUERIES = 200
SCENES = 100_000


def recall_at_10(found: Tensor, truth: Tensor) -> float:
    """Return the share of the true best ten `[Q, 10]` among those found `[Q, 10]`."""
    ranked = (found[:, :, None] == truth[:, None, :]).any(dim=2)
    return recall(ranked, torch.full((len(truth),), truth.shape[1])).mean().item()


def ndcg_at_10(found: Tensor, relevant: Tensor) -> float:
    """Return nDCG@10 of positions `[Q, 10]`, with `relevant` `[Q, N]` boolean."""
    return ndcg(relevant.gather(1, found), relevant.sum(dim=1)).mean().item()


def milliseconds(call: Callable[[Tensor], object], queries: Tensor) -> float:
    """Return the median processor time of one query at a time, which other work on the machine hardly changes."""
    call(queries[:1])
    times = []
    for query in queries[:50].split(1):
        start = time.process_time()
        call(query)
        times.append(time.process_time() - start)
    return statistics.median(times) * 1e3


def measure_cascade(size: str) -> list[str]:
    """Compare cascades with full scans, on the quickstart's model."""
    if not MODEL.exists():
        raise SystemExit(f"{MODEL} is not there: run `make quickstart` first")
    torch.set_num_threads(1)
    stored, queries, relevant = embed_scenes(1000 if size == "quick" else SCENES, QUERIES)
    torch.set_num_threads(1)
    documents = stored.to_tensor()
    n, k = len(documents), 10
    collections = {
        p: EmbeddingCollection.from_embeddings(documents, quantization=p) for p in ("float32", "bfloat16", "int8")
    }
    truth = search(queries, documents, k).indices
    full = {p: milliseconds(lambda q, c=c: search(q, c, k), queries) for p, c in collections.items()}
    fastest = min(full.values())
    rows = []

    def add(name: str, found: Tensor, spent: float) -> None:
        quality = [f"{recall_at_10(found, truth):.3f}", f"{ndcg_at_10(found, relevant):.3f}"]
        rows.append([name, *quality, f"{spent:.2f}", f"{fastest / spent:.1f}"])

    for p, c in collections.items():
        add(f"{p}, full scan", search(queries, c, k).indices, full[p])
    both = "int8, the last from float32"
    for name, c, exact in (
        ("float32", collections["float32"], None),
        ("int8", collections["int8"], None),
        (both, collections["int8"], collections["float32"]),
    ):
        options = {f"{name}, default {show(DEFAULT_STAGES)}": {"exact": exact}}
        options[f"{name}, default, margin 0.2"] = {"margin": 0.2, "exact": exact}
        for target in (0.95, 0.99):
            tuned = tune_cascade(c, queries, target, k, exact=exact)
            options[f"{name}, tuned for {target}: {show(tuned.stages)}"] = {"stages": tuned.stages, "exact": exact}
        for name, option in options.items():
            run = lambda q, c=c, o=option: cascade(q, c, k, **o)  # noqa: E731
            add(name, run(queries).indices, milliseconds(run, queries))
    head = ["documents", "recall@10", "nDCG@10", "ms a query", "times the fastest full scan"]
    dim = documents.shape[2]
    return [
        "## Cascades",
        "",
        f"{n:,} scenes embedded by the quickstart's model ({documents.shape[1]} vectors of {dim} dimensions), "
        f"{len(queries)} queries, one thread, one query at a time, processor time. Recall is against the exact search "
        "in float32; stages are tuned on half of the queries.",
        "",
        markdown_table(head, rows),
    ]


def show(stages: tuple) -> str:
    """Return stages as text."""
    return " ".join(f"({r_q},{r_c})->{keep}" for (r_q, r_c), keep in stages) or "no stages"


def measure_quality(size: str) -> list[str]:
    """Compare quantizations and fewer dimensions with float32."""
    torch.set_num_threads(2)
    lines = ["## Fewer bytes", "", "At (16, 64). Recall@10 is the share of the ten best documents of float32."]
    if not MODEL.exists():
        raise SystemExit(f"{MODEL} is not there: run `make quickstart` first")
    stored, queries, relevant = embed_scenes(1000 if size == "quick" else SCENES, QUERIES)
    n = min(len(stored), 5000)
    documents, relevant = stored.to_tensor()[:n], relevant[:, :n]
    lines += ["", f"### The quickstart's task, {n:,} scenes", "", compare(queries, documents, relevant, [64, 32, 16])]
    for dim, dims in ((2048, [2048, 512, 128]), (3584, [3584, 512, 128])):
        queries, documents, relevant = synthesize(500, dim)
        lines += ["", f"### Synthetic, {dim} dimensions, {len(documents):,} documents", ""]
        lines.append(compare(queries, documents, relevant, dims))
    paper = 64 * bytes_per_vector("bfloat16", 3584)
    lines += ["", f"Bytes of a document of 64 vectors; the paper's, 3584 dimensions in bfloat16, takes {paper:,}:", ""]
    rows = []
    for dim in (3584, 2048, 512, 128):
        sizes = [64 * bytes_per_vector(p, dim) for p in QUANTIZATIONS]
        rows.append([dim, *(f"{size:,} ({paper / size:.0f}x)" for size in sizes)])
    return [*lines, markdown_table(["dimensions", *QUANTIZATIONS], rows)]


def compare(queries: Tensor, documents: Tensor, relevant: Tensor, dims: list[int]) -> str:
    """Return a table of every quantization at every number of dimensions."""
    truth = search(queries, documents, 10).indices
    pca = fit_pca(documents[:200], max(dims))
    rows = []
    for dim in dims:
        projection = None if dim == documents.shape[2] else pca[:, :dim].contiguous()
        for p in QUANTIZATIONS:
            collection = EmbeddingCollection.from_embeddings(documents, quantization=p, pca=projection)
            found = search(queries, collection, 10).indices
            size = collection.bytes_per_document
            rows.append(
                [str(dim), p, f"{size:,}", f"{recall_at_10(found, truth):.3f}", f"{ndcg_at_10(found, relevant):.3f}"]
            )
    return markdown_table(["dimensions", "quantization", "bytes a document", "recall@10", "nDCG@10"], rows)


def synthesize(n: int, dim: int, queries: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings like a language model's: few directions hold most of the variance, and all share one.

    The variance of the i-th direction falls as 1/i. The vectors of a document are its topic plus details of their own;
    those of a query are noisy copies of some of them.
    """
    generator = torch.Generator().manual_seed(dim)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dim, generator=generator) * spectrum

    spectrum = torch.arange(1, dim + 1).float().rsqrt()
    common = draw(1, 1)
    documents = normalize(common + 0.6 * draw(n, 1) + draw(n, 64), dim=-1)
    picked = torch.stack([torch.randperm(64, generator=generator)[:16] for _ in range(queries)])  # [Q, 16]
    sources = documents[:queries].gather(1, picked[:, :, None].expand(-1, -1, dim))
    noise = draw(queries, 16)
    return (
        normalize(sources + 1.6 * noise / noise.norm(dim=-1, keepdim=True), dim=-1),
        documents,
        torch.eye(n, dtype=torch.bool)[:queries],
    )
