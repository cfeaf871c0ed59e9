"""The retrievers for other libraries find what the store finds."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from metaembed.stores import create_store

ROOT = Path(__file__).parents[2].resolve()
TEXTS = ["a red apple", "a blue rocket", "the yellow moon", "a cat face", "a birthday cake"]


@pytest.fixture(scope="module")
def pages(qwen):
    store = create_store(None, 8, qwen.config.hidden_size, quantization="float32")
    embeddings = qwen.encode_documents(TEXTS, num_meta=8)
    store.add(embeddings, [f"p{i}" for i in range(5)], [{"text": t, "page": i} for i, t in enumerate(TEXTS)])
    return store


def expected(qwen, pages, k, budget, **search):
    return pages.search(qwen.encode_queries("a rocket", num_meta=budget[0]), k, budget, **search)


def test_langchain(qwen, pages):
    pytest.importorskip("langchain_core", reason="langchain-core is not installed")
    from langchain_retriever import MetaEmbedRetriever

    retriever = MetaEmbedRetriever(model=qwen, store=pages, k=3, budget=(2, 4))
    hits, found = expected(qwen, pages, 3, (2, 4)), retriever.invoke("a rocket")
    assert [d.id for d in found] == hits.ids[0]
    assert [d.page_content for d in found] == [metadata["text"] for metadata in hits.metadata[0]]
    assert [d.metadata["score"] for d in found] == hits.scores[0].tolist()
    assert [d.id for d in retriever.invoke("a rocket", k=1, where={"page": 3})] == ["p3"]


def test_llama_index(qwen, pages, pictures, tmp_path):
    pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")
    from llama_index.core.schema import QueryBundle
    from llama_index_retriever import MetaEmbedRetriever

    retriever = MetaEmbedRetriever(qwen, pages, k=3, budget=(2, 4))
    hits, found = expected(qwen, pages, 3, (2, 4)), retriever.retrieve("a rocket")
    assert [node.node_id for node in found] == hits.ids[0] and [node.score for node in found] == hits.scores[
        0
    ].tolist()
    assert found[0].text == hits.metadata[0][0]["text"]
    pictures[0].save(tmp_path / "picture.png")
    asked = QueryBundle("this", image_path=str(tmp_path / "picture.png"))
    query = qwen.encode_queries({"text": "this", "image": pictures[0]}, num_meta=2)
    assert [node.node_id for node in retriever.retrieve(asked)] == pages.search(query, 3, (2, 4)).ids[0]


def test_haystack(qwen, pages):
    haystack = pytest.importorskip("haystack", reason="haystack-ai is not installed")
    from haystack_retriever import MetaEmbedRetriever

    pipeline = haystack.Pipeline()
    pipeline.add_component("retriever", MetaEmbedRetriever(qwen, pages, k=3, budget=(2, 4)))
    asked = {"query": "a rocket", "where": {"page": {"$gt": 1}}}
    found = pipeline.run({"retriever": asked})["retriever"]["documents"]
    hits = expected(qwen, pages, 3, (2, 4), where={"page": {"$gt": 1}})
    assert [d.id for d in found] == hits.ids[0] and [d.score for d in found] == hits.scores[0].tolist()
    assert [d.content for d in found] == [metadata["text"] for metadata in hits.metadata[0]]


def test_lancedb(tmp_path):
    lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed")
    from lancedb_search import make_table, search

    x = normalize(torch.randn(200, 6, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    store = create_store(None, 6, 16, quantization="float32")
    store.add(x, [f"it's {i}" for i in range(200)])
    table = make_table(lancedb.connect(tmp_path), "pages", x, store.ids)
    query = normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    for keep in (200, 20):
        expected = store.search(query, k=5, stages=[((1, 1), keep)])
        assert [row["id"] for row in search(table, query, k=5, keep=keep)] == expected.ids[0]
    only = search(table, query, k=5, where="id IN ('it''s 3', 'it''s 4')")
    assert sorted(row["id"] for row in only) == ["it's 3", "it's 4"]
