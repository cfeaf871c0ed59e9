"""The full dial: one encoding gives Meta Token vectors and token vectors, at every entry point, or none as before."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from tiny_models import WORDS, picture, tiny_model

from metaembed import MetaEmbedModel, maxsim
from metaembed.evaluation.budgets import BudgetEvaluator
from metaembed.retrieval.pooling import pool
from metaembed.sentence_metaembed import to_multi_vector_encoder
from metaembed.training.lora import lora_config

DOCUMENTS = ["red", {"image": picture(1, 48, 32)}, {"text": "a cat", "image": picture(2)}, " ".join(WORDS), ""]
QUERIES = ["cat", "red apple boat", "blue"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(token_projection=True)


@pytest.fixture(scope="module")
def plain():
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    model.save_pretrained(path := tmp_path_factory.mktemp("dial") / "model")
    return path


def own_tokens(model, side, item):
    """The vectors of an input's own tokens, from the backbone's hidden states."""
    features = model.processor.process([item], side)
    ids = features["input_ids"][0]
    with torch.no_grad():
        hidden = model.backbone(**features).last_hidden_state[0]
        vectors = torch.nn.functional.normalize(model.token_projection(hidden), dim=-1)
    tokens = model.processor.tokenizer.convert_ids_to_tokens(ids)
    end = max(i for i, token in enumerate(tokens) if token == "<|im_end|>")
    return vectors[tokens.index("\u010a") + 1 : end]  # after "<|im_start|>user\n"


@pytest.mark.parametrize("batch_size", [1, 5])
def test_one_encoding_gives_meta_tokens_and_the_inputs_own_tokens(model, batch_size):
    documents = model.encode_documents(DOCUMENTS, tokens=True, batch_size=batch_size)
    torch.testing.assert_close(documents.meta, model.encode_documents(DOCUMENTS), atol=1e-6, rtol=0)
    lengths = []
    for item, rows in zip(DOCUMENTS[:4], documents.tokens, strict=False):
        expected = own_tokens(model, "document", item)
        lengths.append(len(expected))
        # Repeated to the length of the longest, which changes no score.
        filled = expected[torch.arange(len(rows)) % len(expected)]
        torch.testing.assert_close(rows, filled, atol=1e-5, rtol=0)
    assert max(lengths) == documents.tokens.shape[1] and len(set(lengths)) > 1
    assert not documents.tokens[4].any()  # an empty text has no tokens of its own
    queries = model.encode_queries(QUERIES, tokens=True)
    for item, rows in zip(QUERIES, queries.tokens, strict=True):
        expected = own_tokens(model, "query", item)
        torch.testing.assert_close(rows[: len(expected)], expected, atol=1e-5, rtol=0)
        assert not rows[len(expected) :].any()


def test_fewer_meta_tokens_do_not_change_the_tokens(model):
    few, all_of_them = (model.encode_documents(DOCUMENTS, num_meta=r, tokens=True) for r in (2, None))
    assert few.meta.shape[1] == 2
    torch.testing.assert_close(few.tokens, all_of_them.tokens, atol=1e-6, rtol=0)


def test_tokens_are_pooled_to_any_number_in_a_nested_order(model):
    whole, many, few = (model.encode_documents(DOCUMENTS[1:4], tokens=n).tokens for n in (True, 16, 3))
    assert many.shape[1] == 16 and torch.equal(many[:, :3], few)
    assert torch.equal(few[0], pool([own_tokens(model, "document", DOCUMENTS[1])], 3)[0].to(few)) or torch.allclose(
        few[0], pool([own_tokens(model, "document", DOCUMENTS[1])], 3)[0], atol=1e-5
    )
    assert model.encode_documents("red", tokens=16).tokens.shape == (16, 32)
    queries = model.encode_queries(QUERIES, tokens=2).tokens
    assert queries.shape[1] == 2 and not queries[0, 1].any(), "a query of one token counts it once"
    assert whole.shape[1] > 16


def test_a_score_is_by_matching_kinds_of_vectors(model):
    queries, documents = model.encode_queries(QUERIES, tokens=True), model.encode_documents(DOCUMENTS[:4], tokens=8)
    assert torch.equal(model.score(queries, documents, budget=(2, 4)), maxsim(queries.meta, documents.meta, (2, 4)))
    assert torch.equal(model.score(queries, documents), maxsim(queries.tokens, documents.tokens))
    expected = maxsim(queries.tokens, documents.tokens[:, :3])
    for backend in ("auto", "torch"):
        torch.testing.assert_close(model.score(queries, documents, tokens=3, backend=backend), expected)
    arrays = [type(side)(*(part.numpy() for part in side)) for side in (queries, documents)]
    torch.testing.assert_close(model.score(*arrays, tokens=3), expected)
    # What fills up to equal lengths changes no score.
    alone = torch.cat([model.encode_queries([query], tokens=True).tokens.sum(dim=1) for query in QUERIES])
    torch.testing.assert_close(queries.tokens.sum(dim=1), alone, atol=1e-5, rtol=0)
    for i, query in enumerate(QUERIES):
        for j, document in enumerate(DOCUMENTS[:4]):
            q, d = own_tokens(model, "query", query), own_tokens(model, "document", document)
            whole = model.score(queries, model.encode_documents(DOCUMENTS[:4], tokens=True))[i, j]
            torch.testing.assert_close(whole, (q @ d.T).amax(dim=1).sum(), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="asks for 9 document vectors; from 1 to 8"):
        model.score(queries, documents, tokens=9)


def test_one_input_none_and_numpy_keep_their_forms(model):
    one, none = model.encode_queries("red apple", tokens=True), model.encode_documents([], tokens=4)
    assert one.meta.shape == (4, 32) and one.tokens.ndim == 2
    assert none.meta.shape == (0, 8, 32) and len(none.tokens) == 0
    assert all(isinstance(part, np.ndarray) for part in model.encode_documents(["a"], tokens=4, convert_to_numpy=True))


def test_off_by_default_and_then_nothing_has_changed(model, plain):
    """A model with the projection embeds as one without, bit for bit; without it there is no new weight."""
    assert not plain.config.token_projection and plain.token_projection is None
    assert model.state_dict().keys() - plain.state_dict().keys() == {
        "token_projection.weight",
        "token_projection.bias",
    }
    for side in ("queries", "documents"):
        expected, actual = (getattr(each, f"encode_{side}")(DOCUMENTS) for each in (plain, model))
        assert type(actual) is torch.Tensor and torch.equal(actual, expected)
    with pytest.raises(ValueError, match="gives no vectors of tokens: from_backbone made it without token_projection"):
        plain.encode_documents(["a"], tokens=True)


@pytest.mark.parametrize("tokens", [-1, "all", 2.5])
def test_a_bad_number_of_tokens_is_named(model, tokens):
    with pytest.raises((TypeError, ValueError), match="tokens must be"):
        model.encode_documents(["a"], tokens=tokens)


def test_sentence_transformers_gives_the_same(model):
    encoder = to_multi_vector_encoder(model, device="cpu")
    for tokens in (True, 3):
        rows = encoder.encode_document(DOCUMENTS[:4], tokens=tokens)
        expected = model.encode_documents(DOCUMENTS[:4], tokens=tokens)
        for found, meta, own in zip(rows, *expected, strict=True):
            torch.testing.assert_close(found, torch.cat([meta, own])[: len(found)], atol=1e-6, rtol=0)
            assert 8 < len(found) <= 8 + len(own)
        queries = encoder.encode_query(QUERIES, tokens=tokens)
        expected = model.encode_queries(QUERIES, tokens=tokens)
        for found, meta, own in zip(queries, *expected, strict=True):
            torch.testing.assert_close(found, torch.cat([meta, own[own.any(dim=1)]]), atol=1e-6, rtol=0)


def test_groups_of_images_that_may_not_mix_keep_their_tokens(model):
    encoder = to_multi_vector_encoder(model, device="cpu")
    expected = encoder.encode_document(DOCUMENTS[:4], tokens=True)
    model.config.traits.mixes_images = False
    try:
        assert "groups" in encoder.preprocess(DOCUMENTS[:4], task="document")
        actual = encoder.encode_document(DOCUMENTS[:4], tokens=True)
    finally:
        model.config.traits.mixes_images = True
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_the_evaluator_continues_past_the_meta_tokens(model):
    encoder = to_multi_vector_encoder(model, device="cpu")
    queries = {f"q{i}": word for i, word in enumerate(WORDS[:5])}
    corpus = {
        f"d{i}": f"{word} {WORDS[i - 1]}" if i % 2 else {"image": picture(i), "text": word}
        for i, word in enumerate(WORDS)
    }
    relevant = {f"q{i}": {f"d{i}"} for i in range(5)}
    evaluator = BudgetEvaluator(queries, corpus, relevant, [(1, 1), (4, 8)], tokens=[2, True], corpus_chunk_size=6)
    results = evaluator(encoder)
    plain = BudgetEvaluator(queries, corpus, relevant, [(1, 1), (4, 8)])(encoder)
    assert all(results[name] == value for name, value in plain.items() if "x" in name)
    assert evaluator.primary_metric == "tokens_ndcg@10" and list(evaluator.token_metrics(results)) == [
        "tokens2",
        "tokens",
    ]
    q = model.encode_queries(list(queries.values()), tokens=True)
    for tokens, name in ((2, "tokens2"), (True, "tokens")):
        best = model.score(q, model.encode_documents(list(corpus.values()), tokens=tokens)).argmax(dim=1)
        found = (best == torch.arange(5)).double().mean().item()
        assert evaluator.token_metrics(results)[name]["accuracy@1"] == pytest.approx(found)


def test_a_configuration_that_does_not_fit_is_not_saved(model, tmp_path):
    model.config.token_projection = False
    try:
        with pytest.raises(ValueError, match="token_projection is False for a Linear"):
            model.save_pretrained(tmp_path)
    finally:
        model.config.token_projection = True


def test_an_adapter_holds_the_projection_of_the_tokens(folder, tmp_path):
    model = MetaEmbedModel.from_pretrained(folder)
    model.add_adapter(lora_config(model, r=2, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token_projection" in name and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    before = model.encode_documents(DOCUMENTS, tokens=True)
    assert (
        before.tokens - MetaEmbedModel.from_pretrained(folder).encode_documents(DOCUMENTS, tokens=True).tokens
    ).any()
    model.save_pretrained(tmp_path / "adapter")
    again = MetaEmbedModel.from_pretrained(tmp_path / "adapter").encode_documents(DOCUMENTS, tokens=True)
    for a, b in zip(again, before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


STRANGER = """
import sys
sys.modules["metaembed"] = None  # importing the package raises
import numpy as np
from sentence_transformers import MultiVectorEncoder
from transformers import AutoModel

folder, out = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
encoder = MultiVectorEncoder(folder, trust_remote_code=True)
items = ["red", "a cat on a boat"]
queries, documents = model.encode_queries(items, tokens=True), model.encode_documents(items, tokens=True)
rows = encoder.encode_document(items, tokens=True, convert_to_numpy=True)
try:
    model.encode_documents(items, tokens=2)
except ImportError as error:
    message = str(error)
np.savez(out, meta=documents.meta, tokens=documents.tokens, row=rows[1], scores=model.score(queries, documents),
         small=model.score(queries, documents, budget=(2, 4)), message=message)
"""


@pytest.mark.slow
def test_a_hub_copy_without_the_package_gives_all_tokens(model, folder, tmp_path, fresh_process):
    result = fresh_process("-c", STRANGER, folder, tmp_path / "out.npz", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found, items = np.load(tmp_path / "out.npz"), ["red", "a cat on a boat"]
    queries, documents = model.encode_queries(items, tokens=True), model.encode_documents(items, tokens=True)
    scores, small = model.score(queries, documents), model.score(queries, documents, budget=(2, 4))
    for name, expected in dict(meta=documents.meta, tokens=documents.tokens, scores=scores, small=small).items():
        np.testing.assert_allclose(found[name], expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(found["row"], torch.cat([documents.meta[1], documents.tokens[1]]).numpy(), atol=1e-5)
    assert "pip install metaembed" in str(found["message"])


def test_a_saved_model_loads_the_same(model, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["token_projection"] is True and config["template_tokens"] == model.config.template_tokens
    encoder = MultiVectorEncoder(str(folder), trust_remote_code=True, device="cpu")
    loaded, expected = MetaEmbedModel.from_pretrained(folder), model.encode_documents(DOCUMENTS, tokens=True)
    for again in (loaded, encoder[0].model):
        assert all(
            torch.equal(a, b) for a, b in zip(again.encode_documents(DOCUMENTS, tokens=True), expected, strict=True)
        )
