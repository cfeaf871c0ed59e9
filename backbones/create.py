"""From a plain backbone to a MetaEmbed model that is ready to be trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PROCESSOR_MAPPING, AddedToken, AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from ..configuration_metaembed import SIDES, MetaEmbedConfig
from ..loading_metaembed import (
    HUB_ARGUMENTS,
    check_unused,
    commit_of,
    grow_embedding,
    headless,
    lasting_name,
    load_backbone,
)
from ..processing_metaembed import MetaEmbedProcessor, meta_token_names
from .probe import measure


def from_backbone(
    cls: Any,
    backbone: str | Path | PreTrainedModel,
    *,
    processor: Any = None,
    num_query_tokens: int = 16,
    num_document_tokens: int = 64,
    embedding_dim: int | None = None,
    budgets: list | None = None,
    document_sees_query_tokens: bool = False,
    query_instruction: str | None = None,
    document_instruction: str | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """Make a model of class `cls`: see [`MetaEmbedModel.from_backbone`]."""
    sizes = MetaEmbedConfig(  # raises before anything large is loaded
        num_query_tokens=num_query_tokens,
        num_document_tokens=num_document_tokens,
        embedding_dim=embedding_dim,
        budgets=budgets,
    )
    base_model = lasting_name(backbone) if isinstance(backbone, (str, Path)) else None
    missing: set[str] = set()
    if base_model is not None:
        backbone, loaded_processor, missing = load_backbone(backbone, **kwargs)
        processor = processor or loaded_processor
    elif not isinstance(backbone, PreTrainedModel):
        raise TypeError(f"backbone must be a Hub id, a folder or a loaded model, got {type(backbone).__name__}.")
    elif kwargs:
        raise TypeError(
            f"{', '.join(sorted(kwargs))}: from_backbone knows no such keywords of its own, and a loaded backbone "
            "is not loaded again. Load it with them, or give its Hub id or folder."
        )
    elif processor is None:
        raise ValueError("a loaded backbone comes without its processor: pass it as `processor`.")
    whole, backbone = backbone, headless(backbone)
    check_supported(backbone)
    processor = plain_processor(copy.deepcopy(processor), backbone)  # the caller's own is not changed
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabulary = len(tokenizer)
    ids = add_meta_tokens(tokenizer, num_query_tokens, num_document_tokens)
    flat = ids["query_token_ids"] + ids["document_token_ids"]
    grow_embedding(backbone, flat, vocabulary, seed)
    check_rebuilds(backbone)
    config = MetaEmbedConfig(
        num_query_tokens=num_query_tokens,
        num_document_tokens=num_document_tokens,
        embedding_dim=embedding_dim,
        budgets=sizes.budgets,
        document_sees_query_tokens=document_sees_query_tokens,
        query_instruction=query_instruction,
        document_instruction=document_instruction,
        base_model=base_model or backbone.config._name_or_path or None,
        **ids,
    )
    config.backbone_config = backbone.config  # set late: the constructor would reset its attention implementation
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config, backbone)
    if model.projection is not None:
        if trained := matching_projection(whole, backbone, embedding_dim):
            set_linear(model.projection, trained.weight, trained.bias)
        model.projection.to(backbone.device, backbone.dtype)
    model.config.dtype = backbone.dtype
    model.name_or_path = config.base_model or ""  # what peft writes into an adapter of its own
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    model.adapter_base = (config.base_model, commit_of(base_model, **hub))
    model.processor = MetaEmbedProcessor(processor, config)
    model.eval()
    rows = measure(backbone, model.embed, model.processor)
    check_unused(base_model, backbone, missing, rows)
    return model


def add_meta_tokens(tokenizer: PreTrainedTokenizerBase, num_query_tokens: int, num_document_tokens: int) -> dict:
    """Add the Meta Tokens to the vocabulary of `tokenizer`, query ones first.

    Args:
        tokenizer: Changed in place.
        num_query_tokens: R_q.
        num_document_tokens: R_c.

    Returns:
        `{"query_token_ids": [R_q ids], "document_token_ids": [R_c ids]}`, each contiguous.

    Raises:
        ValueError: If the tokenizer already holds Meta Tokens, or does not take new tokens as they are.
    """
    names = {
        "query": meta_token_names("query", num_query_tokens),
        "document": meta_token_names("document", num_document_tokens),
    }
    every = names["query"] + names["document"]
    vocabulary = tokenizer.get_vocab()
    if present := [name for name in every if name in vocabulary]:
        raise ValueError(
            f"the tokenizer already holds Meta Tokens ({present[0]}, ...): this is a MetaEmbed model already. "
            "Load it with MetaEmbedModel.from_pretrained, or pass its plain backbone."
        )
    # `add_tokens` and not `add_special_tokens`: some processors call the latter again later, which replaces the list.
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in every], special_tokens=True)
    ids = {f"{side}_token_ids": tokenizer.convert_tokens_to_ids(names[side]) for side in SIDES}
    flat = ids["query_token_ids"] + ids["document_token_ids"]
    if flat != list(range(flat[0], flat[0] + len(every))) or flat[0] in vocabulary.values():
        raise ValueError(f"{type(tokenizer).__name__} does not add new tokens as contiguous ids (got {flat}).")
    return ids


def check_supported(backbone: PreTrainedModel) -> None:
    """Raise, with the reason, if a model is not of a kind that can be a backbone.

    Raises:
        ValueError: If it is an encoder-decoder, or has no language model with a vocabulary.
    """
    name = type(backbone).__name__
    if backbone.config.is_encoder_decoder:
        raise ValueError(
            f"{name} cannot be a MetaEmbed backbone: it is an encoder-decoder, whose last hidden states belong to the "
            "decoder's tokens and not to the input's, where the Meta Tokens are."
        )
    text_config = backbone.config.get_text_config()
    for what in ("vocab_size", "hidden_size"):
        if not isinstance(getattr(text_config, what, None), int):
            raise ValueError(
                f"{name} cannot be a MetaEmbed backbone: {type(text_config).__name__} names no {what} of a language "
                "model."
            )


def check_rebuilds(backbone: PreTrainedModel) -> None:
    """Raise unless the backbone's configuration describes the backbone: what is saved must load again.

    Raises:
        ValueError: If a model built from the configuration has other parameters or shapes.
    """
    with torch.device("meta"):
        rebuilt = AutoModel.from_config(backbone.config)
    expected = {name: tuple(value.shape) for name, value in rebuilt.state_dict().items()}
    actual = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    if differing := sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)):
        name = differing[0]
        raise ValueError(
            f"the configuration of {type(backbone).__name__} does not describe it after adding Meta Tokens, so what "
            f"is saved would not load: {name} is {actual.get(name)}, but would be built as {expected.get(name)}."
        )


def plain_processor(processor: Any, backbone: PreTrainedModel) -> Any:
    """Return the processor of the backbone, where the given one is that of a retriever around it.

    A retriever's processor takes texts or images and adds prompts of its own; the backbone's takes anything. It is
    made of the same parts.
    """
    expected = PROCESSOR_MAPPING.get(type(backbone.config), None)
    if expected is None or isinstance(processor, expected) or not hasattr(processor, "tokenizer"):
        return processor
    parts = {name: getattr(processor, name, None) for name in expected.get_attributes()}
    if "video_processor" in parts and parts["video_processor"] is None:  # retrievers of pages have none
        names = ("patch_size", "temporal_patch_size", "merge_size")
        same = {
            name: getattr(processor.image_processor, name)
            for name in names
            if hasattr(processor.image_processor, name)
        }
        kinds = VIDEO_PROCESSOR_MAPPING[type(backbone.config)]
        parts["video_processor"] = next(iter(kinds.values()))(**same) if isinstance(kinds, dict) else kinds(**same)
    return expected(**parts, chat_template=processor.chat_template)


def matching_projection(model: nn.Module, backbone: nn.Module, embedding_dim: int | None) -> nn.Linear | None:
    """Return a trained projection of a retriever's, outside its backbone, from hidden size to `embedding_dim`."""
    inside = set(backbone.modules())
    shape = (embedding_dim, backbone.get_input_embeddings().weight.shape[1])
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in inside and tuple(module.weight.shape) == shape:
            return module
    return None


@torch.no_grad()
def set_linear(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Give a linear layer, which has a bias, trained weights, which may have none."""
    linear.weight.copy_(weight)
    linear.bias.copy_(torch.zeros_like(linear.bias) if bias is None else bias)
