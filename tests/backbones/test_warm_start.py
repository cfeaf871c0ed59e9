"""A trained retriever is a backbone too: its weights are kept, and its projection where the shapes fit."""

import copy
import functools

import pytest
import torch
from conformance import picture
from safetensors.torch import load_file, save_file
from test_backbones import NAMED
from tiny import build
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    ColPaliConfig,
    ColPaliForRetrieval,
    ColPaliProcessor,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    ColQwen2Processor,
)

from metaembed import MetaEmbedModel
from metaembed.backbones.loading import load_backbone
from metaembed.loading_metaembed import headless

RETRIEVERS = {
    "colqwen2": ("qwen2_vl", ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor),
    "colpali": ("paligemma", ColPaliConfig, ColPaliForRetrieval, ColPaliProcessor),
}


@functools.cache
def retriever_of(name):
    """A retriever, its processor, and the plain processor of its backbone. Copy them to change them."""
    model_type, config_class, model_class, processor_class = RETRIEVERS[name]
    backbone, processor = build(model_type)
    retriever = model_class(config_class(vlm_config=backbone.config, embedding_dim=24)).eval()
    retriever.vlm.load_state_dict(backbone.state_dict())
    return retriever, processor_class(processor.image_processor, processor.tokenizer), processor


def save_retriever(name, folder):
    retriever, processor, _ = retriever_of(name)
    retriever.save_pretrained(folder)
    processor.save_pretrained(folder)
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


def test_a_loaded_model_with_a_head_gives_its_backbone():
    retriever, _, processor = copy.deepcopy(retriever_of("colqwen2"))
    model = MetaEmbedModel.from_backbone(retriever, processor=processor, embedding_dim=24)
    assert model.backbone is retriever.vlm
    assert torch.equal(model.projection.weight, retriever.embedding_proj_layer.weight)


def test_only_weights_that_no_row_depends_on_may_be_missing(tmp_path):
    """A checkpoint of a masked language model has no pooler, but the base model class has one."""
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


HEADED = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
)


def save_with_head(name, folder):
    """Save a checkpoint like published ones: the backbone with its head, with untied weights."""
    backbone, processor = build(name)
    cls = next(mapping[type(backbone.config)] for mapping in HEADED if type(backbone.config) in mapping)
    for config in (backbone.config, backbone.config.get_text_config()):
        config.tie_word_embeddings = False
    headed = backbone if type(backbone) is cls else cls(backbone.config)
    assert not headless(headed).load_state_dict(backbone.state_dict(), strict=False).missing_keys
    headed.save_pretrained(folder)
    processor.save_pretrained(folder)
    return backbone


def change_weights(folder, drop=(), **more):
    state = load_file(folder / "model.safetensors")
    state = {name: value for name, value in state.items() if name not in drop}
    save_file({**state, **more}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", NAMED)
def test_a_full_checkpoint_gives_its_backbone_and_a_stray_weight_is_an_error(name, tmp_path):
    kept = save_with_head(name, tmp_path).state_dict()
    backbone, _, missing = load_backbone(tmp_path)
    assert all(key.startswith("pooler.") for key in missing)  # a masked language model has none
    for key, value in headless(backbone).state_dict().items():
        assert key in missing or torch.equal(value, kept[key]), key
    change_weights(tmp_path, **{"stray.layer.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"1 weights are unexpected, so lost: stray\.layer\.weight"):
        load_backbone(tmp_path)


def test_a_layer_beyond_those_of_the_configuration_is_an_error(tmp_path):
    save_with_head("qwen2_vl", tmp_path)
    name = next(name for name in load_file(tmp_path / "model.safetensors") if "layers.1.mlp.up_proj" in name)
    change_weights(tmp_path, **{name.replace("layers.1", "layers.2"): torch.zeros(64, 32)})
    with pytest.raises(ValueError, match=r"unexpected.*layers\.2\.mlp\.up_proj"):
        MetaEmbedModel.from_backbone(tmp_path)


def test_buffers_of_old_checkpoints_are_ignored(tmp_path):
    save_with_head("llama", tmp_path)
    change_weights(tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert not load_backbone(tmp_path)[2]


def test_a_head_that_the_checkpoint_does_not_name_is_ignored(tmp_path):
    """As in bert-base-uncased: saved from pretraining, named after the masked language model."""
    backbone, tokenizer = build("bert")
    backbone.config.architectures = ["BertForMaskedLM"]
    backbone.config.save_pretrained(tmp_path)
    state = BertForPreTraining(backbone.config).state_dict()
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "model.safetensors")
    tokenizer.save_pretrained(tmp_path)
    assert not load_backbone(tmp_path)[2]


@pytest.mark.parametrize("name", RETRIEVERS)
def test_a_retriever_without_its_projection_is_an_error(name, tmp_path):
    save_retriever(name, tmp_path)
    change_weights(tmp_path, drop=["embedding_proj_layer.weight"])
    with pytest.raises(ValueError, match=r"missing.*embedding_proj_layer\.weight"):
        MetaEmbedModel.from_backbone(tmp_path, num_query_tokens=2, num_document_tokens=4, embedding_dim=24)


@pytest.mark.parametrize("name", RETRIEVERS)
def test_a_stray_weight_of_a_retriever_is_an_error_and_its_language_head_is_none(name, tmp_path):
    save_retriever(name, tmp_path)
    change_weights(tmp_path, **{"vlm.lm_head.weight": torch.zeros(434, 32)})  # older versions wrote it
    load_backbone(tmp_path)
    change_weights(tmp_path, **{"custom_text_proj.weight": torch.zeros(24, 32)})
    with pytest.raises(ValueError, match=r"unexpected.*custom_text_proj\.weight"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("headed", [True, False])
def test_a_single_vector_retriever_keeps_every_weight(headed, tmp_path):
    """As Qwen3-VL-Embedding is published: a vision-language model, trained on, under its own class."""
    if headed:
        backbone = save_with_head("qwen3_vl", tmp_path)
    else:
        backbone, processor = build("qwen3_vl")
        backbone.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    model = MetaEmbedModel.from_backbone(tmp_path, num_query_tokens=2, num_document_tokens=4)
    kept = model.backbone.state_dict()
    for key, value in backbone.state_dict().items():
        assert torch.equal(kept[key][: len(value)], value), key


@pytest.mark.parametrize("keyword", [{"num_query_token": 3}, {"dtype": torch.bfloat16}, {"revision": "main"}])
def test_a_loading_keyword_with_a_loaded_backbone_is_an_error(keyword):
    backbone, processor = build("qwen3")
    with pytest.raises(TypeError, match=next(iter(keyword))):
        MetaEmbedModel.from_backbone(backbone, processor=processor, **keyword)


def test_an_unknown_keyword_is_an_error_for_a_folder_too(tmp_path):
    backbone, processor = build("qwen3")
    backbone.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="num_query_token"):
        MetaEmbedModel.from_backbone(tmp_path, num_query_token=3)
