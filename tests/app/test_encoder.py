"""One face for the models of an index: MetaEmbed's, and any multi-vector model."""

import pytest
import torch
from conftest import build_bert

from metaembed import InputPolicy, MultiVectorIndex
from metaembed.app.encoder import load_encoder

TEXTS = ["a red apple", "a blue rocket over the yellow moon", "what is on the table?"]


@pytest.fixture(scope="module")
def colbert(tmp_path_factory):
    """A saved multi-vector model of a text backbone, with the encoder that made it."""
    from sentence_transformers import MultiVectorEncoder

    folder = tmp_path_factory.mktemp("colbert")
    backbone, tokenizer = build_bert()
    backbone.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    encoder = MultiVectorEncoder(str(folder / "backbone"), device="cpu")
    encoder.save_pretrained(str(folder / "model"))
    return encoder, folder


def test_a_metaembed_model_encodes_as_it_does_itself(qwen, mixed):
    encoder = load_encoder(qwen)
    assert encoder.ordered and encoder.takes_images and encoder.budgets[-1] == (16, 64)
    assert torch.equal(encoder.encode_documents(mixed), qwen.encode_documents(mixed))
    assert torch.equal(encoder.encode_queries("a cat", num_meta=4), qwen.encode_queries("a cat", num_meta=4))
    assert encoder.encode_documents([]).shape == (0, 64, encoder.dim)


def test_other_models_score_as_they_do_themselves_when_nothing_is_pooled(colbert):
    encoder = load_encoder(str(colbert[1] / "model"), device="cpu")
    assert not encoder.ordered and not encoder.takes_images and encoder.budgets[-1] == (32, 64)
    queries = encoder.encode_queries(TEXTS)
    assert queries.shape == (3, 32, encoder.dim)
    own = colbert[0].encode_document(TEXTS)
    index = MultiVectorIndex.create(None, vectors=64, dim=encoder.dim, quantization="float32")
    index.add([torch.cat([one, one[-1:].expand(64 - len(one), -1)]) for one in own], ids=list("abc"))
    found = index.search(queries, k=3)
    expected = colbert[0].similarity(colbert[0].encode_query(TEXTS), own).cpu()
    order = [["abc".index(i) for i in ids] for ids in found.ids]
    assert torch.allclose(found.scores, expected.gather(1, torch.tensor(order)).float(), atol=1e-4)


def test_prefixes_of_other_models_are_ordered_summaries(colbert):
    encoder = load_encoder(str(colbert[1] / "model"), device="cpu")
    documents = encoder.encode_documents(TEXTS, num_meta=8)
    assert torch.allclose(documents[:, :4], encoder.encode_documents(TEXTS, num_meta=4), atol=1e-5)
    assert torch.allclose(documents.norm(dim=-1), torch.ones(3, 8), atol=1e-5)
    assert encoder.encode_queries(TEXTS, num_meta=2).shape == (3, 2, encoder.dim)


def test_a_text_that_looks_like_a_url_is_text(colbert):
    encoder = load_encoder(str(colbert[1] / "model"), device="cpu")
    encoder.policy = InputPolicy.server()
    assert encoder.encode_queries("http://127.0.0.1:1/x.png").shape == (32, encoder.dim)


def test_a_backbone_without_trained_vectors_is_refused(colbert):
    with pytest.raises(ValueError, match="neither a MetaEmbed checkpoint nor a multi-vector model"):
        load_encoder(str(colbert[1] / "backbone"))


def test_bad_numbers_and_inputs_are_errors(qwen):
    encoder = load_encoder(qwen)
    with pytest.raises(ValueError, match="from 1 to 16, not 17"):
        encoder.encode_queries("a", num_meta=17)
    with pytest.raises(ValueError, match="policy"):
        encoder.policy, before = InputPolicy.server(), encoder.policy
        try:
            encoder.encode_queries({"image": "/etc/hostname"})
        finally:
            encoder.policy = before
