"""`from_backbone` does not change its arguments, and creates a model of the class it was called on."""

import pytest
import torch
from conformance import fork, load
from tiny import build
from transformers import PreTrainedModel

from metaembed import MetaEmbedModel
from metaembed.backbones.create import from_backbone

SIZES = dict(num_query_tokens=2, num_document_tokens=4)


def test_a_subclass_creates_its_own_kind():
    class Mine(MetaEmbedModel):
        pass

    backbone, processor = build("bert")
    assert type(Mine.from_backbone(backbone, processor=processor, **SIZES)) is Mine


def test_the_class_in_a_checkpoints_own_files_creates_an_installed_model():
    """It may be of another version than the installed code that creates the model."""

    class MetaEmbedModelOfAnotherVersion(PreTrainedModel):
        pass

    backbone, processor = build("bert")
    model = from_backbone(MetaEmbedModelOfAnotherVersion, backbone, processor=processor, **SIZES)
    assert type(model) is MetaEmbedModel
    assert torch.equal(model.encode_documents("a red apple"), load("bert").encode_documents("a red apple"))


def test_the_callers_processor_and_the_random_state_are_unchanged():
    backbone, processor = build("qwen2_5_vl")
    size, state = len(processor.tokenizer), torch.get_rng_state()
    model = MetaEmbedModel.from_backbone(backbone, processor=processor, embedding_dim=24, **SIZES)
    assert len(processor.tokenizer) == size and len(model.processor.tokenizer) == size + 6
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_a_metaembed_model_cannot_be_a_backbone():
    model = fork("bert")
    with pytest.raises(ValueError, match=r"the tokenizer already has Meta Tokens .*from_pretrained"):
        MetaEmbedModel.from_backbone(model.backbone, processor=model.processor.backbone_processor, **SIZES)
