"""The compiled kernel is right for every processor it can be built for here, and says why when it cannot be had."""

import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from metaembed.retrieval.kernels.cpu import Kernel, KernelUnavailable, _disagreement, load_kernel
from metaembed.retrieval.quantization import QUANTIZATIONS, decode, encode, round_queries
from metaembed.retrieval.search import search
from metaembed.scoring_metaembed import maxsim

FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
# What the compiler calls a processor, and what this machine must have to run its code.
ARCHITECTURES = {
    "native": "",
    "x86-64": "",
    "x86-64-v3": "avx2",
    "x86-64-v4": "avx512vl",
    "icelake-server": "avx512_vnni",
}
HERE = [name for name, needs in ARCHITECTURES.items() if needs in FLAGS]
if platform.machine() != "x86_64":
    HERE = ["native"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(HERE), st.sampled_from(QUANTIZATIONS), st.data())
def test_the_kernel_equals_a_float64_reference(architecture, quantization, data):
    kernel = load_kernel(architecture)
    count, n = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 130))
    r_q, dim = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 150) | st.sampled_from([256, 512, 1100, 2048]))
    counts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    queries = normalize(torch.randn(count, r_q, dim, generator=generator), dim=-1)
    documents = normalize(torch.randn(n, sum(counts), dim, generator=generator), dim=-1)
    documents[0, 0] = 0
    slabs = [encode(part, quantization) for part in documents.split(counts, dim=1)]
    if data.draw(st.booleans()):  # as a prefix of more vectors lies in memory: with gaps between documents
        slabs = [tuple(x if x is None else torch.cat([x, x], 1)[:, : x.shape[1]] for x in slab) for slab in slabs]
    index = data.draw(st.none() | st.lists(st.integers(0, n - 1)).map(lambda x: torch.tensor(x, dtype=torch.int64)))
    got = kernel.scores(slabs, queries, quantization, index)
    rows = torch.cat([decode(stored, scales, quantization, dim) for stored, scales in slabs], dim=1).double()
    expected = torch.einsum("qid,njd->qnij", round_queries(queries, quantization).double(), rows).amax(3).sum(2)
    expected = expected if index is None else expected[:, index]
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_all_zero_vector_scores_zero_at_every_precision(quantization):
    documents = torch.stack([-torch.ones(1, 8), torch.zeros(1, 8)])
    stored, scales = encode(documents, quantization)
    scores = load_kernel().scores([(stored, scales)], torch.ones(1, 2, 8), quantization)
    assert scores[0, 0] < -15.9
    assert scores[0, 1] == 0


def test_without_a_compiler_torch_is_used_and_the_result_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    load_kernel.cache_clear()
    try:
        result = search(torch.eye(3)[None], torch.eye(3)[None], k=1)
        assert result.backend.startswith("torch (cpu); not compiled: no C++ compiler was found")
        with pytest.raises(RuntimeError, match="no C\\+\\+ compiler was found"):
            maxsim(torch.eye(3), torch.eye(3), backend="compiled")
    finally:
        load_kernel.cache_clear()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KernelUnavailable, match="false"):
        load_kernel.__wrapped__()


def test_a_kernel_that_disagrees_with_torch_is_refused_with_a_warning(monkeypatch):
    true_scores = Kernel.scores
    monkeypatch.setattr(Kernel, "scores", lambda *args, **kwargs: true_scores(*args, **kwargs) + 0.001)
    load_kernel.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="off by"):
            result = search(torch.eye(3)[None], torch.eye(3)[None], k=1)
        assert "torch" in result.backend
        assert result.scores.item() == 3
    finally:
        load_kernel.cache_clear()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_self_check_sees_a_small_disagreement(quantization):
    assert _disagreement(load_kernel(), quantization) < 2e-6
