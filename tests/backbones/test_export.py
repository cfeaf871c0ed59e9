"""The export of a model as its plain backbone: transformers, stock modules and a client get its vectors."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
import torch
from conformance import picture
from PIL import Image
from sentence_transformers import MultiVectorEncoder
from serve_vllm import VllmClient
from test_docs import run_blocks
from tiny import build
from tiny_models import tiny_model
from transformers import AutoModel, AutoProcessor

from metaembed import MetaEmbedModel, lora_config
from metaembed.backbones.export import export_backbone

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "a red apple"}]}]


@pytest.fixture(scope="module")
def model():
    model = tiny_model(embedding_dim=16, query_instruction="find this \U0001f34e QUERY")
    torch.nn.init.normal_(model.projection.bias)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return export_backbone(model, tmp_path_factory.mktemp("export") / "plain")


def inputs():
    return ["a red boat", picture(0), {"image": [picture(1), picture(2)], "text": "two cats"}, "a cat"]


def test_the_folder_holds_no_code(folder):
    assert not list(folder.rglob("*.py"))
    assert not [path for path in folder.rglob("*.json") if "auto_map" in path.read_text()]


def test_transformers_alone_gives_the_embeddings(tmp_path):
    """Without a projection, the last hidden states of the native class at the Meta Tokens are all there is."""
    model = tiny_model()
    folder = export_backbone(model, tmp_path / "plain")
    backbone, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(backbone) is type(model.backbone) and not any(info.values())
    processor = AutoProcessor.from_pretrained(folder)
    for side, encode in (("query", model.encode_queries), ("document", model.encode_documents)):
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "task": side, "num_meta": 3}
        features = processor.apply_chat_template(MESSAGES, **options)
        with torch.no_grad():
            rows = backbone(**features).last_hidden_state[0, -3:]
        torch.testing.assert_close(torch.nn.functional.normalize(rows, dim=-1), encode("a red apple", 3))


def test_stock_sentence_transformers_gives_the_embeddings(model, folder):
    encoder = MultiVectorEncoder(str(folder), device="cpu")
    assert all(type(module).__module__.startswith("sentence_transformers.") for module in encoder)
    sides = ((encoder.encode_query, model.encode_queries), (encoder.encode_document, model.encode_documents))
    for theirs, ours in sides:
        for found, expected in zip(theirs(inputs()), ours(inputs()), strict=True):
            torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-6, rtol=0)
        fewer = theirs(["a cat"], processing_kwargs={"chat_template": {"num_meta": 2}})[0]
        torch.testing.assert_close(torch.as_tensor(fewer), ours("a cat", 2), atol=1e-6, rtol=0)


def test_a_backbone_without_a_template_or_a_causal_mask(tmp_path):
    """BERT: what the tokenizer adds comes from the template, all Meta Tokens are appended, and vLLM is refused."""
    backbone, processor = build("bert")
    processor.chat_template = None
    model = MetaEmbedModel.from_backbone(backbone, processor=processor, num_query_tokens=2, num_document_tokens=4)
    with pytest.raises(ValueError, match="vllm=False"):
        export_backbone(model, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    folder = export_backbone(model, tmp_path / "plain", vllm=False)
    encoder = MultiVectorEncoder(str(folder), device="cpu")
    for theirs, ours in (
        (encoder.encode_query, model.encode_queries),
        (encoder.encode_document, model.encode_documents),
    ):
        torch.testing.assert_close(torch.as_tensor(theirs(["two cats"])[0]), ours("two cats"), atol=1e-6, rtol=0)


def test_what_cannot_be_exported_is_an_error(model, folder, tmp_path):
    with pytest.raises(ValueError, match="not an empty folder"):
        export_backbone(model, folder)
    other = tiny_model()
    other.add_adapter(lora_config(other))
    with pytest.raises(ValueError, match="merge_adapter"):
        export_backbone(other, tmp_path / "plain")
    other = tiny_model()
    other.config.traits.mixes_images = False
    with pytest.raises(ValueError, match="sentence_transformers=False"):
        export_backbone(other, tmp_path / "plain")
    other = tiny_model()
    other.processor.chat_template += (
        "{% if task is defined %}x{% endif %}"  # renders otherwise when it is told the side
    )
    with pytest.raises(ValueError, match="other token ids"):
        export_backbone(other, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_the_template_refuses_what_it_does_not_know(folder):
    processor = AutoProcessor.from_pretrained(folder)
    for options in ({"task": "queries"}, {"task": "query", "num_meta": 5}, {"task": "query", "num_meta": 0}):
        with pytest.raises(Exception, match=r"task must be|num_meta must be"):
            processor.apply_chat_template(MESSAGES, tokenize=False, **options)


@pytest.fixture
def server(model, folder):
    """A stand-in for vLLM: the same requests and answers, by transformers and stock sentence-transformers."""
    encoder = MultiVectorEncoder(str(folder), device="cpu")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["task"] == "token_embed" and body["encoding_format"] == "base64"
            if "refuse" in json.dumps(body["messages"]):
                self.send_error(400, "refused")
                return
            content = body["messages"][0]["content"]
            for part in content if isinstance(content, list) else ():
                if part["type"] == "image_url":
                    data = part.pop("image_url")["url"].split("base64,")[1]
                    part |= {"type": "image", "image": Image.open(BytesIO(base64.b64decode(data)))}
            content = [{"type": "text", "text": content}] if isinstance(content, str) else content
            features = encoder[0].processor.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **body["chat_template_kwargs"],
            )
            with torch.no_grad():
                vectors = encoder[1]({"token_embeddings": encoder[0].model(**features).last_hidden_state})
            rows = vectors["token_embeddings"][0].numpy().astype("<f4")
            answer = {
                "data": [{"data": base64.b64encode(rows.tobytes()).decode()}],
                "usage": {"prompt_tokens": len(rows)},
            }
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_client_of_a_server_gives_the_embeddings(model, folder, server):
    client = VllmClient(server, folder)
    items = [*inputs(), "what is <|meta_query_1|> and <|image_pad|>?"]
    for theirs, ours in (
        (client.encode_queries, model.encode_queries),
        (client.encode_documents, model.encode_documents),
    ):
        for num_meta in (None, 2):
            np.testing.assert_allclose(theirs(items, num_meta), ours(items, num_meta).numpy(), atol=1e-6)
    assert client.encode_queries([]).shape == (0, 4, 16)


def test_the_client_refuses_bad_input(folder, server):
    client = VllmClient(server, folder)
    with pytest.raises(ValueError, match="between 1 and 4"):
        client.encode_queries(["a"], 5)
    with pytest.raises(TypeError, match="must be a list"):
        client.encode_queries("a")
    with pytest.raises(TypeError, match="keys 'text' and 'image'"):
        client.encode_queries([{"video": "a.mp4"}])
    with pytest.raises(ValueError, match="may take for a special token"):
        client.encode_queries(["<\uff5cimage_pad\uff5c>"])
    with pytest.raises(ValueError, match="refused"):
        client.encode_queries(["refuse"])
    client.meta["dim"] = 8
    with pytest.raises(ValueError, match="16 dimensions instead of 8"):
        client.encode_queries(["a"])


def test_special_tokens_of_the_description_are_the_processor_s(model, folder):
    strings = json.loads((folder / "meta_tokens.json").read_text())["special_tokens"]
    assert {"<|image_pad|>", "<|meta_query_0|>", "<|meta_document_7|>"} <= set(strings)
    assert re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True)))).pattern.count("meta_") == 12


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = tiny_model(num_query_tokens=16)
    names = run_blocks("export.md", model=plain)
    expected = plain.encode_queries(["a red apple"])
    torch.testing.assert_close(names["vectors"], expected, atol=1e-6, rtol=0)
