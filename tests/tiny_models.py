"""A tiny Qwen2.5-VL MetaEmbed model and small pictures, for the tests of training, saving and evaluation."""

import sys
from functools import cache
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from packaging.version import Version
from torch.distributed.fsdp import FSDPModule

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from tiny_backbone import build_backbone, build_processor
from tiny_pictures import picture  # noqa: F401

from metaembed import MetaEmbedModel
from metaembed.sentence_metaembed import to_multi_vector_encoder

ROOT = Path(__file__).parent.parent
WORDS = [
    *("red", "green", "blue", "apple", "boat", "cat", "dog", "egg"),
    *("fish", "goat", "hat", "ice", "jam", "key", "lamp", "moon"),
]

needs_fsdp2 = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.14") or not hasattr(FSDPModule, "set_reduce_scatter_unused_params"),
    reason="needs accelerate and torch with all of FSDP2",
)


@cache
def tiny_processor():
    return build_processor([" ".join(WORDS)] * 4)


def save_tiny_backbone(folder, **options):
    """Save a plain backbone with its processor, as a Hub repository would hold it."""
    build_backbone(tiny_processor(), **{"hidden_size": 32, "layers": 2, **options}).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def tiny_model(double=False, hidden_size=32, layers=2, **options):
    """A MetaEmbed model of 4 query and 8 document tokens, in evaluation mode."""
    options = {"num_query_tokens": 4, "num_document_tokens": 8, **options}
    backbone = build_backbone(tiny_processor(), hidden_size=hidden_size, layers=layers)
    model = MetaEmbedModel.from_backbone(backbone, processor=tiny_processor(), **options)
    return model.double() if double else model


def tiny_encoder(**options):
    return to_multi_vector_encoder(tiny_model(**options), device="cpu")


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# On the lowest supported versions, float64 gradients of the vision tower are rounded to float32 somewhere (8e-7 here).
EXACT = 1e-12 if Version(transformers.__version__) >= Version("5.23") else 5e-6


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys() and expected
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=EXACT, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
