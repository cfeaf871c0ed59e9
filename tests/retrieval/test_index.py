"""An index finds the right documents and never loses one that was written."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import sqlite3
import stat
import sys
import threading

import kill_index
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from metaembed.retrieval import metadata as catalogs
from metaembed.retrieval import storage
from metaembed.retrieval.collection import EmbeddingCollection
from metaembed.retrieval.index import DamagedIndexError, MultiVectorIndex, Stage
from metaembed.retrieval.pca import fit_pca
from metaembed.retrieval.quantization import decode, encode, round_queries
from metaembed.retrieval.search import search

THREE = {"first": ("binary", 1), "main": "int8", "exact": "float32"}


def vectors(seed, *shape):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def names(n, start=0):
    return [f"d{i}" for i in range(start, start + n)]


@pytest.fixture(params=["memory", "folder"])
def place(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "index"


@pytest.fixture
def folder(tmp_path):
    """An index of 40 documents in a folder: most of them in files, the last in the catalog, one deleted."""
    index = MultiVectorIndex.create(tmp_path / "index", 5, 16, "int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaembed.retrieval.index._SMALL", 0)
        index.add(vectors(0, 30, 5, 16), names(30), [{"n": i} for i in range(30)])
    index.add(vectors(1, 10, 5, 16), names(10, 30))
    index.delete(["d3"])
    index.close()
    return tmp_path / "index"


def in_child(work, *arguments):
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


# Searching


@pytest.mark.parametrize("quantization", ["float32", "bfloat16", "int8", "int4", "binary", THREE])
def test_an_exact_search_equals_the_formula(place, quantization):
    x, queries = vectors(0, 50, 9, 20), vectors(1, 3, 4, 20)
    index = MultiVectorIndex.create(place, 9, 20, quantization)
    for part in x.split([20, 1, 29]):
        index.add(part, names(len(part), len(index)))
    kept = "float32" if quantization is THREE else quantization
    d, q = decode(*encode(x, kept), kept, 20), round_queries(queries[:, :3], kept)
    scores = torch.einsum("qid,njd->qnij", q.double(), d[:, :6].double()).amax(3).sum(2)
    found = index.search(queries, k=7, budget=(3, 6), stages=None)
    best = scores.topk(7)
    torch.testing.assert_close(found.scores.double(), best.values, atol=2e-5, rtol=1e-5)
    assert found.ids == [[f"d{i}" for i in row] for row in best.indices.tolist()]
    assert index.search(queries[0], k=99).scores.shape == (1, 50)
    assert [document.id for document in index] == index.ids == names(50)
    assert torch.equal(index.get(["d20", "d0"])[0].embedding, d[20])


def test_a_cascade_uses_the_copy_of_the_vectors_that_a_stage_names(place):
    x = vectors(0, 300, 8, 16)
    index = MultiVectorIndex.create(place, 8, 16, THREE)
    index.add(x, names(300))
    all_kept = index.search(
        x[:9], k=3, stages=[Stage((1, 1), 300, "first"), Stage((8, 8), 300, "int8"), ((4, 4), 300)]
    )
    exact = index.search(x[:9], k=3, stages=None)
    assert all_kept.ids == exact.ids
    torch.testing.assert_close(all_kept.scores, exact.scores)
    narrow = index.search(x[:9], k=1, stages=[((1, 1), "binary", 3)])
    hits = search(x[:9], EmbeddingCollection.from_embeddings(x[:, :1], quantization="binary"), 3, (1, 1)).indices
    assert all(ids[0] in {f"d{i}" for i in row} for ids, row in zip(narrow.ids, hits.tolist(), strict=True))
    with pytest.raises(ValueError, match="not 'int4'"):
        index.search(x[0], k=1, stages=[((1, 1), "int4", 3)])
    with pytest.raises(ValueError, match="at least k = 5"):
        index.search(x[0], k=5, stages=[((1, 1), 3)])


def test_stages_that_were_read_from_json_are_prepared_once_and_find_the_same():
    x = vectors(0, 300, 8, 16)
    index = MultiVectorIndex.create(None, 8, 16)
    index.add(x, names(300))
    found = [index.search(x[:9], k=3, stages=stages).ids for stages in ([((1, 1), "main", 9)], [[[1, 1], "main", 9]])]
    assert found[0] == found[1]
    assert len(index._snapshot._plans) == 1


def test_a_cascade_over_a_large_index_still_finds_the_documents():
    x = vectors(0, 5000, 6, 16)
    index = MultiVectorIndex.create(None, 6, 16, THREE)
    index.add(x, names(5000))
    found = index.search(x[:20], k=2)
    assert [ids[0] for ids in found.ids] == names(20)
    index.delete(names(10))
    assert [ids[0] for ids in index.search(x[10:20], k=2, where={}).ids] == names(10, 10)


def test_fewer_dimensions_are_kept_by_pca(place):
    x = vectors(0, 40, 3, 16)
    index = MultiVectorIndex.create(place, 3, 16, "float32", pca=fit_pca(x, 16)[:, :12])
    index.add(x, names(40))
    assert index.get(["d1"])[0].embedding.shape == (3, 12)
    assert index.search(x[7], k=1).ids == [["d7"]]
    if place:
        assert MultiVectorIndex.open(place).search(x[7], k=1).ids == [["d7"]]


# Filters

KEYS = ["a", "b.c", "é"]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["", "x", "X", "é", "z'\"\\"]),
)  # fmt: skip
METADATA = st.fixed_dictionaries(
    {},
    optional={
        "a": VALUES | st.just([1]),
        "b": st.fixed_dictionaries({}, optional={"c": VALUES}) | VALUES,
        "é": VALUES,
    },
)
ORDERED = st.one_of(
    st.integers(-3, 3), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["", "x", "é"])
)
CONDITION = st.one_of(
    VALUES,
    st.fixed_dictionaries({}, optional={"$eq": VALUES, "$ne": VALUES, "$lt": ORDERED, "$gte": ORDERED}).filter(bool),
    st.fixed_dictionaries({}, optional={"$gt": ORDERED, "$lte": ORDERED, "$exists": st.booleans()}).filter(bool),
    st.fixed_dictionaries({}, optional={"$in": st.lists(VALUES, max_size=4), "$nin": st.lists(VALUES)}).filter(bool),
)
WHERE = st.recursive(
    st.dictionaries(st.sampled_from(KEYS), CONDITION, max_size=2),
    lambda inner: st.dictionaries(st.sampled_from(["$and", "$or"]), st.lists(inner, max_size=3), max_size=2),
    max_leaves=6,
)
MISSING = object()


def same(x, y):
    if x is MISSING or x is None or y is None:
        return x in (MISSING, None) and y is None
    return isinstance(x, bool) == isinstance(y, bool) and not isinstance(x, list | dict) and x == y


def ordered(x, y, compare):
    alike = (isinstance(x, str) and isinstance(y, str)) or (
        isinstance(x, int | float) and not isinstance(x, bool) and not isinstance(y, str)
    )
    return alike and compare(x, y)


REFERENCE = {
    "$eq": same,
    "$ne": lambda x, y: not same(x, y),
    "$lt": lambda x, y: ordered(x, y, lambda x, y: x < y),
    "$lte": lambda x, y: ordered(x, y, lambda x, y: x <= y),
    "$gt": lambda x, y: ordered(x, y, lambda x, y: x > y),
    "$gte": lambda x, y: ordered(x, y, lambda x, y: x >= y),
    "$in": lambda x, values: any(same(x, y) for y in values),
    "$nin": lambda x, values: not any(same(x, y) for y in values),
    "$exists": lambda x, wanted: (x is not MISSING) == wanted,
}


def selects(where, document):
    for key, wanted in where.items():
        if key in ("$and", "$or"):
            if not (all if key == "$and" else any)(selects(part, document) for part in wanted):
                return False
            continue
        value = document
        for step in key.split("."):
            value = value.get(step, MISSING) if isinstance(value, dict) else MISSING
        operators = wanted if isinstance(wanted, dict) else {"$eq": wanted}
        if not all(REFERENCE[operator](value, operand) for operator, operand in operators.items()):
            return False
    return True


@settings(max_examples=100, deadline=None)
@given(st.lists(METADATA, min_size=1, max_size=8), WHERE, st.booleans())
def test_filters_select_what_python_selects(documents, where, cascade):
    index = MultiVectorIndex.create(None, 1, 2, "float32")
    index.add(torch.ones(len(documents), 1, 2), names(len(documents)), documents)
    index.delete(["d0"])
    expected = [f"d{i}" for i, document in enumerate(documents) if i and selects(where, document)]
    stages = [((1, 1), 9)] if cascade else None
    assert index.search(torch.ones(1, 2), k=9, where=where, stages=stages).ids == [expected]
    assert all(m == documents[int(i[1:])] for i, m in [(d.id, d.metadata) for d in index])
    assert index.delete(where=where) == len(expected)


def test_ids_are_included_and_excluded_on_exact_searches_and_cascades(place):
    x = vectors(0, 900, 4, 8)
    index = MultiVectorIndex.create(place, 4, 8)
    index.add(x, names(900), [{"even": i % 2 == 0} for i in range(900)])
    scores = {
        i: s for s, i in zip(*(lambda f: (f.scores[0].tolist(), f.ids[0]))(index.search(x[3], k=900)), strict=True)
    }
    for stages in (None, [((4, 2), 900)]):
        for options, allowed in (
            ({"include_ids": ["d3", "d8", "nobody", "d9"]}, {3, 8, 9}),
            ({"exclude_ids": names(3)}, set(range(3, 900))),
            ({"include_ids": names(20), "exclude_ids": ["d3"], "where": {"even": False}}, set(range(1, 20, 2)) - {3}),
            ({"where": {"even": True}}, set(range(0, 900, 2))),
            ({"include_ids": []}, set()),
        ):
            found = index.search(x[3], k=5, stages=stages, **options)
            expected = sorted((f"d{i}" for i in allowed), key=lambda i: -scores[i])[:5]
            assert found.ids == [expected]


def test_keys_and_values_of_filters_are_only_ever_bound(folder):
    hostile = "a') OR 1=1; DROP TABLE documents; --"
    index, statements = MultiVectorIndex.open(folder), []
    index._snapshot.catalog._db.set_trace_callback(statements.append)
    assert index.search(torch.ones(1, 16), where={hostile: "x", "$or": [{"n": {"$in": [hostile]}}]}).ids == [[]]
    assert len(statements) == 2 and all("json_extract" in statement for statement in statements)
    assert not any(hostile in statement.replace("''", "'").replace(f'$."{hostile}"', "") for statement in statements)
    assert len(index) == 39


def test_numbers_of_filters_are_compared_exactly():
    values = [2**53, 2**53 + 1, float(2**53), 2**63 - 1, float(2**63), 0.1, 5e-324, -0.0, 1e308, 3]
    index = MultiVectorIndex.create(None, 1, 2, "float32")
    index.add(torch.ones(len(values), 1, 2), names(len(values)), [{"n": value} for value in values])
    for operand in [2**53 + 1, 2**53, float(2**53), 2**63 - 1, 1e300, 0, 0.1, 0.30000000000000004, 2.5, -1e308]:
        for operator in ("$eq", "$ne", "$lt", "$lte", "$gt", "$gte"):
            expected = [f"d{i}" for i, value in enumerate(values) if REFERENCE[operator](value, operand)]
            assert index.search(torch.ones(1, 2), k=99, where={"n": {operator: operand}}).ids == [expected]


def test_a_filter_sees_what_was_added_changed_and_compacted_since_its_last_use(place):
    index = MultiVectorIndex.create(place, 1, 2, "float32")

    def found(**where):
        return sorted(index.search(torch.ones(1, 2), k=99, where=where).ids[0])

    assert found(n=1) == []
    index.add(torch.ones(3, 1, 2), names(3), [{"n": 1}, {"n": 1.5, "t": "x"}, {"n": 1, "t": "y"}])
    assert found(n=1) == ["d0", "d2"] and found(t={"$gt": "x"}) == ["d2"]
    index.upsert(torch.ones(2, 1, 2), ["d0", "d3"], [{"n": 2}, {"n": 1, "t": "z"}])
    assert found(n=1) == ["d2", "d3"] and found(t={"$gt": "x"}) == ["d2", "d3"] and found(t=None) == ["d0"]
    index.delete(["d2"])
    index.compact()
    assert found(n=1) == ["d3"] and found(n=2) == ["d0"] and found(t={"$ne": "z"}) == ["d0", "d1"]


def test_a_filter_reads_the_metadata_once_for_every_key(folder):
    index, statements = MultiVectorIndex.open(folder), []
    index.search(torch.ones(1, 16), k=1, where={"n": 3})
    index._snapshot.catalog._db.set_trace_callback(statements.append)
    index.search(torch.ones(1, 16), k=1, where={"$or": [{"n": {"$lt": 3}}, {"n": {"$in": [8]}}]})
    assert not any("json" in statement for statement in statements)


@pytest.mark.parametrize(
    ("where", "error", "match"),
    [
        ({"a": {"$like": "x"}}, ValueError, r"no operator '\$like'"),
        ({"$not": {}}, ValueError, r"no operator \$not"),
        ({"a": {}}, ValueError, "empty dict"),
        ({"a": [1]}, TypeError, "compares with"),
        ({"a": {"$in": "abc"}}, TypeError, "takes a list"),
        ({"a": {"$lt": None}}, TypeError, "text or a number"),
        ({"a": {"$exists": 1}}, TypeError, "True or False"),
        ({"$or": {"a": 1}}, TypeError, "list of filters"),
        ({'a"b': 1}, ValueError, "cannot name"),
        ({"a..b": 1}, ValueError, "cannot name"),
        ({"a": float("nan")}, ValueError, "NaN"),
        ({"a": 2**64}, ValueError, "64 bits"),
        ("a = 1", TypeError, "must be a dict"),
        ({"$or": [{"a": 1}] * 600}, ValueError, r"use \$in"),
    ],
)
def test_a_bad_filter_is_an_error_that_says_what_to_do(where, error, match):
    index = MultiVectorIndex.create(None, 1, 2)
    index.add(torch.ones(1, 1, 2), ["a"])
    with pytest.raises(error, match=match):
        index.search(torch.ones(1, 2), where=where)
    with pytest.raises(error, match=match):
        index.delete(where=where)
    assert len(index) == 1


# Writing


def test_add_upsert_delete_and_compact_behave_like_a_dict(place):
    rng, index, expected = random.Random(0), MultiVectorIndex.create(place, 2, 8, "float32"), {}
    for step in range(60):
        kind = rng.choice(["add", "upsert", "delete", "where", "compact", "again"])
        some = rng.sample(sorted(expected), min(len(expected), 4))
        if kind in ("add", "upsert"):
            ids = [f"s{step}-{i}" for i in range(rng.choice([1, 5, 400]))] + (some if kind == "upsert" else [])
            x = vectors(step, len(ids), 2, 8)
            getattr(index, kind)(x, ids, [{"step": step}] * len(ids))
            for i, one in zip(ids, x, strict=True):
                expected.pop(i, None)  # replaced documents move to the end
                expected[i] = (step, one)
        elif kind == "delete":
            assert index.delete([*some, "nobody"]) == len(some)
            expected = {i: what for i, what in expected.items() if i not in some}
        elif kind == "where":
            index.delete(where={"step": {"$lt": step - 30}})
            expected = {i: what for i, what in expected.items() if what[0] >= step - 30}
        elif kind == "compact":
            index.compact()
        elif place:
            index = MultiVectorIndex.open(place)
        assert len(index) == len(expected)
    assert index.ids == list(expected)
    for document in index:
        assert document.metadata == {"step": expected[document.id][0]}
        assert torch.equal(document.embedding, expected[document.id][1])
    index.verify()


def test_a_filter_finds_no_deleted_document(place):
    index = MultiVectorIndex.create(place, 2, 8, "float32")
    index.add(vectors(0, 9, 2, 8), [str(i) for i in range(9)], [{"even": i % 2 == 0} for i in range(9)])
    index.search(vectors(1, 1, 2, 8), k=9, where={"even": True})  # columns are read before the documents are deleted
    index.delete(["0", "1", "4"])
    for stages in ("auto", None):
        found = index.search(vectors(1, 1, 2, 8), k=9, stages=stages, where={"even": True})
        assert sorted(found.ids[0]) == ["2", "6", "8"]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x, i: (x[:, :1], i, None), ValueError, r"\[n, 2 or more, 8\]"),
        (lambda x, i: (x[..., :4], i, None), ValueError, r"\[n, 2 or more, 8\]"),
        (lambda x, i: (x / 0, i, None), ValueError, "NaN or infinity"),
        (lambda x, i: (x, ["d0", "p", "q", "r"], None), ValueError, "already in the index.*upsert"),
        (lambda x, i: (x, ["p"] * 4, None), ValueError, "unique"),
        (lambda x, i: (x, ["p"], None), ValueError, "4 documents, but 1 ids"),
        (lambda x, i: (x, [1, 2, 3, 4], None), TypeError, "must be str"),
        (lambda x, i: (x, "pqrs", None), TypeError, "list of str"),
        (lambda x, i: (x, ["p", "q", "r", ""], None), ValueError, "must not be empty"),
        (lambda x, i: (x, ["p", "q", "r", "\ud800"], None), ValueError, "lone surrogate"),
        (lambda x, i: (x, i, [{}] * 3), ValueError, "3 metadata"),
        (lambda x, i: (x, i, [1] * 4), TypeError, "must be a dict"),
        (lambda x, i: (x, i, [{"a": float("inf")}] * 4), ValueError, "NaN or infinity"),
        (lambda x, i: (x, i, [{"a": 2**63}] * 4), ValueError, "64 bits"),
        (lambda x, i: (x, i, [{"a": "\0"}] * 4), ValueError, "NUL"),
        (lambda x, i: (x, i, [{"a": {1, 2}}] * 4), TypeError, "JSON can represent"),
        (lambda x, i: (x, i, [{1: 2}] * 4), TypeError, "keys of metadata"),
        (lambda x, i: ([x[0], x[1][:1], x[2], x[3]], i, None), ValueError, "pooling='nested'"),
    ],
)
def test_an_operation_that_raises_changes_nothing(place, change, error, match):
    index = MultiVectorIndex.create(place, 2, 8)
    index.add(vectors(0, 1, 2, 8), ["d0"])
    with pytest.raises(error, match=match):
        index.add(*change(vectors(1, 4, 2, 8), ["p", "q", "r", "s"]))
    assert index.ids == ["d0"]
    index.add(vectors(2, 1, 2, 8), ["p"])
    assert index.ids == ["d0", "p"]
    index.verify()


def test_the_kernel_encodes_large_adds_as_torch_encodes_small_ones(place, monkeypatch):
    x, kept = vectors(0, 300, 8, 16), []
    for least, kernels in ((0, "1"), (0, "0"), (x.numel() + 1, "1")):
        monkeypatch.setattr(storage, "_WORTH_COMPILING", least)
        monkeypatch.setenv("METAEMBED_KERNELS", kernels)
        folder = None if place is None else place / f"{least} {kernels}"
        index = MultiVectorIndex.create(folder, 8, 16, {"first": ("int8", 3), "main": "int8"})
        index.add(x, names(300))
        with pytest.raises(ValueError, match="NaN or infinity"):
            index.add(x / 0, names(300, 300))
        kept.append(index._snapshot.take(torch.arange(300)))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*kept, strict=True))


@pytest.mark.parametrize("call", ["add", "upsert", "delete", "compact"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_full_disk_is_a_clear_error_after_which_nothing_has_changed(folder, call, size, monkeypatch):
    index = MultiVectorIndex.open(folder)
    before = index.ids
    monkeypatch.setattr("metaembed.retrieval.index._SMALL", 0 if size == "large" else 1 << 30)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if (call in ("add", "upsert") and size == "large") or call == "compact":
        monkeypatch.setattr(storage.os, "fsync", full)
    else:
        pages = index._writer or catalogs.Catalog(folder)
        index._writer = pages
        pages._db.execute(f"PRAGMA max_page_count = {pages._db.execute('PRAGMA page_count').fetchone()[0]}")
    x, ids = vectors(5, 900, 5, 16), [f"new{i}" for i in range(900)]
    work = {"delete": lambda: index.delete(ids=before), "compact": index.compact}
    try:
        work.get(call, lambda: getattr(index, call)(x, ids))()
    except OSError as error:
        assert error.errno == errno.ENOSPC and "is full" in str(error)
        assert index.ids == before
    else:
        assert call == "delete"  # which needs no room
        before = []
    monkeypatch.undo()
    again = MultiVectorIndex.open(folder)
    assert again.ids == before
    again.verify()
    index.close()
    again.add(x, ids)
    assert len(again) == len(before) + 900
    again.verify()


def test_a_folder_that_may_not_be_written_to_can_be_read_and_says_so(folder, monkeypatch):
    x, real = vectors(0, 30, 5, 16), os.open

    def refuse(path, flags, *args, **options):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(folder.parent) in os.fspath(path):
            raise PermissionError(errno.EROFS, "Read-only file system")
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(os, "open", refuse)
    before = sorted(folder.iterdir())
    index = MultiVectorIndex.open(folder)
    assert index.search(x[2], k=1).ids == [["d2"]]
    with pytest.raises(PermissionError, match="is not writable"):
        index.add(x[:1], ["new"])
    with pytest.raises(PermissionError, match="is not writable"):
        MultiVectorIndex.create(folder.parent / "other")
    assert sorted(folder.iterdir()) == before


def add_some(folder, name):
    index = MultiVectorIndex.open(folder)
    for i in range(8):
        index.add(torch.ones(1 if i % 2 else 200, 5, 16), [f"{name}{i}-{j}" for j in range(1 if i % 2 else 200)])


def test_two_processes_that_add_lose_nothing_and_a_reader_sees_a_snapshot_until_it_refreshes(folder, monkeypatch):
    monkeypatch.setattr("metaembed.retrieval.index._SMALL", 20_000)
    reader = MultiVectorIndex.open(folder)
    before = reader.search(vectors(0, 30, 5, 16), k=40)
    for process in [in_child(add_some, folder, name) for name in "ab"]:
        process.join()
        assert process.exitcode == 0
    writer = MultiVectorIndex.open(folder)
    writer.upsert(vectors(9, 1, 5, 16), ["d4"], [{"new": True}])
    writer.delete(["d5"])
    writer.compact()
    assert len(writer) == 39 + 2 * 4 * 201 - 1
    for _ in range(2):
        after = reader.search(vectors(0, 30, 5, 16), k=40)
        assert after.ids == before.ids and after.metadata == before.metadata and len(reader) == 39
        assert torch.equal(after.scores, before.scores)
    assert reader.get(["d4"])[0].metadata == {"n": 4}
    reader.refresh()
    assert len(reader) == len(writer) and "d5" not in reader
    assert reader.get(["d4"])[0].metadata == {"new": True}
    reader.verify()
    assert len({name.split(".")[0] for name in os.listdir(folder) if name.startswith("vectors-")}) == 1


def test_a_second_writer_waits_and_then_says_who_holds_the_index(folder):
    index = MultiVectorIndex.open(folder, timeout=0.2)
    with (
        storage.writer_lock(folder, 1),
        pytest.raises(TimeoutError, match=rf"process {os.getpid()} on .* waited for 0.2 seconds"),
    ):
        index.add(vectors(0, 1, 5, 16), ["x"])
    index.add(vectors(0, 1, 5, 16), ["x"])


def test_threads_share_an_index(place):
    index = MultiVectorIndex.create(place, 2, 8)
    index.add(vectors(0, 50, 2, 8), names(50))
    wrong = []

    def work(number):
        try:
            for i in range(6):
                index.upsert(vectors(number, 1, 2, 8), [f"t{number}"], [{"i": i}])
                hits = index.search(vectors(number, 2, 8), k=60)
                assert f"t{number}" in hits.ids[0] and len(index) >= 50
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(index) == 54


def search_and_leave(index):
    index.add(vectors(3, 1, 5, 16), ["of the child"])
    os._exit(0 if index.search(vectors(0, 30, 5, 16)[2], k=1).ids == [["d2"]] else 1)


def test_a_child_process_and_a_pickled_copy_can_use_the_folder(folder):
    index = MultiVectorIndex.open(folder)
    index.add(vectors(2, 1, 5, 16), ["before"])
    process = in_child(search_and_leave, index)
    process.join()
    assert process.exitcode == 0
    assert "of the child" not in index
    assert "of the child" in pickle.loads(pickle.dumps(index))
    index.add(vectors(2, 1, 5, 16), ["after"])
    assert "of the child" in index
    index.verify()
    with pytest.raises(TypeError, match="save it"):
        pickle.dumps(MultiVectorIndex.create(None, 1, 2))


def test_many_small_adds_end_up_in_one_place(place, monkeypatch):
    monkeypatch.setattr("metaembed.retrieval.index._SMALL", 3000)
    index = MultiVectorIndex.create(place, 2, 8)
    for i in range(100):
        index.add(vectors(i, 1, 2, 8), [f"d{i}"])
    assert len(index._snapshot.pieces) <= 2
    assert index.ids == names(100)
    assert index.search(vectors(57, 1, 2, 8)[0], k=1).ids == [["d57"]]
    index.verify()


def test_saving_an_index_writes_every_document(place, tmp_path):
    index = MultiVectorIndex.create(place, 5, 16, THREE, pca=fit_pca(vectors(0, 9, 5, 16), 16)[:, :8])
    index.add(vectors(0, 30, 5, 16), names(30), [{"n": i} for i in range(30)])
    index.delete(where={"n": {"$lt": 3}})
    index.save(tmp_path / "copy")
    copy = MultiVectorIndex.open(tmp_path / "copy")
    copy.verify()
    assert copy.ids == index.ids and copy.quantization == index.quantization
    assert [d.metadata for d in copy] == [d.metadata for d in index]
    queries = vectors(4, 3, 2, 16)
    assert torch.equal(copy.search(queries).scores, index.search(queries).scores)
    with pytest.raises(ValueError, match="already contains an index"):
        index.save(tmp_path / "copy")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ValueError, match="not empty: it contains 'file'"):
        MultiVectorIndex.create(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["file"]
    with pytest.raises(FileNotFoundError, match="contains no index"):
        MultiVectorIndex.open(tmp_path / "mine")


def test_files_have_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o002)
    try:
        index = MultiVectorIndex.create(tmp_path / "index", 2, 8)
        index.add(vectors(0, 9, 2, 8), names(9))
        index.compact()
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "index").iterdir()}
    finally:
        os.umask(old)
    assert set(modes.values()) == {0o664}, modes


# Damage


def test_every_flipped_bit_is_noticed_or_changes_nothing(folder):
    files = [path for path in folder.iterdir() if path.stat().st_size]
    expected = [(d.id, d.metadata, d.embedding.tolist()) for d in MultiVectorIndex.open(folder)]
    rng, noticed = random.Random(0), 0
    for turn in range(120):
        path = files[turn % len(files)]
        whole = path.read_bytes()
        at = rng.randrange(len(whole)) if path.suffix == ".sqlite" or turn % 2 else rng.randrange(4096, len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        try:
            index = MultiVectorIndex.open(folder)
            index.verify()
        except DamagedIndexError as error:
            assert "damaged" in str(error) or "database" in str(error)
            noticed += 1
        else:
            assert path.suffix == ".sqlite", path
            assert [(d.id, d.metadata, d.embedding.tolist()) for d in index] == expected
        index = None
        for suffix in ("-wal", "-shm"):
            (folder / f"index.sqlite{suffix}").unlink(missing_ok=True)
        path.write_bytes(whole)
    assert noticed > 100


def test_damaged_missing_and_swapped_files_are_errors_that_name_them(folder, tmp_path):
    first, second = sorted(folder.glob("vectors-*.main.*.vectors"))[:2]
    whole = first.read_bytes()
    for change, match in (
        (lambda: first.write_bytes(whole[:-1]), "documents need"),
        (lambda: first.write_bytes(b"{}" + whole[2:]), "its header"),
        (lambda: first.write_bytes(second.read_bytes()), "its header"),
        (first.unlink, "is missing"),
        (lambda: first.symlink_to(tmp_path / "elsewhere"), "not a regular file"),
        (lambda: (first.unlink(), os.mkfifo(first)), "not a regular file"),
    ):
        change()
        with pytest.raises(DamagedIndexError, match=match) as error:
            MultiVectorIndex.open(folder)
        assert first.name in str(error.value)
    first.unlink()
    first.write_bytes(whole)
    MultiVectorIndex.open(folder).verify()
    with pytest.raises(DamagedIndexError, match=r"index\.sqlite"):
        (folder / "index.sqlite").write_bytes(b"not a database" * 1000)
        MultiVectorIndex.open(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rows": 1 << 40}, "documents need|small adds"),
        ({"rows": 1 << 40, "base": 1 << 40}, "documents need"),
        ({"base": -1}, "manifest is invalid"),
        ({"segment": "../../etc/passwd"}, "manifest is invalid"),
        ({"segment": ["a"]}, "manifest is invalid"),
        ({"vectors": 10**12}, "manifest is invalid"),
        ({"dim": 10**9}, "manifest is invalid"),
        ({"kept": {"main": ["int3", 5]}}, "manifest is invalid"),
        ({"kept": {"main": ["int8", 50]}}, "manifest is invalid"),
        ({"kept": []}, "manifest is invalid"),
        ({"kept_dim": 8}, "PCA"),
        ({"format": 3}, "format 3"),
        ({"other": 1}, "manifest is invalid"),
    ],
)
def test_a_hostile_manifest_is_an_error_before_anything_is_allocated(folder, change, match):
    catalog = catalogs.Catalog(folder)
    catalog.set_manifest({**catalog.manifest(), **change})
    catalog.close()
    with pytest.raises(DamagedIndexError, match=match):
        MultiVectorIndex.open(folder)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON documents BEGIN DELETE FROM documents; END",
        "DROP TABLE dead",
        "CREATE VIEW v AS SELECT * FROM documents",
        "INSERT INTO dead (slot) VALUES (99999999999)",
        "UPDATE tail SET vectors = zeroblob(10)",
        "UPDATE tail SET count = 4000000000",
        "DELETE FROM tail",
        "UPDATE documents SET id = 'x' WHERE slot = 8",
        "DELETE FROM documents WHERE slot = 8",
        "UPDATE documents SET metadata = '{' WHERE slot = 8",
        "UPDATE chunks SET sums = '[]'",
        "UPDATE manifest SET json = '[]'",
        "DELETE FROM manifest",
    ],
)
def test_a_hostile_database_is_an_error_no_later_than_verify(folder, statement):
    db = sqlite3.connect(folder / "index.sqlite")
    db.execute(statement)
    db.commit()
    db.close()
    with pytest.raises(DamagedIndexError):
        MultiVectorIndex.open(folder).verify()


def test_nan_in_a_file_is_found_although_the_sums_are_right(tmp_path):
    index = MultiVectorIndex.create(tmp_path / "index", 1, 4)
    index.add(torch.ones(3, 1, 4), names(3))
    index.compact()
    (path,) = (tmp_path / "index").glob("*.main.0.scales")
    path.write_bytes(path.read_bytes()[:-4] + b"\xff\xff\xff\x7f")
    sums = index._writer.chunks()[0][2]
    sums[1] = storage.zlib.crc32(path.read_bytes()[4096:])
    with index._writer.transaction() as catalog:
        catalog.forget_vectors()
        catalog.add_chunk(0, 3, sums)
    with pytest.raises(DamagedIndexError, match="NaN"):
        index.verify()


# Format 1


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_folder_of_format_1_opens_and_is_migrated_by_the_first_write(tmp_path, with_ids):
    x, pca = vectors(0, 12, 6, 16), fit_pca(vectors(0, 12, 6, 16), 16)[:, :9]
    old = EmbeddingCollection(6, 16, "int8", pca=pca, folder=tmp_path / "old")
    for part, start in ((x[:5], 0), (x[5:], 5)):
        old.append(part, names(len(part), start) if with_ids else None)
    ids = old.ids
    expected = search(x[:3], old, 4)
    del old
    before = sorted(path.name for path in (tmp_path / "old").iterdir())
    index = MultiVectorIndex.open(tmp_path / "old")
    reader = MultiVectorIndex.open(tmp_path / "old")
    assert index.ids == ids and sorted(path.name for path in (tmp_path / "old").iterdir()) == before
    for _ in range(2):
        found = index.search(x[:3], k=4)
        assert torch.equal(found.scores, expected.scores)
        assert found.ids == [[ids[i] for i in row] for row in expected.indices.tolist()]
        index.verify()
        index.upsert(vectors(9, 1, 6, 16) * 1e-6, ["new"], [{"n": 1}])
    assert len(reader) == 12 and reader.search(x[2], k=1).ids == [[ids[2]]]
    assert not list((tmp_path / "old").glob("*.safetensors")) and not (tmp_path / "old" / "collection.json").exists()
    again = MultiVectorIndex.open(tmp_path / "old")
    assert again.ids == [*ids, "new"] and again.get(["new"])[0].metadata == {"n": 1}
    again.verify()


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{"name": "../documents-00000.safetensors", "documents": 9}]},
        {"files": [{"name": "documents-00000.safetensors", "documents": 1 << 60}]},
        {"files": [{"name": "documents-00000.safetensors", "documents": 8}]},
        {"files": 3},
        {"vectors": "4"},
        {"precision": "int4"},
        {"rotation": True},
        {"format": 7},
    ],
)
def test_a_hostile_folder_of_format_1_is_an_error(tmp_path, change):
    EmbeddingCollection.from_embeddings(vectors(0, 9, 4, 8), quantization="int8", folder=tmp_path / "old")
    path = tmp_path / "old" / "collection.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DamagedIndexError):
        MultiVectorIndex.open(tmp_path / "old")


# Kills


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_writers_killed_at_any_moment_lose_nothing_that_was_acknowledged():
    assert kill_index.run(kills=8, seed=1)["lost"] == 0
