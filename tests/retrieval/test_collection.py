"""A collection is scored like the tensor it was made from, and written documents are never lost."""

import json
import os
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.functional import normalize

from metaembed.retrieval.collection import EmbeddingCollection
from metaembed.retrieval.pca import fit_pca, fit_rotation
from metaembed.retrieval.quantization import QUANTIZATIONS, bytes_per_vector, decode, encode, round_queries
from metaembed.retrieval.search import search
from metaembed.scoring_metaembed import maxsim


def vectors(seed, *shape):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(QUANTIZATIONS),
    st.sampled_from(["torch", "compiled"]),
    st.integers(1, 70),
    st.integers(1, 90),
    st.data(),
)
def test_scores_equal_a_float64_reference_at_every_quantization(quantization, backend, r_c, dim, data):
    sizes = data.draw(st.lists(st.integers(0, 30), max_size=3))
    budget = data.draw(st.tuples(st.integers(1, 6), st.integers(1, r_c)))
    queries, documents = vectors(r_c, 3, 6, dim), vectors(dim, sum(sizes), r_c, dim)
    collection = EmbeddingCollection(r_c, dim, quantization)
    for part in documents.split(sizes) if sizes else []:
        collection.append(part)
    q = round_queries(queries[:, : budget[0]], quantization).double()
    d = decode(*encode(documents[:, : budget[1]], quantization), quantization, dim).double()
    expected = torch.einsum("qid,njd->qnij", q, d).amax(3).sum(2)
    scores = maxsim(queries, collection, budget, backend=backend)
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=1e-5)
    best, indices = search(queries, collection, 5, budget, backend=backend)
    assert best.shape == (3, min(5, sum(sizes)))
    assert torch.equal(scores.gather(1, indices), best)


@pytest.mark.parametrize(
    ("quantization", "most"), [("float32", 0), ("bfloat16", 0.005), ("int8", 0.015), ("int4", 0.2), ("binary", 0.9)]
)
def test_every_quantization_keeps_its_accuracy_in_its_number_of_bytes(quantization, most):
    x = vectors(0, 50, 3, 100)
    x[3, 1] = 0
    stored, scales = encode(x, quantization)
    back = decode(stored, scales, quantization, 100)
    assert ((back - x).norm(dim=-1) <= most).all()
    assert (back[3, 1] == 0).all()
    assert stored.nbytes + (0 if scales is None else scales.nbytes) == 150 * bytes_per_vector(quantization, 100)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_saving_and_loading_changes_nothing(quantization, tmp_path):
    collection = EmbeddingCollection(20, 32, quantization, pca=fit_pca(vectors(1, 9, 20, 32), 17))
    collection.append(vectors(2, 5, 20, 32), ids=list("abcde"))
    collection.append(vectors(3, 4, 25, 32), ids=list("fghi"))
    collection.save(tmp_path / "folder")
    loaded = EmbeddingCollection.load(tmp_path / "folder")
    assert loaded.ids == list("abcdefghi")
    assert loaded.quantization == quantization and loaded.uncommitted == ()
    assert torch.equal(loaded.pca, collection.pca)
    assert torch.equal(loaded.to_tensor(), collection.to_tensor())
    queries = vectors(4, 2, 3, 32)
    assert torch.equal(maxsim(queries, loaded, (3, 7)), maxsim(queries, collection, (3, 7)))
    loaded.append(vectors(5, 1, 20, 32), ids=["j"])
    assert len(EmbeddingCollection.load(tmp_path / "folder")) == 10


def test_tensors_arrays_and_lists_are_stored_and_returned():
    x = vectors(0, 4, 6, 8)
    for form in (x, x.numpy(), list(x), [d.numpy() for d in x]):
        collection = EmbeddingCollection.from_embeddings(form)
        assert torch.equal(collection.to_tensor(), x)
        assert torch.equal(collection.to_tensor(2), x[:, :2])


def test_a_smaller_budget_can_be_stored_alone():
    x, queries = vectors(0, 9, 64, 8), vectors(1, 2, 16, 8)
    small = EmbeddingCollection.from_embeddings(x, vectors=8)
    assert small.bytes_per_document * 8 == EmbeddingCollection.from_embeddings(x).bytes_per_document
    assert torch.equal(maxsim(queries, small, (4, 8)), maxsim(queries, EmbeddingCollection.from_embeddings(x), (4, 8)))
    with pytest.raises(ValueError, match="16 document vectors; from 1 to 8"):
        maxsim(queries, small, (8, 16))


def test_a_small_budget_reads_a_small_part_of_the_file(tmp_path, fresh_process):
    EmbeddingCollection.from_embeddings(vectors(0, 20_000, 64, 32), folder=tmp_path / "folder")  # 164 MB
    code = f"""
        import torch
        from metaembed.retrieval.collection import EmbeddingCollection
        from metaembed.retrieval.search import search
        def mapped():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
        collection = EmbeddingCollection.load({str(tmp_path / "folder")!r})
        search(torch.ones(1, 1, 32), torch.ones(1, 1, 32), 1)
        before = mapped()
        search(torch.ones(1, 1, 32), collection, 10, (1, 1))
        one = mapped() - before
        search(torch.ones(1, 1, 32), collection, 10, (1, 64))
        print(one, mapped() - before)
    """
    out = fresh_process("-c", textwrap.dedent(code))
    first_vector, everything = map(float, out.stdout.split())
    assert everything > 100
    assert first_vector < 20


@pytest.mark.parametrize("moment", range(1, 8))
def test_committed_documents_survive_a_kill_at_any_moment_and_leftovers_are_named(moment, tmp_path, fresh_process):
    """The process dies at its n-th flush to disk or rename of a file."""
    code = f"""
        import os, torch
        from metaembed.retrieval.collection import EmbeddingCollection
        collection = EmbeddingCollection(3, 4, folder={str(tmp_path / "folder")!r})
        collection.append(torch.ones(5, 3, 4), ids=list("abcde"))
        left = {moment}
        def dying(call):
            def wrapped(*args):
                global left
                left -= 1
                if not left:
                    os._exit(9)
                return call(*args)
            return wrapped
        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        collection.append(torch.ones(2, 3, 4), ids=["f", "g"])
    """
    done = fresh_process("-c", textwrap.dedent(code))
    assert done.returncode == (9 if moment < 7 else 0), done.stderr
    committed = moment > 5  # data: fsync, replace, fsync; manifest: fsync, replace, fsync
    if moment in (6, 7):
        collection = EmbeddingCollection.load(tmp_path / "folder")
        assert collection.uncommitted == ()
    else:
        with pytest.warns(UserWarning, match=r"interrupted append: .*documents-00001"):
            collection = EmbeddingCollection.load(tmp_path / "folder")
        assert any("documents-00001" in name for name in collection.uncommitted)
    assert collection.ids == list("abcdefg" if committed else "abcde")
    collection.append(torch.ones(1, 3, 4), ids=["z"])  # the next append works, and overwrites nothing
    left = {path.name for path in (tmp_path / "folder").iterdir()}
    assert set(collection.uncommitted) - {"collection.json.unfinished"} <= left
    assert len(collection) == (8 if committed else 6)


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    collection = EmbeddingCollection.from_embeddings(vectors(0, 9, 4, 8), folder=tmp_path / "folder")
    del collection
    file = tmp_path / "folder" / "documents-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"documents-00000\.safetensors cannot be read"):
        EmbeddingCollection.load(tmp_path / "folder")
    os.remove(file)
    with pytest.raises(ValueError, match=r"documents-00000\.safetensors is missing"):
        EmbeddingCollection.load(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="no collection"):
        EmbeddingCollection.load(tmp_path)


def test_pca_to_all_dimensions_changes_no_score_and_to_fewer_keeps_the_ranking():
    spectrum = torch.tensor([1.0] * 8 + [0.01] * 24)
    x = normalize(torch.randn(300, 4, 32, generator=torch.Generator().manual_seed(0)) * spectrum, dim=-1)
    queries = x[:5]
    plain = maxsim(queries, x)
    for dim, error in ((32, 1e-5), (8, 0.01)):
        rotated = EmbeddingCollection.from_embeddings(x, pca=fit_pca(x, dim))
        assert rotated.dim == dim
        assert (maxsim(queries, rotated) - plain).abs().max() < error
    assert torch.equal(fit_pca(x, 32)[:, :8], fit_pca(x, 8))


def test_positions_of_ids_filter_a_search():
    x = vectors(0, 6, 2, 8)
    collection = EmbeddingCollection.from_embeddings(x, ids=list("abcdef"))
    _, found = search(x[:1], collection, 9, exclude=collection.positions(["a", "d"]))
    assert {collection.ids[i] for i in found[0]} == set("bcef")
    with pytest.raises(ValueError, match="2 ids are not in the collection"):
        collection.positions(["x", "a", "y"])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda c, x: c.append(x[:, :1]), ValueError, r"\[n, 2 or more, 8\]"),
        (lambda c, x: c.append(x[..., :4]), ValueError, r"\[n, 2 or more, 8\]"),
        (lambda c, x: c.append(x * float("nan"), list("pqrs")), ValueError, "NaN or infinity"),
        (lambda c, x: c.append(x), ValueError, "an id to every document"),
        (lambda c, x: c.append(x, ["a", "p", "q", "r"]), ValueError, "in the collection already"),
        (lambda c, x: c.append(x, ["p"] * 4), ValueError, "all be different"),
        (lambda c, x: c.append(x, ["p"]), ValueError, "1 ids for 4 documents"),
        (lambda c, x: c.append(x, [1, 2, 3, 4]), TypeError, "list of str"),
        (lambda c, x: EmbeddingCollection(2, 8, "int3"), ValueError, "quantization must be one of"),
        (lambda c, x: EmbeddingCollection(0, 8), ValueError, "at least 1"),
        (lambda c, x: EmbeddingCollection(2, 8, pca=torch.eye(4)), ValueError, r"pca must be \[8, dim\]"),
        (lambda c, x: fit_pca(x, 9), ValueError, "from 1 to 8"),
        (lambda c, x: fit_pca(x[:0], 2), ValueError, "sample is empty"),
        (lambda c, x: maxsim(x[..., :4], c), ValueError, "4 dimensions and documents 8"),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(make, error, match):
    x = vectors(0, 4, 2, 8)
    collection = EmbeddingCollection.from_embeddings(x, ids=list("abcd"))
    with pytest.raises(error, match=match):
        make(collection, x)
    assert collection.ids == list("abcd")


def test_a_folder_with_files_in_it_is_not_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        EmbeddingCollection(2, 8, folder=tmp_path)


def test_old_names_work_and_warn():
    x = vectors(0, 4, 2, 8)
    with pytest.warns(DeprecationWarning, match="fit_rotation is now called fit_pca"):
        pca = fit_rotation(x, 4)
    with pytest.warns(DeprecationWarning, match="rotation is now called pca"):
        collection = EmbeddingCollection.from_embeddings(x, quantization="int8", rotation=pca)
    with pytest.warns(DeprecationWarning, match="precision is now called quantization"):
        assert EmbeddingCollection(2, 8, precision="int4").quantization == "int4"
    with pytest.warns(DeprecationWarning, match="is now called"):
        assert collection.precision == "int8" and torch.equal(collection.rotation, pca)


def test_a_folder_written_by_version_0_1_loads(tmp_path):
    """Format 1 keeps the old names."""
    save_file({"rotation": torch.eye(4)[:, :2].contiguous()}, tmp_path / "rotation.safetensors")
    stored = {"vectors.0": torch.full((3, 1, 2), 255, dtype=torch.uint8), "scales.0": torch.ones(3, 1) / 127}
    save_file(stored, tmp_path / "documents-00000.safetensors")
    manifest = {"format": 1, "vectors": 1, "input_dim": 4, "precision": "int8", "rotation": True}
    manifest["files"] = [{"name": "documents-00000.safetensors", "documents": 3}]
    (tmp_path / "collection.json").write_text(json.dumps(manifest))
    collection = EmbeddingCollection.load(tmp_path)
    torch.testing.assert_close(maxsim(torch.ones(1, 1, 4), collection), torch.full((1, 3), 2.0))
