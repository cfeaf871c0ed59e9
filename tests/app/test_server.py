"""What the HTTP server promises."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from metaembed import MultiVectorIndex
from metaembed.app import server
from metaembed.app.encoder import load_encoder
from metaembed.inputs_metaembed import InputPolicy


def picture(color, size=(32, 32), file_format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, file_format)
    return base64.b64encode(file.getvalue()).decode()


TEXTS = {"a": "a red apple", "b": "the invoice of May", "c": "a cat"}


@pytest.fixture(scope="module")
def encoder(qwen):
    before = qwen.policy
    yield load_encoder(qwen, policy=InputPolicy.server(max_pixels=10_000))
    qwen.policy = before


@pytest.fixture
def store(encoder):
    index = MultiVectorIndex.create(None, encoder.document_vectors, encoder.dim, "float32")
    metadata = [{"page": i} for i in range(len(TEXTS))]
    index.add(encoder.encode_documents(list(TEXTS.values())), list(TEXTS), metadata)
    return index


@pytest.fixture
def client(store, encoder):
    with TestClient(server.create_app(store, encoder, limits=server.Limits(inputs=4, pixels=10_000))) as client:
        yield client


def ask(client, path, status=200, method="POST", **body):
    answer = client.request(method, path, json=body or None)
    assert answer.status_code == status, answer.text
    if status >= 400:
        assert list(answer.json()) == ["error"]
        return answer.json()["error"]
    return answer.json()


def test_encode_gives_what_the_model_gives(client, encoder):
    inputs = [
        "a red apple",
        {"image": picture("red")},
        {"text": "this", "image": ["data:image/png;base64," + picture("blue")]},
    ]
    for side in ("query", "document"):
        found = torch.tensor(ask(client, "/encode", inputs=inputs, side=side, num_meta=2)["embeddings"])
        plain = [
            inputs[0],
            {"image": Image.new("RGB", (32, 32), "red")},
            {"text": "this", "image": Image.new("RGB", (32, 32), "blue")},
        ]
        encode = encoder.encode_queries if side == "query" else encoder.encode_documents
        assert torch.allclose(found, encode(plain, 2), atol=1e-5)


def test_search_gives_what_the_index_gives_at_every_budget(client, store, encoder):
    for budget in [None, *encoder.budgets]:
        found = ask(client, "/search", queries=list(TEXTS.values()), k=2, budget=budget, where={"page": {"$lt": 2}})
        r_q = budget[0] if budget else encoder.query_vectors
        expected = store.search(
            encoder.encode_queries(list(TEXTS.values()), r_q), 2, budget, where={"page": {"$lt": 2}}
        )
        assert [[hit["id"] for hit in row] for row in found["results"]] == expected.ids
        scores = torch.tensor([[hit["score"] for hit in row] for row in found["results"]])
        assert torch.allclose(scores, expected.scores, atol=1e-4)
        assert found["results"][0][0]["metadata"] in ({"page": 0}, {"page": 1})


def test_documents_are_added_replaced_read_and_deleted(client, store):
    new = {"id": "folder/d", "input": {"image": picture("red")}, "metadata": {"page": 9}}
    assert ask(client, "/documents", 201, documents=[new]) == {"documents": 1}
    assert "folder/d" in ask(client, "/documents", 400, documents=[new])  # which is there already
    changed = {**new, "metadata": {"page": 10}}
    assert ask(client, "/documents", 201, documents=[changed], replace=True) == {"documents": 1}
    assert ask(client, "/documents/folder/d", method="GET") == {"id": "folder/d", "metadata": {"page": 10}}
    assert ask(client, "/documents/delete", where={"page": {"$gte": 2}}) == {"documents": 2}
    assert "no document" in ask(client, "/documents/folder/d", 404, method="GET")
    assert ask(client, "/health", method="GET")["documents"] == len(store) == 2


def test_nothing_is_added_when_one_document_of_a_request_is_bad(client, store):
    documents = [{"id": "d", "input": "good"}, {"id": "e", "input": {"image": "bm90IGEgcGljdHVyZQ=="}}]
    assert "input 1" in ask(client, "/documents", 400, documents=documents)
    assert len(store) == 3


def test_no_file_and_no_url_is_read_for_a_request(client, tmp_path, served):
    path = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(path)
    for image in (str(path), f"file://{path}", f"{served}/picture.png", "http://169.254.169.254/"):
        ask(client, "/search", 400, queries=[{"image": image}])


def test_an_operator_may_allow_folders(store, encoder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "open.png")
    before = encoder.policy
    encoder.policy = replace(before, folders=(tmp_path,))
    try:
        with TestClient(server.create_app(store, encoder)) as client:
            assert ask(client, "/search", queries=[{"image": str(tmp_path / "open.png")}])["results"]
            ask(client, "/search", 400, queries=[{"image": "/etc/passwd"}])
    finally:
        encoder.policy = before


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"queries": []}, "at least 1"),
        ({"queries": ["a"], "k": 0}, "k"),
        ({"queries": ["a"], "k": 10**30}, "k must be at most"),
        ({"queries": ["a"], "budget": [1]}, "budget"),
        ({"queries": ["a"], "budget": [999, 1]}, "at most"),
        ({"queries": ["a"], "budget": [1, 999]}, "vectors"),
        ({"queries": ["a"], "where": {"page": {"$near": 1}}}, r"\$near"),
        ({"queries": ["a"] * 5}, "4 inputs"),
        ({"queries": [{}]}, "neither"),
        ({"queries": ["\ud800"]}, ""),
        ({"queries": ["a" * 100_001]}, "characters"),
        ({"queries": [{"image": [picture("red")] * 9}]}, "pictures"),
        ({"queries": [{"image": picture("red", (200, 200))}]}, "pixels"),
        ({"queries": [{"video": "x.mp4"}]}, "video"),
        ({"queries": ["a"], "budge": [1, 1]}, "budge"),
        ({}, ""),
    ],
)
def test_a_bad_request_is_answered_with_a_sentence(client, body, reason):
    answer = client.post("/search", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert reason.replace("\\", "") in answer.json()["error"]


def test_a_body_over_the_limit_is_refused(store, encoder):
    with TestClient(server.create_app(store, encoder, limits=server.Limits(body_bytes=1000))) as client:
        answer = client.post("/search", json={"queries": ["a" * 1000]})
    assert (answer.status_code, answer.text) == (413, "Content Too Large")


def test_everything_but_health_needs_the_key(store, encoder):
    with TestClient(server.create_app(store, encoder, api_key="s3cret")) as client:
        ask(client, "/health", method="GET")
        for path in ("/metrics", "/openapi.json", "/documents/a"):
            ask(client, path, 401, method="GET")
        ask(client, "/search", 401, queries=["a"])
        client.headers["Authorization"] = "Bearer wrong"
        ask(client, "/search", 401, queries=["a"])
        client.headers["Authorization"] = "Bearer s3cret"
        assert ask(client, "/search", queries=["a"])["results"]


def test_a_read_only_server_changes_nothing(store, encoder):
    with TestClient(server.create_app(store, encoder, read_only=True)) as client:
        ask(client, "/documents", 405, documents=[{"id": "d", "input": "x"}])
        ask(client, "/documents/delete", 405, ids=["a"])
        assert sorted(store.ids) == sorted(TEXTS)


def test_deleting_needs_a_choice(client, store):
    for body in ({}, {"ids": ["a"], "where": {"page": 1}}, {"where": {}}):
        answer = client.post("/documents/delete", json=body)
        assert answer.status_code == 400, answer.text
    assert len(store) == 3


def test_a_page_of_another_name_cannot_reach_a_server_on_loopback(store, encoder):
    app = server.create_app(store, encoder, hosts=["localhost", "127.0.0.1"])
    with TestClient(app, base_url="http://evil.example") as client:
        assert client.get("/health").status_code == 400


def test_a_late_answer_is_a_timeout(store, encoder, monkeypatch):
    monkeypatch.setattr(store, "search", lambda *a, **k: time.sleep(0.3))
    with TestClient(server.create_app(store, encoder, limits=server.Limits(seconds=0.1))) as client:
        assert "0.1 seconds" in ask(client, "/search", 504, queries=["a"])


def test_metrics_count_requests_and_documents(client):
    ask(client, "/search", queries=["a"])
    ask(client, "/nothing", 404, method="GET")
    text = client.get("/metrics").text
    assert 'metaembed_requests_total{path="/search",status="200"} 1.0' in text
    assert 'metaembed_requests_total{path="other",status="404"} 1.0' in text
    assert "metaembed_documents 3.0" in text


def test_openapi_describes_the_routes(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/health",
        "/metrics",
        "/encode",
        "/search",
        "/documents",
        "/documents/{id}",
        "/documents/delete",
    }


def test_others_are_served_only_with_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv(server.API_KEY, raising=False)
    for host in ("0.0.0.0", "::", "example.com"):
        with pytest.raises(ValueError, match=server.API_KEY):
            server.serve(tmp_path, host=host)


SERVE = """
import sys, time
from metaembed import MetaEmbedModel, MultiVectorIndex
from metaembed.app import server
from metaembed.app.encoder import Encoder

class Slow(server.Batcher):
    async def encode(self, key, inputs):
        print("accepted", flush=True)
        return await super().encode(key, inputs)

class Fake:
    name, dim, query_vectors, document_vectors, budgets = "fake", 4, 2, 2, [(1, 1), (2, 2)]
    ordered, takes_images = True, False
    def encode_queries(self, inputs, num_meta=None):
        import torch
        time.sleep(1)
        return torch.ones(len(inputs), num_meta or 2, 4)
    encode_documents = encode_queries

server.Batcher = Slow
server.load_encoder = lambda *args, **kwargs: Fake()
server.serve(sys.argv[1], port=int(sys.argv[2]), model="fake")
"""


def test_sigterm_finishes_what_was_accepted(tmp_path):
    MultiVectorIndex.create(tmp_path / "index", 2, 4, "float32").close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, str(tmp_path / "index"), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                deadline = time.monotonic() + 60
                while True:
                    try:
                        client.get("/health")
                        break
                    except httpx.ConnectError:
                        assert time.monotonic() < deadline
                        time.sleep(0.05)
                answers = []
                body = {"documents": [{"id": "late", "input": "text"}]}
                thread = threading.Thread(target=lambda: answers.append(client.post("/documents", json=body)))
                thread.start()
                assert "accepted\n" in iter(process.stdout.readline, "")  # behind what uvicorn says
                os.kill(process.pid, signal.SIGTERM)
                thread.join(30)
            assert answers[0].status_code == 201
            process.wait(30)
        finally:
            process.kill()
    assert "late" in MultiVectorIndex.open(tmp_path / "index")
