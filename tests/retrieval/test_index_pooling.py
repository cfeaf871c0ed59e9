"""Documents of any number of vectors are pooled to a fixed set, of which every prefix is a summary."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from metaembed.retrieval.index import MultiVectorIndex
from metaembed.retrieval.pooling import pool
from metaembed.scoring_metaembed import maxsim

METHODS = ["nested", "tree", "ward"]


def clustered(seed, count):
    """Documents of 20 to 60 vectors around 4 to 12 directions each, and for each a query of 4 of its directions."""
    generator = torch.Generator().manual_seed(seed)
    documents, queries = [], []
    for _ in range(count):
        directions = normalize(
            torch.randn(4 + int(torch.randint(9, (), generator=generator)), 16, generator=generator)
        )
        which = torch.randint(
            len(directions), (20 + int(torch.randint(41, (), generator=generator)),), generator=generator
        )
        noise = 0.3 * normalize(torch.randn(len(which), 16, generator=generator), dim=1)
        documents.append(normalize(directions[which] + noise, dim=1))
        queries.append(directions[:4])
    return documents, torch.stack(queries)


@pytest.mark.parametrize("method", METHODS)
def test_every_document_gets_as_many_unit_vectors(method):
    documents, _ = clustered(0, 5)
    ragged = [
        documents[0],
        documents[1][:1],
        documents[2][:2].double(),
        documents[3].numpy(),
        documents[4][:1].repeat(9, 1),
    ]
    pooled = pool(ragged, 8, method)
    assert pooled.shape == (5, 8, 16) and pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.norm(dim=2), torch.ones(5, 8))
    torch.testing.assert_close(pool([documents[0]], 8, method)[0], pooled[0])  # others in the batch change nothing
    torch.testing.assert_close(pooled[1], documents[1][:1].expand(8, 16))


@pytest.mark.parametrize("method", ["nested", "tree"])
def test_a_smaller_pooling_is_a_prefix_of_a_larger_one(method):
    documents, _ = clustered(1, 4)
    assert torch.equal(pool(documents, 16, method)[:, :5], pool(documents, 5, method))
    torch.testing.assert_close(pool(documents, 1, method)[0, 0], normalize(documents[0].mean(dim=0), dim=0))


def test_nested_prefixes_are_nearly_as_good_as_clusters_of_that_size():
    documents, queries = clustered(2, 150)
    truth = torch.arange(150)
    nested = pool(documents, 16)
    for size in (1, 4, 8, 16):
        mine = (maxsim(queries, nested[:, :size]).argmax(dim=1) == truth).float().mean()
        best = (maxsim(queries, pool(documents, size, "ward")).argmax(dim=1) == truth).float().mean()
        assert mine >= best - 0.05, size


def test_an_index_with_pooling_takes_ragged_documents(tmp_path):
    documents, queries = clustered(3, 60)
    index = MultiVectorIndex.create(tmp_path / "index", 12, 16, "float32", pooling="nested")
    index.add(documents[:30], [f"d{i}" for i in range(30)])
    index = MultiVectorIndex.open(tmp_path / "index")
    index.add([document.numpy() for document in documents[30:]], [f"d{i}" for i in range(30, 60)])
    assert torch.equal(index.get(["d40"])[0].embedding, pool([documents[40]], 12)[0])
    assert [ids[0] for ids in index.search(queries, k=1).ids] == [f"d{i}" for i in range(60)]


@pytest.mark.parametrize(
    ("embeddings", "error", "match"),
    [
        ([torch.ones(3, 4), torch.ones(0, 4)], ValueError, "document 1 must be"),
        ([torch.ones(3, 4), torch.ones(3, 5)], ValueError, "same number of dimensions"),
        ([torch.ones(3, 4) / 0], ValueError, "NaN or infinity"),
        ([np.ones((3, 4), dtype=int)], TypeError, "floating point"),
        ([[1.0, 2.0]], TypeError, "document 0 must be a tensor"),
        ([], ValueError, "empty list"),
        (3, TypeError, r"list of \[r, dim\]"),
    ],
)
def test_bad_embeddings_are_an_error_that_says_which(embeddings, error, match):
    with pytest.raises(error, match=match):
        pool(embeddings, 2)
    with pytest.raises(ValueError, match="pooling must be one of"):
        MultiVectorIndex.create(None, pooling="mean")
