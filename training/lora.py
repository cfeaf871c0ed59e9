"""The paper's LoRA recipe, and merging an adapter into the model."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from typing import Any

import transformers.integrations.peft
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from ..loading_metaembed import adapter_parameters

PROJECTIONS = ("projection", "token_projection")
COMPILED = "_orig_mod."  # torch.compile inserts it into the names of all parts of a module


def import_peft() -> Any:
    """Return `peft`; raise an `ImportError` if it is not installed, or older than transformers asks for."""
    needed, version = getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0"), transformers.__version__
    try:
        installed = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"adapters need peft: pip install 'peft>={needed}'") from None
    if Version(installed) < Version(needed):
        raise ImportError(
            f"transformers {version} needs peft>={needed}, but peft {installed} is installed. Run pip install "
            f"--upgrade 'peft>={needed}' or, if there is no such release yet, pip install 'transformers<{version}'"
        )
    return importlib.import_module("peft")


def lora_config(model: Any, r: int = 32, lora_alpha: int = 32, lora_dropout: float = 0.1, **kwargs: Any) -> Any:
    """Return the paper's LoRA recipe for `model`.

    LoRA on all linear layers of the language model; the rows of the Meta Tokens, and the projections where there are
    any, trained in full. The recipe does not depend on whether the model has an adapter already, is compiled, or is
    wrapped (`get_peft_model`, `DistributedDataParallel`).

    Args:
        model: A `MetaEmbedModel`.
        r: Rank.
        lora_alpha: Scale, over `r`.
        lora_dropout: Dropout before the low-rank layers.
        **kwargs: For `peft.LoraConfig`.

    Returns:
        A `peft.LoraConfig`, for `model.add_adapter`.

    Raises:
        TypeError: If `model` is not a `MetaEmbedModel`.
        ValueError: If it has no linear layers in numbered blocks.

    Example:
        >>> model.add_adapter(lora_config(model))
        >>> model.save_pretrained("adapter")  # an adapter repository, of the trained weights only
    """
    model = unwrapped(model)
    embedding = embedding_name(model).rpartition(COMPILED)[2]  # peft compares with the end of a module's name
    options: dict[str, Any] = dict(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        trainable_token_indices={embedding: [*model.config.query_token_ids, *model.config.document_token_ids]},
        modules_to_save=[name for name in PROJECTIONS if getattr(model, name) is not None] or None,
    )
    if "target_modules" not in kwargs:
        options["target_modules"] = language_model_layers(model)
    return import_peft().LoraConfig(**{**options, **kwargs})


def unwrapped(model: Any) -> Any:
    """Return the `MetaEmbedModel` in what `torch.compile`, `get_peft_model` or a parallel wrapper returned.

    Raises:
        TypeError: If there is none.
    """
    inside = model
    while isinstance(inside, nn.Module):
        if hasattr(getattr(inside, "config", None), "query_token_ids") and "backbone" in inside._modules:
            return inside
        # PeftModel holds a tuner as its `base_model`, which holds the model as `model`.
        wrapped = (inside._modules.get(name) for name in ("_orig_mod", "module", "base_model", "model"))
        inside = next((module for module in wrapped if module is not None), None)
    raise TypeError(f"expected a MetaEmbedModel, got {type(model).__name__}. Of an encoder, pass encoder[0].model.")


def module_name(model: nn.Module, module: nn.Module) -> str:
    """Return the name of `module` in `model`, found by identity.

    Raises:
        ValueError: If it is not a part of `model`.
    """
    for name, candidate in model.named_modules():
        if candidate is module:
            return name
    raise ValueError(f"{type(module).__name__} is no part of {type(model).__name__}.")


def embedding_name(model: Any) -> str:
    """Return the name of the input embedding, the same with and without an adapter on it."""
    return module_name(model, model.get_input_embeddings()).partition(".token_adapter")[0]


def linear_layers(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Yield the names of all linear layers in `module`, the same with and without an adapter on them."""
    for name, child in module.named_children():
        layer = child.get_base_layer() if hasattr(child, "get_base_layer") else child
        if isinstance(layer, nn.Linear):
            yield prefix + name
        else:
            yield from linear_layers(child, f"{prefix}{name}.")


def language_model_layers(model: Any) -> str:
    """Return a regular expression for the linear layers in the blocks of the language model.

    The language model is the smallest part of the backbone that contains both the input embedding and numbered blocks
    with linear layers; its vision tower is outside.

    Raises:
        ValueError: If there is none.
    """
    block = re.compile(r"\.\d+\.")
    layers = list(linear_layers(model))
    part = embedding_name(model)
    while "." in part:
        part = part.rpartition(".")[0]
        inside = [name for name in layers if name.startswith(f"{part}.") and block.search(name.removeprefix(part))]
        if inside:
            leaves = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in inside}))
            # So that an adapter of a compiled model fits one that is not.
            path = re.escape(f"{part}.").replace(re.escape(COMPILED), f"({re.escape(COMPILED)})?")
            return rf"{path}.*\.({leaves})"
    raise ValueError(
        f"{type(model.backbone).__name__} has no linear layers in numbered blocks: pass `target_modules`."
    )


def check_adapter_whole(model: PreTrainedModel, given: set[str]) -> None:
    """Raise a `ValueError` if a state dict with the names `given` holds only a part of an adapter of `model`."""
    expected: dict[str, set[str]] = {}
    for name, adapter, _ in adapter_parameters(model):
        expected.setdefault(adapter, set()).add(name)
    for adapter, names in expected.items():
        if names & given and (missing := names - given):
            raise ValueError(
                f'{len(missing)} weights of the adapter "{adapter}" are missing from what is loaded, so would be '
                f"random: {min(missing)}, ... It was not saved completely, or belongs to another model."
            )


def merge_adapter(model: PreTrainedModel) -> None:
    """Merge the active adapter into the weights of `model`, in place, so that it is saved as a whole model.

    Args:
        model: A model with an adapter (`model.add_adapter`, `model.load_adapter` or an adapter repository).

    Raises:
        ValueError: If it has no adapter.

    Example:
        >>> merge_adapter(model)
        >>> model.save_pretrained("merged")
    """
    if not model._hf_peft_config_loaded:
        raise ValueError("there is no adapter to merge: add or load one first, with model.load_adapter(...).")
    peft = import_peft()
    tuned, wrapper = peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.other.AuxiliaryTrainingWrapper
    wrapped = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (tuned, wrapper)) and "token_adapter" not in name
    ]
    for name, module in wrapped:
        if isinstance(module, wrapper):
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True)
            merged = module.get_base_layer()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, merged)
    del model.peft_config
    model._hf_peft_config_loaded = False
    model.requires_grad_(True)
