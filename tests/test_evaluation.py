"""One encoding gives the right figures at every budget."""

import math

import pytest
import torch
from tiny_models import WORDS, picture, tiny_encoder

from metaembed.evaluation_metaembed import BudgetEvaluator, budget_table

QUERIES = {f"q{i}": word for i, word in enumerate(WORDS[:6])}
CORPUS = {f"d{i}": {"text": word, "image": picture(i)} if i % 2 else word for i, word in enumerate(WORDS)}
RELEVANT = {f"q{i}": {f"d{i}", f"d{i + 6}"} for i in range(6)}


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


def test_every_budget_is_what_encoding_at_that_budget_gives(encoder):
    evaluator = BudgetEvaluator(QUERIES, CORPUS, RELEVANT, budgets=encoder[0].model.config.budgets, name="val")
    metrics = evaluator.budget_metrics(evaluator(encoder))
    assert list(metrics) == [(1, 1), (2, 4), (4, 8)]
    for (r_q, r_c), found in metrics.items():
        scores = encoder.similarity(
            encoder.encode_query(list(QUERIES.values()), num_meta=r_q),
            encoder.encode_document(list(CORPUS.values()), num_meta=r_c),
        )
        order = scores.argsort(dim=1, descending=True).tolist()
        ndcg = reciprocal = recall = 0.0
        for i, ranking in enumerate(order):
            hits = [rank for rank, j in enumerate(ranking[:10]) if j in (i, i + 6)]
            ndcg += sum(1 / math.log2(rank + 2) for rank in hits) / (1 + 1 / math.log2(3)) / 6
            reciprocal += 1 / (hits[0] + 1) / 6 if hits else 0
            recall += len([rank for rank in hits if rank < 5]) / 2 / 6
        assert found["ndcg@10"] == pytest.approx(ndcg)
        assert found["mrr@10"] == pytest.approx(reciprocal)
        assert found["recall@5"] == pytest.approx(recall)
    table = budget_table(metrics, ["ndcg@10", "recall@1"]).splitlines()
    assert len(table) == 5 and table[-1].startswith(f"| (4, 8) | {metrics[4, 8]['ndcg@10']:.4f} |")


def test_the_model_defaults_do_not_shrink_an_evaluation(encoder):
    evaluator = BudgetEvaluator(QUERIES, CORPUS, RELEVANT, budgets=[(1, 1), (4, 8)], corpus_chunk_size=5)
    expected = evaluator(encoder)
    encoder[0].query_num_meta, encoder[0].document_num_meta = 2, 2
    try:
        assert evaluator(encoder) == expected
    finally:
        encoder[0].query_num_meta = encoder[0].document_num_meta = None
    assert evaluator.primary_metric == "4x8_ndcg@10"


def test_every_input_is_encoded_once(encoder):
    seen = []
    hook = encoder[0].model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        BudgetEvaluator(QUERIES, CORPUS, RELEVANT, budgets=encoder[0].model.config.budgets)(encoder)
    finally:
        hook.remove()
    assert sum(seen) == len(QUERIES) + len(CORPUS)


def test_several_processes_encode_as_one(encoder):
    documents = list(CORPUS.values()) * 2
    expected = encoder.encode_document(documents, num_meta=3)
    pool = encoder.start_multi_process_pool(["cpu", "cpu"])
    try:
        actual = encoder.encode_document(documents, num_meta=3, pool=pool, chunk_size=5)
    finally:
        encoder.stop_multi_process_pool(pool)
    torch.testing.assert_close(torch.stack(list(actual)), torch.stack(list(expected)), atol=1e-6, rtol=0)
