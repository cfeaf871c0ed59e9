"""fit_budget finds how to keep documents in so many bytes, and an index of its setting has the quality it says."""

import pytest
import torch
from torch.nn.functional import normalize

from metaembed.retrieval.fit_budget import fit_budget
from metaembed.retrieval.index import MultiVectorIndex
from metaembed.scoring_metaembed import maxsim

DIMS = [4, 16]


@pytest.fixture(scope="module")
def data():
    """Documents of 8 vectors that vary in 4 of 16 directions, and a query for each of 60 of them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q[:4]
    x = torch.randn(300, 8, 4, generator=generator) @ directions + 0.02 * torch.randn(300, 8, 16, generator=generator)
    documents = normalize(x, dim=-1)
    queries = normalize(documents[:60, :4] + 0.1 * torch.randn(60, 4, 16, generator=generator), dim=-1)
    return documents, queries


@pytest.fixture(scope="module")
def fitted(data):
    return fit_budget(*data, bytes_per_document=64, sizes=(8, 32, 10_000), dims=DIMS)


def test_the_setting_fits_into_the_bytes_and_feeds_into_an_index(data, fitted, tmp_path):
    documents, queries = data
    assert fitted.bytes_per_document <= 64 and fitted.pca.shape == (16, fitted.dim)
    index = MultiVectorIndex.create(tmp_path / "index", **fitted.kwargs)
    index.add(documents, [str(i) for i in range(300)])
    assert index.bytes_per_document == fitted.bytes_per_document
    exact = maxsim(queries, documents).topk(10).indices
    found = index.search(queries, k=10, budget=fitted.budget, stages=None).ids
    agreement = [len({str(i) for i in row} & set(ids)) / 10 for row, ids in zip(exact.tolist(), found, strict=True)]
    assert torch.tensor(agreement).mean().item() == pytest.approx(fitted.quality, abs=1e-6)
    assert fitted.create(None).dim == 16


def test_the_curve_holds_every_size_and_all_bytes_give_exact_agreement(fitted):
    assert list(fitted.curve) == [8, 32, 64, 10_000]
    assert all(setting.bytes_per_document <= size for size, setting in fitted.curve.items())
    assert fitted.curve[64].budget == fitted.budget
    assert fitted.curve[10_000].quality == 1
    qualities = [setting.quality for setting in fitted.curve.values()]
    assert qualities == sorted(qualities) and qualities[0] < qualities[1] < 1
    sizes = [setting.bytes_per_document for setting in fitted.tried]
    assert sizes == sorted(sizes)
    assert len(set(fitted.tried)) == len(sizes)


def test_more_vectors_of_fewer_dimensions_are_chosen_where_few_dimensions_matter(fitted):
    assert fitted.dim == 4 and fitted.vectors > 64 // 16


def test_relevant_documents_measure_real_quality(data):
    documents, queries = data
    relevant = torch.eye(300, dtype=torch.bool)[:60]
    options = {"k": 1, "dims": DIMS, "sizes": (), "quantizations": ["float32"], "metric": "recall"}
    fitted = fit_budget(documents, queries, 512, relevant=relevant, **options)
    right = (maxsim(queries, documents).argmax(dim=1) == torch.arange(60)).float()
    assert fitted.quality >= right.mean().item()
    few = fit_budget(documents, queries, 512, relevant=relevant, sample=60, **options)
    assert few.quality >= fitted.quality  # the same relevant documents among fewer others


def test_an_index_with_pca_is_fitted_as_it_is_and_its_pca_is_kept(data):
    documents, queries = data
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))).Q
    index = MultiVectorIndex.create(None, 8, 16, "float32", pca=basis[:, :12])
    index.add(documents, [str(i) for i in range(300)])
    index.delete(["299"])
    fitted = fit_budget(index, queries, 96, dims=[6, 12], sizes=(), quantizations=["int8"])
    small = fitted.create(None)
    small.add(documents, [str(i) for i in range(300)])
    assert small.dim == 16 and small.search(queries[:5], k=1, budget=fitted.budget).scores.shape == (5, 1)
    whole = fit_budget(index, queries, 4096, sizes=(), dims=[12], quantizations=["float32"])
    assert torch.equal(whole.pca, index.pca) and whole.quality == 1


def test_queries_of_an_index_with_pooling_are_used_whole(data):
    documents, queries = data
    index = MultiVectorIndex.create(None, 4, 16, "float32", pooling="nested")
    index.add(list(documents), [str(i) for i in range(300)])
    fitted = fit_budget(index, queries, 64, dims=DIMS, sizes=())
    assert {setting.query_vectors for setting in fitted.tried} == {4}
    fitted.create(None).add([documents[0][:3]], ["of three vectors"])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"bytes_per_document": 4}, ValueError, "takes 5 bytes, which is more than 4"),
        ({"bytes_per_document": 0}, ValueError, "at least 1"),
        ({"metric": "mrr"}, ValueError, "'recall' or 'ndcg'"),
        ({"dims": [17]}, ValueError, "from 1 to 16"),
        ({"quantizations": ["int3"]}, ValueError, "int3"),
        ({"relevant": torch.ones(60, 300)}, TypeError, "bool"),
        ({"relevant": torch.ones(60, 2, dtype=torch.bool)}, ValueError, r"\[60, 300\]"),
        ({"relevant": torch.zeros(60, 300, dtype=torch.bool)}, ValueError, "needs a relevant document"),
        ({"sample": 0}, ValueError, "sample must be"),
        ({"k": 0}, ValueError, "k must be"),
    ],
)
def test_a_bad_argument_is_an_error_that_says_what_is_expected(data, options, error, match):
    with pytest.raises(error, match=match):
        fit_budget(*data, **{"sizes": (), "dims": DIMS, **options})
    with pytest.raises(ValueError, match="16 dimensions"):
        fit_budget(data[0], data[1][..., :8])
    with pytest.raises(ValueError, match="documents and queries"):
        fit_budget(data[0], data[1][:0])
