"""Every store keeps the promises of the protocol, with its real engine, and answers as our own index does."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from metaembed.retrieval.index import MultiVectorIndex, Stage
from metaembed.stores import Ledger, VectorStore, create_store, load, open_store

VECTORS, DIM = 8, 16
PREFIXES = {"prefixes": (1, 2)}
ENGINES = ["memory", "folder", "edge", "server", "postgres"]  # the server answers with the client in memory
NUMBERS = itertools.count()


def vectors(seed, *shape):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def names(n, start=0):
    return [f"d{i}" for i in range(start, start + n)]


class Place:
    """Where stores of an engine are made and opened."""

    def __init__(self, engine, request, tmp_path):
        self.engine, self.request, self.tmp_path = engine, request, tmp_path
        self.settings = {"quantization": "float32"} | ({} if engine in ("memory", "folder") else PREFIXES)
        if engine == "edge":
            pytest.importorskip("qdrant_edge", reason="qdrant-edge-py is not installed")

    def address(self):
        number = next(NUMBERS)
        if self.engine == "memory":
            return None
        if self.engine == "server":
            return f"{self.request.getfixturevalue('qdrant').url}/pages{number}"
        if self.engine == "postgres":
            return self.request.getfixturevalue("postgres") + f"&table=pages{number}"
        return {"folder": "", "edge": "qdrant+edge:"}[self.engine] + str(self.tmp_path / f"store{number}")

    def create(self, address=..., vectors=VECTORS, dim=DIM, **settings):
        address = self.address() if address is ... else address
        return create_store(address, vectors, dim, **self.settings | settings)

    def open(self, address):
        return open_store(address)


@pytest.fixture(params=ENGINES)
def place(request, tmp_path):
    return Place(request.param, request, tmp_path)


@pytest.fixture
def store(place):
    with place.create() as store:
        yield store


def own(x, ids, metadata=None):
    index = MultiVectorIndex.create(None, VECTORS, DIM, "float32")
    index.add(x, ids, metadata)
    return index


def test_what_is_added_is_there_and_reopens_by_its_address(place):
    address, x = place.address(), vectors(0, 30, VECTORS, DIM)
    store = place.create(address)
    assert isinstance(store, VectorStore) and (store.vectors, store.dim, len(store)) == (VECTORS, DIM, 0)
    given = [{"n": i, "at": {"x": [1, None, 2.5]}, "ü": "é\n\"'"} for i in range(30)]
    store.add(x, names(30), given)
    store.add([], [])
    if address is not None:
        store.close()
        store = place.open(address)
    assert len(store) == 30 and (store.vectors, store.dim) == (VECTORS, DIM)
    assert "d7" in store and "d30" not in store and 7 not in store
    got = store.get(["d7", "d3", "d7"])
    assert [d.id for d in got] == ["d7", "d3", "d7"] and [d.metadata for d in got] == [given[7], given[3], given[7]]
    torch.testing.assert_close(got[1].embedding, x[3], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="1 ids are not in the"):
        store.get(["d1", "no"])
    store.close()


def test_ids_that_are_there_are_an_error_to_add_and_replaced_by_upsert(store):
    x = vectors(0, 6, VECTORS, DIM)
    store.add(x[:4], names(4), [{"n": i} for i in range(4)])
    with pytest.raises(ValueError, match=r"'d3'.*upsert"):
        store.add(x[3:], names(3, 3))
    assert len(store) == 4
    store.upsert(x[3:].flip(0), ["d5", "d4", "d3"], [{"new": True}] * 3)
    assert len(store) == 6
    assert [d.metadata for d in store.get(["d3", "d2"])] == [{"new": True}, {"n": 2}]
    assert store.search(x[3], k=1).ids == [["d3"]]


def test_documents_are_deleted_by_id_and_by_filter(store):
    x = vectors(0, 10, VECTORS, DIM)
    store.add(x, names(10), [{"even": i % 2 == 0} for i in range(10)])
    assert store.delete(["d0", "no"]) == 1
    assert store.delete(where={"even": True}) == 4
    assert store.delete(where={"even": True}) == 0
    assert store.delete([]) == 0
    assert len(store) == 5 and "d0" not in store
    assert sorted(store.search(x[1], k=10).ids[0]) == ["d1", "d3", "d5", "d7", "d9"]
    assert store.delete(where={}) == 5 and len(store) == 0
    assert store.search(x[:2], k=3).ids == [[], []]
    for arguments in ({}, {"ids": ["d1"], "where": {}}):
        with pytest.raises(TypeError, match="either ids or where"):
            store.delete(**arguments)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"stages": None},
        {"budget": (4, 2)},
        {"budget": (1, 1), "stages": None},
        {"budget": (3, 1), "k": 4},
        {"stages": [((1, 1), 40), ((2, 2), 20)]},
        {"stages": [Stage((3, 2), 15)]},
        {"budget": (2, 2), "stages": [((2, 1), 12)]},
        {"where": {"n": {"$lt": 60}}, "stages": [((1, 1), 20)]},
        {"include_ids": ["d3", "d5", "d99", "no"], "k": 3},
        {"exclude_ids": ["d3", "d5"], "where": {"n": {"$gte": 2}}},
        {"include_ids": []},
    ],
    ids=str,
)
def test_a_search_finds_what_our_own_index_finds(filled, how):
    store, index, queries = filled
    found, expected = store.search(queries, **{"k": 7} | how), index.search(queries, **{"k": 7} | how)
    assert found.ids == expected.ids and found.metadata == expected.metadata
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=ENGINES)
def filled(request, tmp_path_factory):
    place = Place(request.param, request, tmp_path_factory.mktemp("stores"))
    x, given = vectors(0, 120, VECTORS, DIM), [{"n": i, "lang": "en" if i % 3 else "fr"} for i in range(120)]
    with place.create(**({} if place.engine in ("memory", "folder") else {"filters": {"lang": "text"}})) as store:
        store.add(x, names(120), given)
        yield store, own(x, names(120), given), vectors(1, 5, 6, DIM)


VALUES = [None, True, False, 0, 1, 1.0, -2.5, 2**40, "", "x", "y", "1", "é'\"%\\", [], [1, "x"], {}, [{"b": 1}]]
KEYS = ["a", "a.b", "c", "s p'[]%", "a.0"]
scalars = st.sampled_from([value for value in VALUES if not isinstance(value, list | dict)])
numbers = st.sampled_from([0, 1, -2.5, 1.0, 2**40])
operators = st.one_of(
    scalars,
    st.builds(lambda op, v: {op: v}, st.sampled_from(["$eq", "$ne"]), scalars),
    st.builds(lambda op, v: {op: v}, st.sampled_from(["$in", "$nin"]), st.lists(scalars, max_size=4)),
    st.builds(lambda op, v: {op: v}, st.sampled_from(["$lt", "$lte", "$gt", "$gte"]), numbers),
    st.builds(lambda v: {"$exists": v}, st.booleans()),
)
filters = st.recursive(
    st.dictionaries(st.sampled_from(KEYS), operators, max_size=3),
    lambda inner: st.builds(
        lambda op, some: {op: some}, st.sampled_from(["$and", "$or"]), st.lists(inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module", params=ENGINES)
def varied(request, tmp_path_factory):
    """A store of documents whose metadata is as different as JSON allows."""
    place = Place(request.param, request, tmp_path_factory.mktemp("stores"))
    kept = [{"a": v} for v in VALUES] + [{"a": {"b": v}} for v in VALUES] + [{"c": v, "s p'[]%": v} for v in VALUES]
    kept += [{}, {"a.b": 1}, {"a": {"0": "x"}}, {"a": {"b": {"c": 1}}}, {"c": [True]}, {"c": [None]}]
    x = vectors(0, len(kept), VECTORS, DIM)
    named = {} if place.engine in ("memory", "folder") else {"filters": {"a": "text", "c": "number", "a.b": "boolean"}}
    with place.create(**named) as store:
        store.add(x, names(len(kept)), kept)
        yield store, own(x, names(len(kept)), kept)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=filters)
def test_a_filter_selects_what_it_selects_in_our_own_index(varied, where):
    store, index = varied
    query = vectors(3, 1, 1, DIM)
    expected = set(index.search(query, k=100, where=where).ids[0])
    assert set(store.search(query, k=100, where=where).ids[0]) == expected


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_every_kind_of_value_is_told_from_every_other(varied, value):
    store, index = varied
    conditions = [{"$exists": True}, {"$exists": False}]
    if not isinstance(value, list | dict):
        conditions += [value, {"$ne": value}, {"$nin": [value, "y"]}]
    for key, condition in itertools.product(KEYS, conditions):
        found, expected = (
            set(one.search(vectors(3, 1, DIM), k=100, where={key: condition}).ids[0]) for one in (store, index)
        )
        assert found == expected, (key, condition)


def test_text_is_compared_by_order_or_refused(varied):
    store, index = varied
    for key in ("a", "c"):
        try:
            found = store.search(vectors(3, 1, DIM), k=100, where={key: {"$gt": "1"}})
        except ValueError as error:
            assert "Qdrant cannot compare text by order" in str(error)
        else:
            assert set(found.ids[0]) == set(index.search(vectors(3, 1, DIM), k=100, where={key: {"$gt": "1"}}).ids[0])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": True}, TypeError, "k must be an int"),
        ({"budget": (99, 1)}, ValueError, "99 query vectors"),
        ({"budget": (1, 99)}, ValueError, "99 document vectors"),
        ({"budget": 4}, TypeError, "budget must be a pair"),
        ({"stages": "some"}, ValueError, "'auto', None, or a list"),
        ({"stages": [3]}, TypeError, "a stage must be"),
        ({"stages": [((1, 1), 2)], "k": 3}, ValueError, "at least k = 3"),
        ({"stages": [((1, 1), 5), ((2, 2), 9)], "k": 3}, ValueError, "no more than the stage before"),
        ({"stages": [((1, 1), 5.5)]}, TypeError, "must be an int"),
        ({"where": {"n": {"$near": 1}}}, ValueError, "no operator"),
        ({"where": []}, TypeError, "a filter must be a dict"),
        ({"where": {"a..b": 1}}, ValueError, "cannot name the key"),
        ({"include_ids": "d1"}, TypeError, "ids must be a list"),
        ({"exclude_ids": [1]}, TypeError, "ids must be str"),
        ({"queries": torch.ones(1, 1, DIM + 1)}, ValueError, "17 dimensions"),
        ({"queries": torch.full((1, 1, DIM), torch.nan)}, ValueError, "NaN"),
    ],
    ids=str,
)
def test_a_search_that_cannot_be_is_an_error(filled, arguments, error, message):
    store, _, queries = filled
    with pytest.raises(error, match=message):
        store.search(**{"queries": queries} | arguments)


def test_documents_that_cannot_be_are_an_error_and_change_nothing(store):
    x = vectors(0, 2, VECTORS, DIM)
    for arguments, error, message in [
        ((x, ["a"]), ValueError, "2 documents, but 1 ids"),
        ((x, ["a", "a"]), ValueError, "unique"),
        ((x, ["a", 1]), TypeError, "must be str"),
        ((x, ["a", ""]), ValueError, "must not be empty"),
        ((x[:, :3], ["a", "b"]), ValueError, "8 or more, 16"),
        ((x[..., :3], ["a", "b"]), ValueError, "8 or more, 16"),
        ((x.int(), ["a", "b"]), TypeError, "floating point"),
        ((x * torch.nan, ["a", "b"]), ValueError, "NaN"),
        ((x, ["a", "b"], [{}]), ValueError, "1 metadata"),
        ((x, ["a", "b"], [{}, {"a": {1}}]), TypeError, "JSON can represent"),
        ((x, ["a", "b"], [{}, {"a": "\0"}]), ValueError, "NUL"),
    ]:
        for write in (store.add, store.upsert):
            with pytest.raises(error, match=message):
                write(*arguments)
    assert len(store) == 0


def test_more_vectors_and_other_types_are_cut_and_converted(store):
    x = vectors(0, 3, VECTORS + 2, DIM)
    store.add(list(x.bfloat16()), names(3))
    torch.testing.assert_close(store.get(["d1"])[0].embedding, x[1, :VECTORS].bfloat16().float(), atol=1e-6, rtol=0)
    store.upsert(x.numpy(), names(3))
    torch.testing.assert_close(store.get(["d1"])[0].embedding, x[1, :VECTORS], atol=1e-6, rtol=0)


def test_a_place_that_is_taken_or_empty_is_an_error(place):
    if (address := place.address()) is None:
        return
    with pytest.raises(FileNotFoundError):
        place.open(address)
    place.create(address).close()
    with pytest.raises(ValueError, match=r"already|not empty"):
        place.create(address)
    for wrong in ({"vectors": 0}, {"dim": 2.5}, {"quantization": "int5"}):
        with pytest.raises(ValueError):
            place.create(**wrong)


def test_a_budget_that_an_engine_keeps_no_prefix_for_says_which_there_are(place):
    if place.engine in ("memory", "folder"):
        return
    with place.create() as store, pytest.raises(ValueError, match=r"prefixes of 1, 2, 8 vectors.*\(1, 2, 4, 8\)"):
        store.search(vectors(0, 1, 4, DIM), budget=(4, 4))


def test_single_vectors_are_a_store_too(place):
    x = vectors(0, 20, 1, DIM)
    with place.create(vectors=1, **({} if "prefixes" not in place.settings else {"prefixes": None})) as store:
        store.add(x, names(20))
        assert store.search(x[4], k=1).ids == [["d4"]] and store.get(["d4"])[0].embedding.shape == (1, DIM)


def test_loading_goes_on_where_it_was_interrupted_and_encodes_nothing_twice(place, tmp_path):
    x, encoded = vectors(0, 40, VECTORS, DIM), []

    def encode(start):
        if start == 20 and 20 not in encoded:
            encoded.append(20)
            raise KeyboardInterrupt
        encoded.append(start)
        return x[start : start + 10]

    def batches():
        return [(lambda s=s: encode(s), names(10, s), [{"n": s}] * 10) for s in range(0, 40, 10)]

    with place.create() as store:
        with pytest.raises(KeyboardInterrupt):
            load(store, batches(), Ledger(tmp_path / "ledger"))
        assert len(store) == 20
        assert load(store, batches(), Ledger(tmp_path / "ledger")) == 20
        assert encoded == [0, 10, 20, 20, 30] and len(store) == 40 and len(Ledger(tmp_path / "ledger")) == 4
        assert store.search(x[25], k=1).ids == [["d25"]]
        assert load(store, batches(), Ledger(tmp_path / "ledger")) == 0 and len(encoded) == 5
