"""The fused kernel for GPUs, tested with a stand-in for the library: its arguments, and when it is refused."""

import sys

import pytest
import torch
from torch.nn.functional import normalize

from metaembed.retrieval.collection import EmbeddingCollection
from metaembed.retrieval.kernels import cuda as fused_metaembed
from metaembed.retrieval.kernels.cuda import FusedKernel, check_fused, find_kernel, load_fused, takes
from metaembed.retrieval.search import choose_backend, prepare
from metaembed.scoring_metaembed import maxsim


def stand_in(queries, documents):
    """Compute what the library computes: products of bfloat16, summed in float32."""
    assert queries.dtype == documents.dtype == torch.bfloat16 and documents.is_contiguous()
    return torch.einsum("qid,njd->qnij", queries.float(), documents.float()).amax(3).sum(2)


def vectors(seed, *shape):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("copied", [1, 5000, 1 << 27])
@pytest.mark.parametrize("budget", [(1, 1), (2, 4), (4, 9)])
def test_slabs_prefixes_and_selections_give_the_scores_of_torch(budget, copied, monkeypatch):
    monkeypatch.setattr(fused_metaembed, "_COPIED", copied)
    queries, documents = vectors(0, 3, 4, 32), vectors(1, 50, 9, 32)
    collection = EmbeddingCollection.from_embeddings(documents, quantization="bfloat16")
    q, (store,) = prepare(queries, collection, budget)
    slabs = [(slab.stored, slab.scales) for slab in store.slabs]
    expected = maxsim(queries, collection, budget, backend="torch")
    kernel = FusedKernel(stand_in)
    torch.testing.assert_close(kernel.scores(slabs, q, "bfloat16"), expected)
    some = torch.tensor([3, 0, 49, 3])
    torch.testing.assert_close(kernel.scores(slabs, q, "bfloat16", some), expected[:, some])


def test_documents_that_are_not_finite_are_an_error():
    documents = vectors(1, 5, 2, 8).bfloat16()
    documents[4, 1, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        FusedKernel(stand_in).scores([(documents, None)], vectors(0, 1, 2, 8), "bfloat16", check=True)


def test_the_fused_kernel_gets_bfloat16_only():
    documents = vectors(1, 5, 2, 8)
    assert takes(documents.bfloat16(), 2, 8) and not takes(documents, 2, 8)


def test_a_kernel_that_disagrees_or_fails_is_refused_with_a_warning(monkeypatch):
    cpu = torch.device("cpu")
    check_fused(FusedKernel(stand_in), cpu, 48)
    with pytest.raises(RuntimeError, match="off by"):
        check_fused(FusedKernel(lambda q, d: stand_in(q, d) + 0.001), cpu, 48)

    def fail(device, dim):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(fused_metaembed, "load_fused", fail)
    with pytest.warns(RuntimeWarning, match="out of resource"):
        assert find_kernel(cpu, 4096) == "out of resource: shared memory"


def test_without_the_library_torch_is_used_and_the_result_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "late_interaction_kernels", None)
    load_fused.cache_clear()
    assert "late-interaction-kernels cannot be imported" in find_kernel(torch.device("cpu"), 8)


def test_the_fused_kernel_is_unavailable_on_the_cpu():
    with pytest.raises(RuntimeError, match="not for documents on cpu"):
        maxsim(torch.eye(3), torch.eye(3), backend="fused")


def test_the_fused_kernel_is_chosen_on_a_gpu(monkeypatch):
    """Tested on any machine: `choose_backend` gets queries that claim to be on a GPU."""
    monkeypatch.setattr(fused_metaembed, "load_fused", lambda device, dim: FusedKernel(stand_in, "9"))
    queries, documents = vectors(0, 2, 2, 8), vectors(1, 5, 2, 8)

    class OnGpu:
        device, shape = torch.device("cuda"), queries.shape

    for dtype, name in ((torch.bfloat16, "fused (late-interaction-kernels 9)"), (torch.float32, "torch (cuda); not")):
        _, stores = prepare(queries, documents.to(dtype), None)
        kernel, said = choose_backend("auto", stores, OnGpu())
        assert said.startswith(name) and (kernel is None) == (dtype == torch.float32)
