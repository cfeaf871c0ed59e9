"""Loads a plain backbone with its processor, completely or not at all, and makes room for Meta Tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_MAPPING,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..loading_metaembed import HUB_ARGUMENTS, check_loading, headless, load_plain_model, resize_embedding


def load_backbone(source: Any, **kwargs: Any) -> tuple[PreTrainedModel, Any, set[str]]:
    """Load a backbone and its processor.

    Args:
        source: Hub id or folder of a plain backbone, of one with a head, or of a late-interaction retriever.
        **kwargs: For `from_pretrained` of the model; those that say where to load from apply to the processor too.

    Returns:
        The model, of which [`headless`] is the backbone, its processor (or tokenizer), and the names of backbone
        weights that the checkpoint lacks: allowed only if the embedding does not depend on them.

    Raises:
        ValueError: If a weight has another shape than the checkpoint's, one of the checkpoint's belongs neither to
            the model nor to a head, or a weight of a retriever (such as its projection) is missing.
    """
    hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    model, missing, unexpected = load_plain_model(source, **kwargs)
    check_loading(source, {"unexpected_keys": outside_heads(unexpected, headless(model).config)})
    return model, AutoProcessor.from_pretrained(source, **hub), missing


def outside_heads(names: Iterable[str], config: PreTrainedConfig) -> set[str]:
    """Return those weights of a checkpoint that belong neither to its backbone nor to a head of it.

    Args:
        names: Names of weights that the backbone does not expect. What precedes a head's own name may be of an older
            transformers.
        config: The configuration of the backbone. It names the class that was saved.
    """
    rest = set(names)
    if not rest:
        return rest
    classes = [getattr(transformers, name, None) for name in config.architectures or []]
    mappings = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_PRETRAINING_MAPPING)
    classes += [mapping.get(type(config), None) for mapping in mappings]
    for cls in dict.fromkeys(classes):
        if cls is None or cls is MODEL_MAPPING.get(type(config), None):
            continue
        with torch.device("meta"):
            model = cls(config)
        inside = tuple(f"{name}." for name, module in model.named_modules() if module is headless(model) and name)
        ends = tuple(f".{name}" for name in model.state_dict() if not name.startswith(inside))
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        rest = {
            name
            for name in rest
            if not f".{name}".endswith(ends) and not any(re.search(pattern, name) for pattern in ignored)
        }
    return rest


def grow_embedding(backbone: PreTrainedModel, token_ids: list[int], vocabulary: int, seed: int) -> None:
    """Give every Meta Token its own row in the backbone's input embedding.

    The rows are drawn from a normal distribution with the mean and standard deviation, per dimension, of the rows of
    the other tokens: so they have the scale of the backbone's embeddings, and all differ.

    Args:
        backbone: Changed in place; its embedding grows if the tokens do not fit its spare rows.
        token_ids: Ids of the Meta Tokens, the last ones of the vocabulary.
        vocabulary: Number of tokens before the Meta Tokens, whose rows are trained.
        seed: Seed of the draw.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # for other tables of some backbones, which grow too
        resize_embedding(backbone, token_ids[-1])
    with torch.no_grad():
        weight = backbone.get_input_embeddings().weight
        known = weight[:vocabulary].float()  # [vocabulary, hidden]
        shape, generator = (len(token_ids), weight.shape[1]), torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(
            shape, generator=generator, dtype=torch.float32, device="cpu"
        )  # for any default dtype and device
        drawn = known.mean(dim=0) + known.std(dim=0) * noise.to(weight.device)
        weight[token_ids[0] : token_ids[-1] + 1] = drawn.to(weight.dtype)
