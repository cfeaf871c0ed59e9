"""A trained retriever is a backbone too: its weights are kept, and its projection where the shapes fit."""

import pytest
import torch
from conformance import picture
from tiny import build
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ColPaliConfig,
    ColPaliForRetrieval,
    ColPaliProcessor,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    ColQwen2Processor,
)

from metaembed import MetaEmbedModel

RETRIEVERS = {
    "colqwen2": ("qwen2_vl", ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor),
    "colpali": ("paligemma", ColPaliConfig, ColPaliForRetrieval, ColPaliProcessor),
}


def save_retriever(name, folder):
    model_type, config_class, model_class, processor_class = RETRIEVERS[name]
    backbone, processor = build(model_type)
    retriever = model_class(config_class(vlm_config=backbone.config, embedding_dim=24)).eval()
    retriever.vlm.load_state_dict(backbone.state_dict())
    retriever.save_pretrained(folder)
    processor_class(processor.image_processor, processor.tokenizer).save_pretrained(folder)
    return retriever


@pytest.mark.parametrize("name", RETRIEVERS)
@pytest.mark.parametrize("embedding_dim", [24, 16, None])
def test_a_late_interaction_retriever_keeps_its_weights(name, embedding_dim, tmp_path):
    retriever = save_retriever(name, tmp_path)
    model = MetaEmbedModel.from_backbone(
        tmp_path, num_query_tokens=2, num_document_tokens=4, embedding_dim=embedding_dim
    )
    kept = dict(model.backbone.state_dict())
    for key, value in retriever.vlm.state_dict().items():
        assert torch.equal(kept[key][: len(value)] if value.ndim else kept[key], value), key
    if embedding_dim == 24:
        assert torch.equal(model.projection.weight, retriever.embedding_proj_layer.weight)
        assert torch.equal(model.projection.bias, retriever.embedding_proj_layer.bias)
    rows = model.encode_documents(["a red apple", {"image": picture(0), "text": "a green pear"}])
    assert rows.shape == (2, 4, embedding_dim or 32)
    model.save_pretrained(tmp_path / "saved")
    again = MetaEmbedModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.encode_documents("a red apple"), rows[0])


def test_a_loaded_model_with_a_head_gives_its_backbone(tmp_path):
    retriever = save_retriever("colqwen2", tmp_path)
    _, processor = build("qwen2_vl")
    model = MetaEmbedModel.from_backbone(retriever, processor=processor, embedding_dim=24)
    assert model.backbone is retriever.vlm
    assert torch.equal(model.projection.weight, retriever.embedding_proj_layer.weight)


def test_a_weight_that_no_row_depends_on_may_be_missing_and_no_other(tmp_path):
    """A checkpoint of a masked language model holds no pooler, which the headless class has."""
    _, processor = build("qwen2_vl")
    config = BertConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    masked = BertForMaskedLM(config)
    masked.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    MetaEmbedModel.from_backbone(tmp_path, num_query_tokens=2, num_document_tokens=4)
    state = masked.state_dict()
    del state["bert.encoder.layer.0.output.dense.weight"]
    masked.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"output\.dense\.weight"):
        MetaEmbedModel.from_backbone(tmp_path, num_query_tokens=2, num_document_tokens=4)
