"""Creates a MetaEmbed model from a plain backbone: see [`from_backbone`] for the steps."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass
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
    headless,
)
from ..modeling_metaembed import MetaEmbedModel
from ..processing_metaembed import MetaEmbedProcessor, meta_token_names
from .loading import grow_embedding, load_backbone
from .probe import measure, probe_rows


@dataclass
class Source:
    """The backbone that a model is made from, and where it came from.

    Args:
        whole: The model as it was loaded. The backbone may be under its head, or inside a retriever.
        backbone: The backbone in it.
        processor: The backbone's processor or tokenizer, a copy that may be changed.
        name: Hub id or absolute folder. None: unknown.
        commit: Commit of the Hub repository, where it came from one.
        missing: Names of the backbone's weights that the checkpoint does not hold.
    """

    whole: PreTrainedModel
    backbone: PreTrainedModel
    processor: Any
    name: str | None = None
    commit: str | None = None
    missing: frozenset[str] = frozenset()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer inside the processor, or the processor where it is a tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)


SETTINGS = (
    "num_query_tokens",
    "num_document_tokens",
    "embedding_dim",
    "token_projection",
    "budgets",
    "document_sees_query_tokens",
    "query_instruction",
    "document_instruction",
)


def from_backbone(
    cls: type, backbone: str | Path | PreTrainedModel, *, processor: Any = None, seed: int = 0, **kwargs: Any
) -> MetaEmbedModel:
    """Create a MetaEmbed model from a plain backbone: with new Meta Tokens, ready to be trained.

    Adds the Meta Tokens to a copy of the tokenizer and to the backbone's input embedding, and measures how the
    backbone treats its inputs. A trained retriever (ColPali, ColQwen2, an embedding model) is a backbone too: its
    weights are kept, and so is its projection if `embedding_dim` is the projection's.

    Args:
        cls: Class of the model. For the one in a checkpoint's own Python files, which may be of another version than
            this code, the result is of the installed [`MetaEmbedModel`].
        backbone: Hub id or folder of the backbone, or a loaded model (changed in place; then pass `processor`).
        processor: The backbone's processor (or tokenizer). None: the one loaded with it.
        seed: Seed of the first values of the Meta Tokens and the projection.
        **kwargs: Fields of [`MetaEmbedConfig`]: `num_query_tokens`, `num_document_tokens`, `embedding_dim` (None: the
            backbone's hidden size, with no projection), `token_projection` (True: the model can also return the
            vectors of its tokens, which `token_terms` of [`MMRLoss`] train), `budgets`, `document_sees_query_tokens`,
            `query_instruction`, `document_instruction`. All others are for `AutoModel.from_pretrained` (`dtype`,
            `revision`, `attn_implementation`, `device_map`, `trust_remote_code`, ...).

    Returns:
        The model, in evaluation mode, with its processor as `model.processor`.

    Raises:
        TypeError: If `backbone` is neither a name nor a model, or a keyword has no meaning.
        ValueError: If a weight is missing from the checkpoint or unexpected, there is no processor or it takes no new
            tokens, the sizes and budgets do not fit, or such a model cannot be a backbone: with the reason.
    """
    cls = cls if issubclass(cls, MetaEmbedModel) else MetaEmbedModel
    settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
    config = MetaEmbedConfig(**settings)  # raises before anything large is loaded
    source = find_source(backbone, processor, kwargs)
    check_supported(source.backbone)
    vocabulary = len(source.tokenizer)
    add_meta_tokens(source.tokenizer, config)
    grow_embedding(source.backbone, [*config.query_token_ids, *config.document_token_ids], vocabulary, seed)
    check_rebuilds(source.backbone)
    model = assemble(cls, config, source, seed)
    measure(model)
    if source.missing:
        check_unused(source.name, source.backbone, set(source.missing), probe_rows(model))
    model.is_untrained = True  # of this instance alone: it is not saved
    model.register_forward_pre_hook(warn_untrained)
    return model


def warn_untrained(model: nn.Module, *_: Any) -> None:
    """Warn if the first thing that a model from [`from_backbone`] does is to encode, and not to train."""
    if model.training:  # set without a look before, so that a compiled model is not compiled again
        model.is_untrained = False
    elif not torch.compiler.is_compiling() and model.is_untrained:
        model.is_untrained = False
        if not torch.is_grad_enabled():
            warnings.warn(
                "this model was just made by from_backbone and is untrained: its Meta Tokens are random, so its "
                "embeddings mean nothing yet. Train it (MMRLoss, or examples/train.py), or load a trained one with "
                "MetaEmbedModel.from_pretrained.",
                UserWarning,
                stacklevel=2,
            )


def find_source(backbone: Any, processor: Any, loading: dict[str, Any]) -> Source:
    """Return the backbone and its processor, loaded if `backbone` is a Hub id or a folder.

    Raises:
        TypeError: If `backbone` is neither a name nor a model, or `loading` has options for a loaded model.
        ValueError: If a loaded model comes without its processor, or the checkpoint does not load whole.
    """
    if isinstance(backbone, (str, Path)):
        name = os.path.abspath(backbone) if os.path.isdir(backbone) else str(backbone)
        whole, loaded_processor, missing = load_backbone(backbone, **loading)
        hub = {key: loading[key] for key in HUB_ARGUMENTS if loading.get(key) is not None}
        commit, processor = commit_of(name, **hub), processor or loaded_processor
    else:
        check_loaded(backbone, processor, loading)
        whole, missing = backbone, set()
        name, commit = headless(backbone).config._name_or_path or None, None
    found = headless(whole)
    own = plain_processor(copy.deepcopy(processor), found)  # the caller's processor is not changed
    return Source(whole, found, own, name, commit, frozenset(missing))


def check_loaded(backbone: Any, processor: Any, loading: dict[str, Any]) -> None:
    """Raise unless `backbone` is a loaded model with its processor, and `loading` has no options for loading it."""
    if not isinstance(backbone, PreTrainedModel):
        raise TypeError(f"backbone must be a Hub id, a folder or a loaded model, got {type(backbone).__name__}.")
    if loading:
        raise TypeError(
            f"from_backbone has no parameters {', '.join(sorted(loading))}, and loads nothing with a loaded backbone. "
            "Load the backbone with them, or pass its Hub id or folder."
        )
    if processor is None:
        raise ValueError("a loaded backbone comes without its processor: pass it as `processor`.")


def assemble(cls: type[MetaEmbedModel], config: MetaEmbedConfig, source: Source, seed: int) -> MetaEmbedModel:
    """Return the model, in evaluation mode, with its processor and its projection, not measured yet.

    Args:
        cls: Class of the model.
        config: Completed here with what the backbone determines.
        source: The backbone, which holds the Meta Tokens already.
        seed: Seed of the projection.
    """
    config.base_model = source.name
    config.backbone_config = source.backbone.config  # the constructor would reset its attention implementation
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config, source.backbone)
    trained = config.embedding_dim and matching_projection(source.whole, source.backbone, config.embedding_dim)
    for projection in filter(None, (model.projection, model.token_projection)):
        if trained:
            set_linear(projection, trained.weight, trained.bias)
        projection.to(source.backbone.device, source.backbone.dtype)
    config.dtype = source.backbone.dtype
    model.name_or_path = source.name or ""  # what peft writes into an adapter of its own
    model.adapter_base = (source.name, source.commit)
    model.processor = MetaEmbedProcessor(source.processor, config)
    return model.eval()


def add_meta_tokens(tokenizer: PreTrainedTokenizerBase, config: MetaEmbedConfig) -> None:
    """Add the Meta Tokens to the vocabulary of a tokenizer, query ones first, and their ids to the configuration.

    Args:
        tokenizer: Changed in place.
        config: Says how many; gets the ids of each side, contiguous.

    Raises:
        ValueError: If the tokenizer already has Meta Tokens, or does not add tokens as contiguous new ids.
    """
    names = [name for side in SIDES for name in meta_token_names(side, config.num_tokens(side))]
    vocabulary = tokenizer.get_vocab()
    if present := [name for name in names if name in vocabulary]:
        raise ValueError(
            f"the tokenizer already has Meta Tokens ({present[0]}, ...), so this is a MetaEmbed model already. "
            "Load it with MetaEmbedModel.from_pretrained, or pass its plain backbone."
        )
    # `add_tokens` and not `add_special_tokens`: some processors call the latter again later, which replaces the list.
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    if ids != list(range(ids[0], ids[0] + len(names))) or ids[0] in vocabulary.values():
        raise ValueError(f"{type(tokenizer).__name__} does not add new tokens as contiguous ids (got {ids}).")
    config.query_token_ids = ids[: config.num_query_tokens]
    config.document_token_ids = ids[config.num_query_tokens :]


def check_supported(backbone: PreTrainedModel) -> None:
    """Raise, with the reason, if a model is not of a kind that can be a backbone.

    Raises:
        ValueError: If it is an encoder-decoder, or has no language model with a vocabulary.
    """
    name = type(backbone).__name__
    if backbone.config.is_encoder_decoder:
        raise ValueError(
            f"{name} cannot be a MetaEmbed backbone: it is an encoder-decoder, so its last hidden states are at the "
            "decoder's tokens and not at the input's, where the Meta Tokens are."
        )
    text_config = backbone.config.get_text_config()
    for field in ("vocab_size", "hidden_size"):
        if not isinstance(getattr(text_config, field, None), int):
            raise ValueError(
                f"{name} cannot be a MetaEmbed backbone: {type(text_config).__name__} has no {field} of a language "
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
    """Return the backbone's processor; if the given one belongs to a retriever around the backbone, build it.

    A retriever's processor takes either texts or images and adds prompts of its own; the backbone's takes any input.
    Both have the same parts, except the video processor, which retrievers of pages lack.
    """
    expected = PROCESSOR_MAPPING.get(type(backbone.config), None)
    if expected is None or isinstance(processor, expected) or not hasattr(processor, "tokenizer"):
        return processor
    parts = {name: getattr(processor, name, None) for name in expected.get_attributes()}
    if "video_processor" in parts and parts["video_processor"] is None:
        parts["video_processor"] = video_processor_like(processor.image_processor, backbone)
    return expected(**parts, chat_template=processor.chat_template)


def video_processor_like(image_processor: Any, backbone: PreTrainedModel) -> Any:
    """Return the backbone's video processor, with the patches of an image processor."""
    kinds = VIDEO_PROCESSOR_MAPPING[type(backbone.config)]
    kind = next(iter(kinds.values())) if isinstance(kinds, dict) else kinds
    shared = ("patch_size", "temporal_patch_size", "merge_size")
    return kind(**{name: getattr(image_processor, name) for name in shared if hasattr(image_processor, name)})


def matching_projection(model: nn.Module, backbone: nn.Module, embedding_dim: int | None) -> nn.Linear | None:
    """Return a retriever's trained projection, outside its backbone, from the hidden size to `embedding_dim`."""
    inside = set(backbone.modules())
    shape = (embedding_dim, backbone.get_input_embeddings().weight.shape[1])
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in inside and tuple(module.weight.shape) == shape:
            return module
    return None


@torch.no_grad()
def set_linear(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Copy trained weights into a linear layer with a bias, which is zero if they have none."""
    linear.weight.copy_(weight)
    linear.bias.copy_(torch.zeros_like(linear.bias) if bias is None else bias)
