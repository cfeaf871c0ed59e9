"""The last stage of a search by tokens: over two indexes of the same documents."""

import pytest
import torch
from torch.nn.functional import normalize

from metaembed import maxsim
from metaembed.retrieval.full_dial import search_full_dial
from metaembed.retrieval.index import MultiVectorIndex
from metaembed.scoring_metaembed import Embeddings

N, IDS = 40, [f"d{i}" for i in range(40)]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    documents = Embeddings(normalize(torch.randn(N, 4, 16), dim=-1), normalize(torch.randn(N, 6, 16), dim=-1))
    queries = Embeddings(normalize(torch.randn(3, 2, 16), dim=-1), normalize(torch.randn(3, 5, 16), dim=-1))
    queries.tokens[0, 3:] = 0  # a query of three tokens
    indexes = []
    for part in documents:
        index = MultiVectorIndex.create(None, vectors=part.shape[1], dim=16, quantization="float32")
        index.add(part, ids=IDS, metadata=[{"even": i % 2 == 0} for i in range(N)])
        indexes.append(index)
    return queries, documents, indexes


def test_tokens_rank_what_meta_tokens_select(made):
    queries, documents, (meta, tokens) = made
    selected = maxsim(queries.meta, documents.meta, (1, 2)).topk(8).indices
    for size in (None, 2):
        found = search_full_dial(queries, meta, tokens, k=3, keep=8, size=size, budget=(1, 2))
        scores = maxsim(queries.tokens, documents.tokens[:, :size])
        best, order = scores.gather(1, selected).topk(3)
        assert found.ids == [[IDS[i] for i in row] for row in selected.gather(1, order).tolist()]
        torch.testing.assert_close(found.scores, best)
    assert found.metadata[0][0]["even"] == (int(found.ids[0][0][1:]) % 2 == 0)


def test_a_filter_selects_before_the_tokens_rank(made):
    queries, documents, (meta, tokens) = made
    found = search_full_dial(queries, meta, tokens, k=5, keep=N, where={"even": True})
    best = maxsim(queries.tokens, documents.tokens[::2]).topk(5).indices
    assert found.ids == [[IDS[2 * i] for i in row] for row in best.tolist()]


def test_bad_arguments_are_named(made):
    queries, _, indexes = made
    with pytest.raises(TypeError, match=r"encode_queries\(..., tokens=True\), got Tensor"):
        search_full_dial(queries.meta, *indexes)
    with pytest.raises(ValueError, match="keep must be at least k = 10, got 5"):
        search_full_dial(queries, *indexes, keep=5)
