"""Scores equal a float64 reference; every bad input raises an error that says what to do."""

import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from metaembed import scoring_metaembed as scoring
from metaembed.retrieval.collection import EmbeddingCollection
from metaembed.retrieval.search import rescore, search, top_k
from metaembed.scoring_metaembed import maxsim


def reference(queries, documents, budget=None):
    """MaxSim in float64, straight from the formula."""
    r_q, r_c = budget or (queries.shape[1], documents.shape[1])
    q, d = queries[:, :r_q].double(), documents[:, :r_c].double()
    return torch.einsum("qid,njd->qnij", q, d).amax(3).sum(2)


def vectors(seed, *shape, dtype=torch.float32):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1).to(dtype)


@st.composite
def sides(draw):
    """Queries, documents and a budget of random shapes, dtypes and memory layouts."""
    q, n = draw(st.integers(0, 5)), draw(st.integers(0, 40))
    r_q, r_c, dim = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    seed = draw(st.integers(0, 2**31))
    queries, documents = vectors(seed, q, r_q, dim, dtype=dtype), vectors(seed + 1, n, r_c, dim, dtype=dtype)
    layout = draw(st.sampled_from(["plain", "transposed", "strided"]))
    if layout == "transposed":
        documents = documents.transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "strided":
        documents = documents.repeat(2, 1, 2)[:n, :, ::2][:, :, : (dim + 1) // 2]
        queries = queries[:, :, : (dim + 1) // 2]
    if draw(st.booleans()) and n:
        documents[draw(st.integers(0, n - 1))] = 0
    budget = draw(st.none() | st.tuples(st.integers(1, r_q), st.integers(1, r_c)))
    return queries, documents, budget


@settings(max_examples=200, deadline=None)
@given(sides(), st.sampled_from(["auto", "torch"]))
def test_scores_equal_a_float64_reference(case, backend):
    queries, documents, budget = case
    scores = maxsim(queries, documents, budget, backend=backend)
    if documents.dtype == torch.bfloat16:
        queries = queries.bfloat16()  # bfloat16 documents round the queries too
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), reference(queries, documents, budget), atol=1e-5, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(sides(), st.integers(1, 50), st.sampled_from(["auto", "torch"]))
def test_search_returns_the_best_k_in_order(case, k, backend):
    queries, documents, budget = case
    scores, indices = search(queries, documents, k, budget, backend=backend)
    assert scores.shape == indices.shape == (len(queries), min(k, len(documents)))
    every = maxsim(queries, documents, budget, backend=backend)
    assert torch.equal(every.gather(1, indices), scores)
    assert torch.equal(scores, every.sort(dim=1, descending=True).values[:, :k])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 60), st.integers(1, 20), st.data())
def test_included_documents_are_searched_and_excluded_ones_are_not(q, n, k, data):
    queries, documents = vectors(n, q, 3, 8), vectors(n + 1, n, 4, 8)
    include = data.draw(st.none() | st.lists(st.integers(0, n - 1)))
    exclude = data.draw(st.none() | st.lists(st.integers(0, n - 1)))
    as_mask = data.draw(st.booleans())
    given_include = include
    if include is not None and as_mask:
        given_include = torch.tensor([i in include for i in range(n)])
    scores, indices = search(queries, documents, k, include=given_include, exclude=exclude)
    left = sorted(set(range(n) if include is None else include) - set(exclude or []))
    expected, order = top_k(maxsim(queries, documents)[:, left], k)
    torch.testing.assert_close(scores, expected)
    assert torch.equal(indices, torch.tensor(left, dtype=torch.int64)[order])


@settings(max_examples=50, deadline=None)
@given(sides(), st.integers(0, 9), st.sampled_from(["auto", "torch"]))
def test_rescoring_equals_scoring_all(case, m, backend):
    queries, documents, budget = case
    if len(queries) and len(documents):
        candidates = torch.randint(0, len(documents), (len(queries), m))
        every = maxsim(queries, documents, budget, backend=backend)
        got = rescore(queries, documents, candidates, budget, backend=backend)
        torch.testing.assert_close(got, every.gather(1, candidates), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_scores_depend_neither_on_threads_nor_on_a_documents_position(backend, threads):
    queries, documents = vectors(0, 3, 16, 96), vectors(1, 1001, 20, 96)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = maxsim(queries, documents, backend=backend)
        torch.set_num_threads(threads)
        assert torch.equal(maxsim(queries, documents, backend=backend), expected)
        for start, stop in [(0, 1), (17, 300), (1000, 1001)]:
            part = maxsim(queries, documents[start:stop], backend=backend)
            if backend == "compiled":
                assert torch.equal(part, expected[:, start:stop])
            else:  # a matrix product may add in another order for other shapes
                torch.testing.assert_close(part, expected[:, start:stop], atol=1e-6, rtol=0)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(0, 60), st.integers(1, 70), st.integers(0, 2**31))
def test_ties_go_to_the_lower_index(q, n, k, seed):
    scores = torch.randint(0, 4, (q, n), generator=torch.Generator().manual_seed(seed)).float()
    values, indices = top_k(scores, k)
    expected = sorted(range(n), key=lambda i: (-scores[0, i].item(), i))[:k]
    assert indices[0].tolist() == expected
    assert torch.equal(values, scores.gather(1, indices))


def test_an_all_zero_vector_scores_zero_and_is_not_padding():
    query, negative = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    assert maxsim(query, torch.cat([negative, torch.zeros(1, 2)])[None]).item() == 0
    assert maxsim(query, negative).item() == -1


def test_scores_are_equal_with_and_without_the_package(monkeypatch):
    """Without it, or with a version that lacks a name, torch gives the same scores."""
    queries, documents = vectors(0, 3, 4, 16), vectors(1, 50, 7, 16)
    expected = maxsim(queries, documents, (2, 5))
    index = EmbeddingCollection.from_embeddings(documents)
    monkeypatch.setitem(sys.modules, "metaembed.retrieval.search", None)
    torch.testing.assert_close(maxsim(queries, documents, (2, 5)), expected, atol=1e-6, rtol=0)
    for side, backend in ((documents, "compiled"), (index, "auto")):
        with pytest.raises(RuntimeError, match="pip install metaembed"):
            maxsim(queries, side, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("query_vectors", [1, 20])
def test_a_score_that_overflows_is_an_error(backend, dtype, query_vectors):
    documents = vectors(1, 60, 3, 32)
    documents[7, 1] = torch.tensor([1e30, -1e30] * 16)  # finite, but sums of its products are infinity minus infinity
    queries = vectors(0, 2, query_vectors, 32)
    queries[1, -1] = 1e12  # in the last product only
    for call in (maxsim, lambda *sides, **options: search(*sides, 3, **options)):
        with pytest.raises(ValueError, match="NaN or infinity, or values"):
            call(queries, documents.to(dtype), backend=backend)
    with pytest.raises(ValueError, match="queries hold"):
        maxsim(queries * 1e4, documents)
    with pytest.raises(ValueError, match="embeddings hold"):
        EmbeddingCollection.from_embeddings(documents)


def test_memory_is_bounded_for_many_queries_and_documents(monkeypatch):
    queries, documents = vectors(0, 300, 2, 4), vectors(1, 200, 3, 4)
    expected = maxsim(queries, documents, backend="torch")
    largest = 0
    products = scoring._maxima

    def measured(queries, documents):
        nonlocal largest
        largest = max(largest, len(queries) * documents.shape[0] * documents.shape[1])
        return products(queries, documents)

    monkeypatch.setattr(scoring, "_maxima", measured)
    monkeypatch.setattr(scoring, "_PRODUCTS", 100)
    torch.testing.assert_close(maxsim(queries, documents, backend="torch"), expected)
    assert 0 < largest <= 100


def test_results_are_frozen_and_unpack():
    found = search(vectors(0, 2, 3, 5), vectors(1, 4, 6, 5), k=2)
    scores, indices = found
    assert scores is found.scores and indices is found.indices
    with pytest.raises(FrozenInstanceError):
        found.scores = indices


def test_many_documents_are_scored_block_by_block_with_the_same_answer():
    queries, documents = vectors(0, 3, 2, 4), vectors(1, 1, 2, 4).expand(3_000_000, 2, 4)
    scores, indices = search(queries, documents, 3)  # more documents than fit one block of scores, all equal
    assert indices.tolist() == [[0, 1, 2]] * 3
    assert torch.equal(scores[:, :1].expand(3, 3), scores)


def test_lists_and_arrays_are_accepted():
    queries, documents = vectors(0, 2, 3, 5), vectors(1, 4, 6, 5)
    expected = maxsim(queries, documents)
    assert torch.equal(maxsim(list(queries), [d.numpy() for d in documents]), expected)
    assert torch.equal(maxsim(queries.numpy(), documents.numpy()), expected)
    assert torch.equal(maxsim(queries[0], documents[0]), maxsim(queries[:1], documents[:1]))


def test_the_result_names_its_backend():
    queries, documents = vectors(0, 2, 3, 5), vectors(1, 4, 6, 5)
    assert "torch (cpu)" in repr(search(queries, documents, k=2, backend="torch"))
    assert "compiled (" in repr(search(queries, documents, k=2, backend="compiled"))


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"queries": torch.zeros(2, 3, 4)}, ValueError, "4 dimensions and documents 5"),
        ({"queries": torch.zeros(5)}, ValueError, r"must be \[n, r, D\]"),
        ({"documents": torch.zeros(2, 0, 5)}, ValueError, r"must be \[n, r, D\]"),
        ({"documents": torch.zeros(2, 6, 5, dtype=torch.int64)}, TypeError, "floating point"),
        ({"documents": "text"}, TypeError, "tensor, an array or a list"),
        ({"documents": []}, ValueError, "at least one"),
        ({"documents": [torch.zeros(1, 5), torch.zeros(2, 5)]}, ValueError, "equally shaped"),
        ({"documents": torch.full((2, 6, 5), float("nan"))}, ValueError, "documents hold NaN or infinity"),
        ({"documents": torch.full((2, 6, 5), float("-inf"))}, ValueError, "documents hold NaN or infinity"),
        ({"queries": np.full((3, 5), np.inf)}, ValueError, "queries hold NaN or infinity"),
        ({"budget": 3}, TypeError, "pair"),
        ({"budget": (1, 2, 3)}, TypeError, "pair"),
        ({"budget": (1.0, 2)}, TypeError, "int"),
        ({"budget": (True, 2)}, TypeError, "int"),
        ({"budget": (0, 2)}, ValueError, "0 query vectors; from 1 to 3"),
        ({"budget": (3, 7)}, ValueError, "7 document vectors; from 1 to 6"),
        ({"include": [4]}, ValueError, "from 0 to 3, but 4"),
        ({"exclude": [0.5]}, TypeError, "whole numbers"),
        ({"include": torch.ones(3, dtype=torch.bool)}, TypeError, "bool for each of the 4"),
        ({"backend": "fast"}, ValueError, "'auto', 'torch', 'compiled' or 'fused'"),
        ({"k": 0}, ValueError, "at least 1"),
        ({"k": 2.0}, TypeError, "int"),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(change, error, match, backend):
    good = {
        "backend": backend,
        "queries": vectors(0, 2, 3, 5),
        "documents": vectors(1, 4, 6, 5),
        "k": 2,
        "budget": None,
    }
    with pytest.raises(error, match=match):
        search(**{**good, **change})


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_ids_in_place_of_positions_are_named(name):
    vectors = torch.eye(3)[:, None]
    with pytest.raises(TypeError, match=rf"{name} must be positions .*, got ids: .*{name}_ids"):
        search(vectors, vectors, 1, **{name: ["apples"]})
