"""The metrics equal a plain reference and those of sentence-transformers."""

import math

import pytest
import torch
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator

from metaembed.evaluation.tables import markdown_table
from metaembed.retrieval.metrics import mrr, ndcg, recall

QUERIES, DOCUMENTS, CUTS = 7, 12, (1, 3, 10)


@pytest.fixture(scope="module")
def relevant():
    """[Q, N]: from one relevant document to more than any cut."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(QUERIES, DOCUMENTS, generator=generator).argsort(dim=1)
    return chosen < torch.tensor([1, 1, 2, 3, 5, 11, 12])[:, None]


def test_metrics_equal_a_plain_reference(relevant):
    order = torch.rand(QUERIES, DOCUMENTS, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    ranked, counts = relevant.gather(1, order), relevant.sum(dim=1)
    for k in CUTS:
        for i, row in enumerate(ranked.tolist()):
            ranks = [rank for rank, hit in enumerate(row[:k], start=1) if hit]
            ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, int(counts[i])) + 1))
            gain = sum(1 / math.log2(rank + 1) for rank in ranks)
            assert ndcg(ranked, counts, k)[i].item() == pytest.approx(gain / ideal, abs=1e-12)
            assert recall(ranked, counts, k)[i].item() == pytest.approx(len(ranks) / counts[i].item(), abs=1e-12)
            assert mrr(ranked, counts, k)[i].item() == pytest.approx(1 / ranks[0] if ranks else 0, abs=1e-12)


def test_metrics_equal_those_of_sentence_transformers(relevant):
    scores = torch.rand(QUERIES, DOCUMENTS, generator=torch.Generator().manual_seed(2))
    evaluator = MultiVectorInformationRetrievalEvaluator(
        {str(i): "" for i in range(QUERIES)},
        {str(j): "" for j in range(DOCUMENTS)},
        {str(i): {str(j) for j in row.nonzero().flatten().tolist()} for i, row in enumerate(relevant)},
        **{name: list(CUTS) for name in ("ndcg_at_k", "mrr_at_k", "precision_recall_at_k")},
    )
    order = scores.argsort(dim=1, descending=True)
    found = [
        [{"corpus_id": str(j), "score": scores[i, j].item()} for j in row] for i, row in enumerate(order.tolist())
    ]
    theirs = evaluator.compute_metrics(found)
    ranked, counts = relevant.gather(1, order), relevant.sum(dim=1)
    for k in CUTS:
        assert ndcg(ranked, counts, k).mean().item() == pytest.approx(theirs["ndcg@k"][k], abs=1e-12)
        assert recall(ranked, counts, k).mean().item() == pytest.approx(theirs["recall@k"][k], abs=1e-12)
        assert mrr(ranked, counts, k).mean().item() == pytest.approx(theirs["mrr@k"][k], abs=1e-12)


def test_undefined_metrics_are_errors():
    ranked = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="k must be between 1 and the 2 documents"):
        ndcg(ranked, torch.tensor([1]), k=3)
    with pytest.raises(ValueError, match="leave out the queries"):
        recall(ranked, torch.tensor([0]), k=1)


def test_a_table_is_valid_markdown_of_github():
    assert markdown_table(["budget", "nDCG"], [[(1, 1), 0.5]]) == "| budget | nDCG |\n|---|---|\n| (1, 1) | 0.5 |"
