"""The compiled kernel is right for every processor it can be built for here; if it is unavailable, torch scores."""

import ctypes
import os
import platform
import resource
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from metaembed.retrieval.collection import EmbeddingCollection
from metaembed.retrieval.kernels import Slab, Step, Store, cpu
from metaembed.retrieval.kernels.cpu import CpuKernel, _disagreement, load_kernel
from metaembed.retrieval.quantization import QUANTIZATIONS, decode, encode, round_queries
from metaembed.retrieval.search import _run_with_torch, search, top_k
from metaembed.scoring_metaembed import maxsim

FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
# The compiler's name of a processor, and the flags that this machine needs to run code for it.
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
def test_an_all_zero_vector_scores_zero_at_every_quantization(quantization):
    documents = torch.stack([-torch.ones(1, 8), torch.zeros(1, 8)])
    stored, scales = encode(documents, quantization)
    scores = load_kernel().scores([(stored, scales)], torch.ones(1, 2, 8), quantization)
    assert scores[0, 0] < -15.9
    assert scores[0, 1] == 0


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_self_check_sees_a_small_disagreement(quantization):
    assert _disagreement(load_kernel(), quantization) < 2e-6


def stores(documents, quantization, cuts, split=(1,)):
    """Documents as segments that end at the cuts, their vectors as slabs of which the first ones are given."""
    sizes = [*split, documents.shape[1] - sum(split)]
    return [
        Store([Slab(*encode(x, quantization)) for x in part.split(sizes, dim=1)], quantization, part.shape[2], True)
        for part in documents.tensor_split(cuts)
    ]


def same_as_torch(steps, allowed=None, margin=None, products="torch"):
    got = load_kernel().cascade(steps, allowed, margin)
    kernel = None if products == "torch" else load_kernel()
    expected = _run_with_torch(steps, [kernel] * len(steps), allowed, margin)
    for mine, reference in zip(got, expected, strict=True):
        assert mine.shape == reference.shape and mine.dtype == reference.dtype
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])
    torch.testing.assert_close(got[0], expected[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 70), st.floats(-44, 15), st.booleans(), st.data())
def test_the_kernel_encodes_the_bytes_of_torch(n, vectors, dim, exponent, apart, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    given = (torch.rand(n, dim, vectors, generator=generator) * 2 - 1) * 10**exponent  # down to denormal numbers
    given = given * (torch.rand(n, dim, 1, generator=generator) > 0.2)
    given = given.transpose(1, 2) if apart else given.transpose(1, 2).contiguous()
    kept = data.draw(st.integers(1, vectors))
    expected = [encode(part, "int8") for part in given[:, :kept].split([1, kept - 1] if kept > 1 else [1], dim=1)]
    written = [
        (torch.zeros(stored.shape, dtype=torch.uint8), torch.zeros(scales.shape)) for stored, scales in expected
    ]
    assert load_kernel().encode_int8(given, written)
    for mine, reference in zip(written, expected, strict=True):
        assert torch.equal(mine[0], reference[0]) and torch.equal(mine[1], reference[1])
    given[-1, 0, -1] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 2e15]))
    assert not load_kernel().encode_int8(given, written)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 70),
    st.integers(0, 400),
    st.integers(1, 50),
    st.integers(1, 3),
    st.sampled_from([0, 2, 9]),
    st.data(),
)
def test_the_kernel_selects_what_torch_selects_ties_included(count, n, k, threads, every, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    queries, documents = (torch.randint(-1, 2, (m, 3, 3), generator=generator).float() for m in (count, n))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=2)))
    allowed = (torch.randint(0, every, (n,), generator=generator) == 0) if every else None
    r_q, r_c = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (3, 3)]))
    segments = [store.prefix(r_c) for store in stores(documents, "float32", cuts)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        same_as_torch([Step(queries[:, :r_q], segments, k)], allowed)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 300), st.sampled_from([None, 0.0, 0.3]), st.booleans(), st.data())
def test_a_cascade_of_mixed_quantizations_is_the_one_of_torch(count, n, margin, filtered, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    draw = lambda *shape: torch.randint(-1, 2, shape, generator=generator).float()  # noqa: E731
    queries, documents = draw(count, 4, 8), draw(n, 6, 8)  # with many ties
    allowed = torch.randint(0, 3, (n,), generator=generator) > 0 if filtered else None
    cuts = [n // 3, n // 2]
    first, main, exact = (
        stores(documents, name, cuts, split)
        for name, split in (("binary", (1,)), (data.draw(st.sampled_from(QUANTIZATIONS)), (1, 2)), ("float32", (2,)))
    )
    keeps = sorted(data.draw(st.lists(st.integers(3, 120), min_size=2, max_size=2)), reverse=True)
    steps = [
        Step(queries[:, :1], [store.prefix(1) for store in first], keeps[0]),
        Step(queries[:, :2], [store.prefix(3) for store in main], keeps[1]),
        Step(queries, exact, 3),
    ]
    same_as_torch(steps, allowed, margin, products="those of the kernel, for ties are a matter of rounding")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("count", [1, 3, 70])
def test_many_documents_are_selected_by_a_guess_that_cannot_be_wrong(quantization, count):
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randint(-9, 10, (n, 1, 24), generator=generator).float() for n in (count, 6000))
    misleading = documents.clone()
    misleading[:16] = queries[0] * 99  # the sample, and nothing else, is as good as can be
    for some in (documents, documents.sort(dim=0).values, misleading):
        segments = stores(some, quantization, [2500], split=())
        parts = [[(slab.stored, slab.scales) for slab in store.slabs] for store in segments]
        scores = torch.cat([load_kernel().scores(part, queries, quantization) for part in parts], dim=1)
        for allowed in (None, torch.arange(6000) % 2 == 0):
            values, places, _ = load_kernel().cascade([Step(queries, segments, 70)], allowed)
            expected = top_k(scores if allowed is None else scores.masked_fill(~allowed, -torch.inf), 70)
            assert torch.equal(values, expected[0]) and torch.equal(places, expected[1])


def test_many_queries_are_selected_in_parts():
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randint(-9, 10, (n, 1, 4), generator=generator).float() for n in (1100, 4100))
    same_as_torch([Step(queries, stores(documents, "float32", [], split=()), 4096)])


def test_integers_are_exact_up_to_the_largest_dimension_and_refused_beyond():
    for dim in (cpu._MOST_INTEGER_DIMENSIONS, 200_000):
        ones = torch.ones(3, 1, dim)  # every level is the largest possible
        ones[1] = -1
        collection = EmbeddingCollection.from_embeddings(ones, quantization="int8")
        scores = maxsim(torch.ones(1, 1, dim), collection)
        torch.testing.assert_close(scores, torch.tensor([[1.0, -1.0, 1.0]]) * dim, rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match="at most 65536 dimensions"):
        maxsim(torch.ones(1, 1, dim), collection, backend="compiled")


# ------------------------------------------------------------------------------- torch is used after any failure


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine without a built kernel. Returns the folder of the kernel cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "metaembed"
    forget()


def forget():
    load_kernel.cache_clear()
    cpu._find.cache_clear()


@pytest.fixture(scope="session")
def built():
    """A library that works."""
    return cpu._build("native")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Replace the compiler by a script, which runs one line of shell to compile and counts its calls in a file."""

    def use(compiling, version="echo fake 1.0"):
        script = tmp_path / "fake-c++"
        calls = tmp_path / "calls"
        script.write_text(
            f"#!/bin/bash\necho >> {calls}\n"
            f'if [ "$1" = --version ]; then {version}; exit; fi\n'
            f'while [ "$1" != -o ]; do shift; done\n{compiling}\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return calls

    return use


def search_something(**options):
    return search(torch.eye(3)[None], torch.eye(3)[None], k=1, **options)


def torch_is_used_and_one_warning_says(match):
    with pytest.warns(RuntimeWarning, match=match) as caught:
        result = search_something()
    assert result.backend.startswith("torch (cpu); not compiled: ") and result.scores.item() == 3
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert search_something().backend == result.backend
    with pytest.raises(RuntimeError, match="backend='compiled' is unavailable"):
        maxsim(torch.eye(3), torch.eye(3), backend="compiled")


def test_without_a_compiler_torch_is_used_and_the_result_says_why(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # which is not worth a warning
        assert search_something().backend.startswith("torch (cpu); not compiled: no C++ compiler was found")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler was found"):
        maxsim(torch.eye(3), torch.eye(3), backend="compiled")


@pytest.mark.parametrize(
    ("compiling", "version", "match"),
    [
        ("echo no such option; exit 1", "echo 1", "fake-c\\+\\+ failed: no such option"),
        ("printf '\\xff\\xfe no'; exit 1", "echo 1", "fake-c\\+\\+ failed: .* no"),
        ("exit 1", "exit 3", "fake-c\\+\\+ failed"),
        ("sleep 60 & sleep 60", "echo 1", "took longer than 0.5 seconds"),
        ("exit 1", "sleep 60 & sleep 60", "took longer than 0.5 seconds"),
        ("exit 0", "echo 1", "could not be built"),  # and writes nothing
        ("echo nonsense > $2", "echo 1", "cannot be loaded"),
        ("c++ -shared -x c++ /dev/null -o $2", "echo 1", "cannot be loaded .*undefined symbol"),
    ],
)
def test_a_failing_compiler_is_called_once(compiling, version, match, fresh, compiler, monkeypatch):
    monkeypatch.setattr(cpu, "_PATIENCE", 5 if "c++" in compiling else 0.5)
    calls = compiler(compiling, version)
    start = time.monotonic()
    torch_is_used_and_one_warning_says(match)
    assert len(calls.read_text()) <= 4  # a --version and a build, for `load_kernel` asked by name at most twice
    assert time.monotonic() - start < 6
    assert not list(fresh.glob("building-*"))


def test_a_compiler_may_print_other_bytes_than_utf8(fresh, compiler, built):
    compiler(f"cp {built} $2", "printf '\\xff\\xfe'")
    assert search_something().backend.startswith("compiled (")


def test_a_damaged_library_in_the_cache_is_built_again_and_never_loaded(fresh, compiler, built):
    compiler(f"cp {built} $2")
    library = cpu._build("native")
    whole = library.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:5000] + bytes(8) + whole[5008:]):
        library.write_bytes(damaged)
        assert survives(lambda: cpu.CpuKernel(cpu._build("native")))  # loaded, the first would be a SIGBUS
        assert cpu._build("native").read_bytes() == whole


def survives(call):
    """Call in another process, which may die."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            call()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def test_a_limit_on_threads_only_reduces_threads():
    queries, documents = torch.randn(4, 2, 16), torch.randn(5000, 3, 16)
    kernel = load_kernel()
    expected = kernel.scores([(documents, None)], queries, "float32")

    def score_with_no_room_for_stacks():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 20), -1))
        torch.get_num_threads = lambda: 8
        assert torch.equal(kernel.scores([(documents, None)], queries, "float32"), expected)

    assert survives(score_with_no_room_for_stacks)


def test_a_cache_from_which_programs_may_not_run(fresh, compiler, built, monkeypatch):
    compiler(f"cp {built} $2")

    def refuse(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    torch_is_used_and_one_warning_says("failed to map segment .*noexec")


def test_a_user_without_a_home_folder(fresh, compiler, built, monkeypatch):
    compiler(f"cp {built} $2")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)

    def no_entry(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    torch_is_used_and_one_warning_says("set XDG_CACHE_HOME")


def test_a_folder_that_cannot_be_made(fresh, compiler, built, monkeypatch, tmp_path):
    compiler(f"cp {built} $2")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    torch_is_used_and_one_warning_says("could not be built")


def test_torch_is_used_after_an_unexpected_error(fresh, monkeypatch):
    monkeypatch.setattr(cpu, "_processor", lambda: 1 / 0)
    torch_is_used_and_one_warning_says("division by zero")


def test_a_kernel_that_disagrees_with_torch_is_refused_with_a_warning(fresh, compiler, built, monkeypatch):
    compiler(f"cp {built} $2")
    true_scores = CpuKernel.scores
    monkeypatch.setattr(CpuKernel, "scores", lambda *args, **kwargs: true_scores(*args, **kwargs) + 0.001)
    torch_is_used_and_one_warning_says("off by")


def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("METAEMBED_KERNELS", "0")
    assert search_something().backend == "torch (cpu); not compiled: kernels are switched off by METAEMBED_KERNELS=0"


# --------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("changed", ["folder", "library"])
def test_a_library_that_other_users_can_write_is_not_loaded(changed, fresh, compiler, built):
    compiler(f"cp {built} $2")
    library = cpu._build("native")
    assert library.stat().st_mode & 0o777 == 0o700 and fresh.stat().st_mode & 0o777 == 0o700
    (fresh if changed == "folder" else library).chmod(0o777)
    torch_is_used_and_one_warning_says("could have been changed by other users")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("planted", ["folder", "library"])
def test_a_library_of_another_user_is_not_loaded(planted, fresh, compiler, built):
    compiler(f"cp {built} $2")
    library = cpu._build("native")
    os.chown(fresh if planted == "folder" else library, 12345, 12345)
    torch_is_used_and_one_warning_says("could have been changed by other users")


def test_a_relative_cache_is_ignored(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.chdir(tmp_path)
    assert cpu._open_cache() == tmp_path / "home/.cache/metaembed"
    assert not (tmp_path / "relative").exists()


def test_leftovers_of_killed_builds_are_removed(fresh, compiler, built):
    compiler(f"cp {built} $2")
    old, young = fresh / "building-old", fresh / "building-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "kernels.so").write_text("half")
    os.utime(old, (0, 0))
    fresh.chmod(0o700)
    cpu._build("native")
    assert young.exists() and not old.exists()


def test_importing_the_package_loads_no_kernel(tmp_path, fresh_process):
    code = "import sys, metaembed; print([name for name in sys.modules if 'kernels.c' in name])"
    done = fresh_process("-c", code, env={"XDG_CACHE_HOME": str(tmp_path)})
    assert done.stdout.strip() == "[]" and not (tmp_path / "metaembed").exists()
