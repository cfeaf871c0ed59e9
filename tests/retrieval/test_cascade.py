"""A cascade finds the documents of a search with less work, and reports how much less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from metaembed.retrieval.cascade import Stage, cascade
from metaembed.retrieval.collection import EmbeddingCollection
from metaembed.retrieval.index import MultiVectorIndex
from metaembed.retrieval.search import search
from metaembed.retrieval.tune_cascade import tune_cascade
from metaembed.scoring_metaembed import maxsim


def nested(seed, n, vectors, dim, noise=0.5):
    """Vectors that all describe their document roughly alike, so that a prefix is a fair guess."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(n, 1, dim, generator=generator)
    return normalize(centre + noise * torch.randn(n, vectors, dim, generator=generator), dim=-1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 60), st.integers(1, 12), st.sampled_from([None, 0.0, 0.1, 10.0]), st.data())
def test_a_cascade_that_keeps_everything_equals_a_search(q, n, k, margin, data):
    queries, documents = nested(n, q, 4, 16), nested(n + 1, n, 8, 16)
    everything = max(n, k)
    stages = data.draw(st.sampled_from([[], [((1, 1), everything)], [((1, 1), everything), ((2, 4), everything)]]))
    if margin is not None and margin < 10:
        margin = None  # the default would not keep everything
    found, expected = cascade(queries, documents, k, stages=stages, margin=margin), search(queries, documents, k)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.indices, expected.indices)
    assert found.scored.shape == (q, len(stages) + 1)


@pytest.mark.parametrize("documents_as", [lambda x: x, EmbeddingCollection.from_embeddings])
def test_each_stage_keeps_the_best_of_the_stage_before(documents_as):
    queries, documents = nested(0, 5, 4, 16), nested(1, 200, 8, 16)
    scores, indices = cascade(queries, documents_as(documents), 3, stages=[((1, 1), 40), ((2, 4), 9)])
    for query, row, values in zip(queries, indices, scores, strict=True):
        left = search(query, documents, 40, (1, 1)).indices[0].sort().values
        left = left[search(query, documents[left], 9, (2, 4)).indices[0].sort().values]
        expected = search(query, documents[left], 3)
        assert torch.equal(left[expected.indices[0]], row)
        torch.testing.assert_close(values, expected.scores[0])


def test_a_collection_of_several_appends_gives_the_same_results():
    queries, documents = nested(0, 3, 4, 16), nested(1, 100, 8, 16)
    collection = EmbeddingCollection(8, 16)
    for part in documents.split([60, 1, 39]):
        collection.append(part)
    for stages in ([((1, 1), 20)], [((1, 1), 50), ((2, 2), 10)]):
        expected = cascade(queries, documents, 5, stages=stages)
        assert torch.equal(cascade(queries, collection, 5, stages=stages).indices, expected.indices)


def test_with_a_margin_easy_queries_do_less_than_hard_ones():
    documents = nested(1, 500, 8, 32)
    easy = documents[7, :4]  # one document is far ahead
    hard = normalize(torch.ones(4, 32), dim=-1)  # all are alike
    found = cascade(torch.stack([easy, hard]), documents, 1, stages=[((1, 1), 100), ((2, 4), 20)], margin=0.1)
    assert found.indices[0].item() == 7
    assert found.scored[0].tolist() == [500, 0, 1]
    assert found.scored[1, 1] > 1
    assert repr(found).startswith("CascadeResult(") and "scored=[500, " in repr(found)


def test_scores_are_those_of_the_last_budget():
    queries, documents = nested(0, 4, 4, 16), nested(1, 50, 8, 16)
    for margin in (None, 0.0):
        scores, indices = cascade(queries, documents, 2, (4, 6), stages=[((1, 1), 10)], margin=margin)
        torch.testing.assert_close(scores, maxsim(queries, documents, (4, 6)).gather(1, indices))


def test_the_last_documents_are_scored_from_exact_ones():
    queries, documents = nested(0, 6, 4, 32), nested(1, 300, 8, 32)
    rough = EmbeddingCollection.from_embeddings(documents, quantization="binary")
    scores, indices = cascade(queries, rough, 3, stages=[((2, 4), 60), ((4, 8), 40)], exact=documents)
    for query, row, values in zip(queries, indices, scores, strict=True):
        left = search(query, rough, 60, (2, 4)).indices[0].sort().values
        kept = search(query, rough, 40, include=left).indices[0].sort().values
        expected = search(query, documents[kept], 3)
        assert torch.equal(kept[expected.indices[0]], row)
        torch.testing.assert_close(values, expected.scores[0])
    found = cascade(queries, rough, 3, stages=[], exact=documents)
    assert torch.equal(found.indices, search(queries, documents, 3).indices)


def test_tuning_with_exact_documents_keeps_their_recall():
    documents = nested(1, 2000, 8, 32)
    rough = EmbeddingCollection.from_embeddings(documents, quantization="binary")
    queries = normalize(documents[:80, :4] + 0.3 * torch.randn(80, 4, 32), dim=-1)
    tuned = tune_cascade(rough, queries, target_recall=0.95, k=5, exact=documents)
    seen = cascade(queries[1::2], rough, 5, stages=tuned.stages, exact=documents).indices
    truth = search(queries[1::2], documents, 5).indices
    recall = (seen[:, :, None] == truth[:, None, :]).any(2).double().mean().item()
    assert recall == pytest.approx(tuned.recall) and recall >= 0.95


def test_tuning_keeps_the_target_recall_on_queries_it_has_not_seen():
    documents = nested(1, 3000, 16, 32)
    queries = normalize(
        documents[:80, :4] + 0.3 * torch.randn(80, 4, 32, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    tuned = tune_cascade(documents, queries, target_recall=0.9, k=5)
    assert tuned.recall >= 0.9
    seen = cascade(queries[1::2], documents, 5, stages=tuned.stages).indices
    truth = search(queries[1::2], documents, 5).indices
    recall = (seen[:, :, None] == truth[:, None, :]).any(2).double().mean().item()
    assert recall == pytest.approx(tuned.recall)
    recalls, costs = [p.recall for p in tuned.curve], [p.milliseconds for p in tuned.curve]
    assert recalls == sorted(recalls) and costs == sorted(costs)
    assert recalls[-1] == 1


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"stages": [((1, 1), 2)]}, ValueError, "at least k = 3"),
        ({"stages": [((1, 1), 5), ((2, 2), 6)]}, ValueError, "no more than the stage before"),
        ({"stages": [((1, 9), 5)]}, ValueError, "9 document vectors; from 1 to 8"),
        ({"stages": [((1, 1), 5.0)]}, TypeError, "must be an int"),
        ({"stages": [5]}, TypeError, "a stage must be"),
        ({"margin": -1.0}, ValueError, "0 or more"),
        ({"margin": float("nan")}, ValueError, "0 or more"),
        ({"k": 0}, ValueError, "at least 1"),
        ({"exact": nested(1, 19, 8, 16)}, ValueError, "the same documents, but has 19 of them where there are 20"),
    ],
)
def test_bad_stages_are_an_error_that_says_what_to_do(change, error, match):
    good = {"queries": nested(0, 2, 4, 16), "documents": nested(1, 20, 8, 16), "k": 3, "stages": [((1, 1), 5)]}
    with pytest.raises(error, match=match):
        cascade(**{**good, **change})


def test_bad_tuning_is_an_error_that_says_what_to_do():
    queries, documents = nested(0, 4, 4, 16), nested(1, 20, 8, 16)
    with pytest.raises(ValueError, match="from 0 to 1"):
        tune_cascade(documents, queries, 1.5)
    with pytest.raises(ValueError, match="at least 2 queries"):
        tune_cascade(documents, queries[:1], 0.9)


def test_tuning_an_index_uses_its_copies_and_leaves_out_what_was_deleted():
    documents = nested(1, 1500, 8, 32)
    index = MultiVectorIndex.create(None, 8, 32, {"first": ("binary", 1), "main": "int8"})
    index.add(documents, ids=[f"d{i}" for i in range(1500)])
    index.delete(ids=[f"d{i}" for i in range(0, 1500, 3)])
    queries = normalize(documents[1:120:2, :4] + 0.3 * torch.randn(60, 4, 32), dim=-1)
    tuned = tune_cascade(index, queries, 0.9, k=5, budgets=[(1, 1), (2, 4)])
    assert {stage.quantization for option in tuned.curve for stage in option.stages} <= {"first", "main"}
    assert tuned.recall >= 0.9
    found, truth = (index.search(queries, 5, stages=stages).ids for stages in (tuned.stages, None))
    assert sum(len(set(a) & set(b)) for a, b in zip(found, truth, strict=True)) >= 0.85 * 300
    with pytest.raises(ValueError, match="keeps its own exact copy"):
        tune_cascade(index, queries, 0.9, exact=documents)
    with pytest.raises(ValueError, match="only a MultiVectorIndex keeps several copies"):
        cascade(queries, documents, 5, stages=[Stage((1, 1), 50, "first")])
