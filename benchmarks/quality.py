"""Quality of smaller documents: on the quickstart's task, and on embeddings of the paper's size."""

from __future__ import annotations

import torch
from scenes_embedded import QUERIES, find_relevant, load_queries, load_scenes
from torch import Tensor
from torch.nn.functional import normalize

from metaembed.evaluation.metrics import ndcg, recall
from metaembed.evaluation.tables import markdown_table
from metaembed.retrieval.collection import EmbeddingCollection
from metaembed.retrieval.pca import fit_pca
from metaembed.retrieval.quantization import QUANTIZATIONS, bytes_per_vector
from metaembed.retrieval.search import search

SCENES = 5000


def recall_at_10(found: Tensor, truth: Tensor) -> float:
    """Return the share of the true best ten `[Q, 10]` among those found `[Q, 10]`."""
    ranked = (found[:, :, None] == truth[:, None, :]).any(dim=2)
    return recall(ranked, torch.full((len(truth),), truth.shape[1])).mean().item()


def ndcg_at_10(found: Tensor, relevant: Tensor) -> float:
    """Return nDCG@10 of positions `[Q, 10]`, with `relevant` `[Q, N]` boolean."""
    return ndcg(relevant.gather(1, found), relevant.sum(dim=1)).mean().item()


def measure_quality(size: str) -> list[str]:
    """Compare quantizations and fewer dimensions with float32."""
    torch.set_num_threads(2)
    lines = ["## Smaller documents", "", "At (16, 64). Recall@10 is the share of the ten best documents of float32."]
    n = 1000 if size == "quick" else SCENES
    documents, queries, relevant = load_scenes(n), load_queries(), find_relevant(n, QUERIES)
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
