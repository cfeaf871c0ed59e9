"""Loading a backbone whole or not at all: headless, from under a head, or from inside a trained retriever."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

# Arguments of `from_pretrained` that say where from, and hold for the model and for its processor.
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def check_loading(source: Any, info: Mapping[str, Any]) -> None:
    """Raise if weights were not loaded whole.

    Args:
        source: What was loaded, for the error.
        info: What `from_pretrained(..., output_loading_info=True)` reports.

    Raises:
        ValueError: If a weight of the model was not in the checkpoint (and so is random), or has another shape, or if
            one of the checkpoint's has no place in the model (and so is lost).
    """
    problems = []
    for kind, what in (
        ("missing_keys", "missing, so random"),
        ("mismatched_keys", "of another shape, so random"),
        ("unexpected_keys", "without a place in the model, so lost"),
    ):
        if keys := sorted(map(str, info.get(kind) or [])):
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            problems.append(f"{len(keys)} weights are {what}: {shown}")
    if problems:
        raise ValueError(f"the weights of {source} did not load whole: {'; '.join(problems)}. Nothing was created.")


def load_backbone(source: Any, **kwargs: Any) -> tuple[PreTrainedModel, Any, set[str]]:
    """Load a backbone and its processor.

    Args:
        source: Hub id or folder: of a plain backbone, of one with a head, or of a late-interaction retriever.
        **kwargs: For `from_pretrained` of the model; those that say where from hold for the processor too.

    Returns:
        The model, which may hold the backbone somewhere inside (see [`headless`]), its processor (or tokenizer), and
        the names of backbone weights that the checkpoint does not hold: good only for what the backbone does not use.

    Raises:
        ValueError: If a weight has another shape than the checkpoint's, one of the checkpoint's has a place neither in
            the model nor in a head, or a retriever's own (its projection) is missing.
    """
    hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    kind = type(AutoConfig.from_pretrained(source, **hub))
    autos = [AutoModel]
    if kind not in MODEL_MAPPING and kind in MODEL_FOR_PRETRAINING_MAPPING:  # retrievers stand among these
        autos = [AutoModelForPreTraining]
    elif kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:  # where the headless class does not find its weights
        autos.append(AutoModelForImageTextToText)
    candidates = []
    for auto in autos:
        model, info = auto.from_pretrained(source, output_loading_info=True, **kwargs)
        check_loading(source, {"mismatched_keys": info["mismatched_keys"]})
        missing = names_inside(model, headless(model), info["missing_keys"])
        if auto is AutoModelForPreTraining:  # all of a retriever's is trained, its projection too
            check_loading(source, {"missing_keys": info["missing_keys"]})
        candidates.append((model, missing, info["unexpected_keys"]))
        if not missing:
            break
    model, missing, unexpected = min(candidates, key=lambda candidate: len(candidate[1]))
    check_loading(source, {"unexpected_keys": homeless(unexpected, headless(model).config)})
    return model, AutoProcessor.from_pretrained(source, **hub), missing


def homeless(names: Iterable[str], config: PreTrainedConfig) -> set[str]:
    """Return those of a checkpoint's weights that a backbone with its head would have no place for either.

    Args:
        names: Names of weights that have no place in the backbone. What stands before a head's own name may be of an
            older transformers.
        config: The configuration of the backbone. It names the class that was saved.

    Returns:
        The names that are of no head.
    """
    rest = set(names)
    if not rest:
        return rest
    classes = [getattr(transformers, name, None) for name in config.architectures or []]
    classes += [
        mapping.get(type(config), None)
        for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_PRETRAINING_MAPPING)
    ]
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


def headless(model: PreTrainedModel) -> PreTrainedModel:
    """Return the backbone in a model: the model itself, what stands under its head, or inside a retriever."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module) is MODEL_MAPPING.get(type(module.config), None):
            return module
    return model


def names_inside(model: nn.Module, backbone: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those of the names that are of the backbone, as the backbone calls them."""
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    prefix = f"{prefix}." if prefix else ""
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


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


def check_unused(source: Any, backbone: nn.Module, missing: set[str], rows: torch.Tensor) -> None:
    """Raise if the embedding depends on a weight that the checkpoint did not hold.

    A headless class may have parts that no checkpoint of the full class holds, and that no hidden state passes
    through, such as a pooler. They are told apart by what the rows depend on, and not by name.

    Args:
        source: What was loaded, for the error.
        backbone: The backbone.
        missing: Names of its weights that the checkpoint did not hold.
        rows: Rows that the model gave, of every kind of input that it takes, with their graph.

    Raises:
        ValueError: If the rows depend on one of them.
    """
    parameters = {name: value for name, value in backbone.named_parameters() if name in missing}
    frozen = missing - parameters.keys()  # buffers: nothing tells whether they are used
    values = list(parameters.values())
    gradients = torch.autograd.grad(rows.sum(), values, allow_unused=True) if values else []
    used = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    check_loading(source, {"missing_keys": [*frozen, *used]})
