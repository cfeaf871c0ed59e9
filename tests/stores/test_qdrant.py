"""What is sent to Qdrant is what its documentation asks for, and what it would refuse is not sent."""

import multiprocessing
import time
import uuid

import pytest
import torch
from torch.nn.functional import normalize

from metaembed.stores import create_store, open_store

pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")

from metaembed.stores import engine
from metaembed.stores import qdrant as stores
from metaembed.stores.qdrant import QdrantStore, point_id


def vectors(seed, *shape):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def name():
    return f"c{uuid.uuid4().hex}"


@pytest.fixture
def sent(qdrant):
    qdrant.requests.clear()
    qdrant.fail.clear()
    return qdrant.requests


def test_only_the_first_vectors_have_a_graph_and_shards_replicas_and_indexes_are_passed_on(qdrant, sent, name):
    settings = {"shards": 12, "replicas": 2, "write_consistency": 1, "quantization": "int8", "disk": "float16"}
    create_store(
        f"{qdrant.url}/{name}", 64, 16, **settings, filters={"lang": "text", "page": "number", "x": "boolean"}
    )
    made = next(body for method, path, body in sent if method == "PUT" and path == f"/collections/{name}")
    assert (made["shard_number"], made["replication_factor"], made["write_consistency_factor"]) == (12, 2, 1)
    assert sorted(made["vectors"]) == ["v1", "v64", "v8"]
    assert made["vectors"]["v1"]["hnsw_config"]["m"] == 16 and "multivector_config" not in made["vectors"]["v1"]
    for other in ("v8", "v64"):
        assert made["vectors"][other]["hnsw_config"] == {"m": 0}
        assert made["vectors"][other]["multivector_config"] == {"comparator": "max_sim"}
        assert "quantization_config" not in made["vectors"][other]
        assert made["vectors"][other]["on_disk"] is True and made["vectors"][other]["datatype"] == "float16"
    assert made["vectors"]["v1"]["quantization_config"]["scalar"] == {"type": "int8", "always_ram": True}
    indexed = {body["field_name"]: body["field_schema"] for _, path, body in sent if path.endswith("/index")}
    assert indexed == {'metadata."lang"': "keyword", 'metadata."page"': "float", "marks": "keyword"}


def test_a_cascade_of_many_queries_is_one_request_with_the_filter_innermost(qdrant, sent, name):
    store = create_store(f"{qdrant.url}/{name}", 64, 16)
    x, queries = vectors(0, 3, 64, 16), vectors(1, 2, 16, 16)
    store.add(x, ["a", "b", "c"], [{"lang": "en"}] * 3)
    sent.clear()
    store.search(queries, k=2, where={"lang": "en"}, exclude_ids=["b"])
    assert [path for _, path, _ in sent] == [f"/collections/{name}/points/query/batch"]
    requests = sent[0][2]["searches"]
    assert len(requests) == 2
    last = requests[1]
    middle = last["prefetch"]
    inner = middle["prefetch"]
    assert [(part["using"], part["limit"]) for part in (last, middle, inner)] == [
        ("v64", 2),
        ("v8", 200),
        ("v1", 1000),
    ]
    assert "filter" not in last and "filter" not in middle and "prefetch" not in inner
    assert inner["filter"]["must_not"] == [{"has_id": [point_id("b")]}]
    torch.testing.assert_close(torch.tensor(last["query"]["nearest"]), queries[1])
    torch.testing.assert_close(torch.tensor(middle["query"]), queries[1, :4])
    torch.testing.assert_close(torch.tensor(inner["query"]), queries[1, 0])
    assert last["params"]["quantization"]["ignore"] is True  # the final scores are exact


def test_points_are_named_by_uuids_and_payloads_hold_the_ids(qdrant, sent, name):
    store = create_store(f"{qdrant.url}/{name}", 2, 4, prefixes=())
    store.add(vectors(0, 1, 2, 4), ["page 1/ü"], [{"lang": "en", "tags": ["a"], "public": True}])
    point = next(body for method, path, body in sent if method == "PUT" and path.endswith("/points"))["points"][0]
    assert point["id"] == str(uuid.UUID(point["id"])) == point_id("page 1/ü")
    assert sorted(point["vector"]) == ["v1", "v2"]
    assert point["payload"] == {
        "id": "page 1/ü",
        "metadata": {"lang": "en", "tags": ["a"], "public": True},
        "marks": ["list tags", "true public"],
    }


def test_many_documents_are_sent_in_several_requests(qdrant, sent, name, monkeypatch):
    monkeypatch.setattr(stores, "_BATCH_BYTES", 10_000)
    store = create_store(f"{qdrant.url}/{name}", 4, 16)
    sent.clear()
    store.upsert(vectors(0, 30, 4, 16), [f"d{i}" for i in range(30)])
    written = [body["points"] for method, path, body in sent if method == "PUT"]
    assert len(written) == 3 and sum(map(len, written)) == len(store) == 30


def test_a_server_that_is_busy_is_tried_again_and_one_that_refuses_is_not(qdrant, sent, name, monkeypatch):
    waits = []
    monkeypatch.setattr(engine.time, "sleep", waits.append)
    store = create_store(f"{qdrant.url}/{name}", 2, 4)
    qdrant.fail[:] = [503, 429, 502]
    store.add(vectors(0, 2, 2, 4), ["a", "b"])
    assert len(store) == 2 and len(waits) == 3 and waits == sorted(waits)
    qdrant.fail[:] = [503] * 20
    with pytest.raises(ConnectionError, match="in 6 attempts"):
        store.upsert(vectors(0, 1, 2, 4), ["c"])
    qdrant.fail[:] = [400]
    waits.clear()
    with pytest.raises(Exception, match="400"):
        store.upsert(vectors(0, 1, 2, 4), ["c"])
    assert not waits


def test_a_server_that_is_not_there_is_a_connection_error(monkeypatch):
    monkeypatch.setattr(engine.time, "sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match="did not answer in 2 attempts"):
        open_store("http://127.0.0.1:9/pages", attempts=2)


def test_what_is_beyond_a_limit_is_not_sent_and_the_message_says_what_to_do(qdrant, sent, name, tmp_path, monkeypatch):
    for address in (f"{qdrant.url}/{name}", f"qdrant+edge:{tmp_path / 'edge'}"):
        with pytest.raises(ValueError, match=r"1030 x 4096 = 4,218,880; keep 255 vectors, or 1018 dimensions"):
            create_store(address, 1030, 4096)
        with pytest.raises(ValueError, match=r"65536 dimensions at most.*fit_pca"):
            create_store(address, 1, 1 << 17)
        with pytest.raises(ValueError, match="quantization must be one of"):
            create_store(address, 4, 16, quantization="int4")
        with pytest.raises(ValueError, match="prefixes must be whole numbers from 1 to 4"):
            create_store(address, 4, 16, prefixes=(1, 9))
        with pytest.raises(ValueError, match="must be 'text', 'number', 'boolean'"):
            create_store(address, 4, 16, filters={"a": "keyword"})
    assert not sent and not (tmp_path / "edge").exists()
    monkeypatch.setattr(stores, "_MOST_BYTES", 3_000)
    store = create_store(f"{qdrant.url}/{name}", 2, 4)
    with pytest.raises(ValueError, match=r"'b' takes about .* keep less metadata"):
        store.add(vectors(0, 2, 2, 4), ["a", "b"], [None, {"text": "x" * 3_000}])
    assert len(store) == 0
    with pytest.raises(ValueError, match="64-bit floats"):
        store.search(vectors(0, 1, 4), where={"n": 2**53 + 1})


def test_addresses_that_name_no_collection_or_hold_a_password_are_refused(qdrant, name):
    with pytest.raises(ValueError, match="names no collection"):
        open_store(qdrant.url)
    with pytest.raises(ValueError, match="api_key") as caught:
        open_store("http://user:secret@host:6333/pages")
    assert "secret" not in str(caught.value)
    qdrant.memory.create_collection(name, vectors_config={"other": stores_params(4)})
    with pytest.raises(ValueError, match="not v1"):
        open_store(f"{qdrant.url}/{name}")


def stores_params(size):
    from qdrant_client import models

    return models.VectorParams(size=size, distance=models.Distance.DOT)


def test_a_client_of_ones_own_may_be_given():
    from qdrant_client import QdrantClient

    store = QdrantStore.create("pages", 2, 4, client=QdrantClient(":memory:"))
    store.add(vectors(0, 2, 2, 4), ["a", "b"])
    assert len(QdrantStore.open("pages", client=store.client)) == 2


# Edge


@pytest.mark.parametrize("quantization", ["float16", "int8", "binary"])
def test_edge_scores_are_exact_whatever_the_quantization_of_candidates(tmp_path, quantization):
    pytest.importorskip("qdrant_edge", reason="qdrant-edge-py is not installed")
    x = vectors(0, 300, 4, 32)
    with create_store(f"qdrant+edge:{tmp_path / 'e'}", 4, 32, prefixes=(1, 2), quantization=quantization) as store:
        store.add(x, [f"d{i}" for i in range(300)])
        store.optimize()
        found = store.search(x[:10], k=1, stages=[((1, 1), 100)])
        assert [ids[0] for ids in found.ids] == [f"d{i}" for i in range(10)]
        torch.testing.assert_close(found.scores, torch.full((10, 1), 4.0), atol=4e-3, rtol=0)


def test_edge_is_open_once_and_survives_a_kill(tmp_path):
    pytest.importorskip("qdrant_edge", reason="qdrant-edge-py is not installed")
    address = f"qdrant+edge:{tmp_path / 'e'}"
    context = multiprocessing.get_context("fork")
    written = context.Event()

    def write():
        store = create_store(address, 2, 4)
        store.add(torch.eye(4).view(2, 2, 4), ["a", "b"], [{"n": 1}, None])
        store.delete(["b"])
        written.set()
        time.sleep(60)

    child = context.Process(target=write)
    child.start()
    try:
        assert written.wait(30)
        with pytest.raises(BlockingIOError, match="open already"):
            open_store(address)
    finally:
        child.kill()
        child.join()
    with open_store(address) as store:
        assert len(store) == 1 and store.get(["a"])[0].metadata == {"n": 1}
