"""`from_backbone` does not change its arguments, and creates a model of the class it was called on."""

import copy
import warnings

import pytest
import torch
from conformance import fork, load
from tiny import build
from transformers import PreTrainedModel

from metaembed import CachedMMRLoss, MetaEmbedModel, to_multi_vector_encoder
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


def told(calls):
    """Return how often the calls said that the model is untrained."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return sum("is untrained" in str(warning.message) for warning in caught)


def test_a_model_just_made_says_once_that_it_is_untrained(tmp_path):
    backbone, processor = build("bert")
    model = MetaEmbedModel.from_backbone(backbone, processor=processor, **SIZES)
    other = copy.deepcopy(model)
    assert told([lambda: model.encode_queries("a"), lambda: model.encode_documents("a")]) == 1
    assert told([lambda: to_multi_vector_encoder(other).encode_query(["a"])]) == 1
    model.save_pretrained(tmp_path)
    assert told([lambda: MetaEmbedModel.from_pretrained(tmp_path).encode_queries("a")]) == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_trains_does_not_say_that_it_is_untrained(compiled):
    backbone, processor = build("bert")
    encoder = to_multi_vector_encoder(MetaEmbedModel.from_backbone(backbone, processor=processor, **SIZES))
    encoder.train()
    columns = [encoder.preprocess(["a red apple", "a cat"], task=side) for side in ("query", "document")]
    if compiled:
        torch.compiler.reset()
        forward = torch.compile(encoder[0].model, fullgraph=True, backend="eager")
        train = [lambda: forward(**columns[0]).embeddings.sum().backward()]
    else:  # its first pass is without gradients
        train = [lambda: sum(CachedMMRLoss(encoder, mini_batch_size=1)(columns, None).values()).backward()]
    assert told([*train, lambda: encoder.encode_query(["a"])]) == 0


def test_a_model_just_made_is_compiled_and_exported_whole():
    backbone, processor = build("bert")
    model = MetaEmbedModel.from_backbone(backbone, processor=processor, **SIZES)
    inputs = {**model.processor.process_queries(["a red apple"]), "num_meta": 2}
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(**inputs).embeddings
        exported = torch.export.export(model, (), inputs).module()(**inputs).embeddings
    assert torch.equal(compiled, exported)
    assert told([lambda: model.encode_queries("a")]) == 1
