"""The paper's LoRA recipe, and merging an adapter into the model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..loading_metaembed import import_peft


def lora_config(model: Any, r: int = 32, lora_alpha: int = 32, lora_dropout: float = 0.1, **kwargs: Any) -> Any:
    """Return the paper's LoRA recipe for `model`.

    LoRA on all linear layers of the language model; the rows of the Meta Tokens, and the projection where there is
    one, trained in full.

    Args:
        model: A `MetaEmbedModel`.
        r: Rank.
        lora_alpha: Scale, over `r`.
        lora_dropout: Dropout before the low-rank layers.
        **kwargs: For `peft.LoraConfig`.

    Returns:
        A `peft.LoraConfig`, for `model.add_adapter`.

    Raises:
        ValueError: If no linear layers are found.

    Example:
        >>> model.add_adapter(lora_config(model))
        >>> model.save_pretrained("adapter")  # an adapter repository, of the trained weights only
    """
    ids = [*model.config.query_token_ids, *model.config.document_token_ids]
    embedding = module_name(model, model.get_input_embeddings())
    options: dict[str, Any] = dict(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=language_model_layers(model),
        trainable_token_indices={embedding: ids},
        modules_to_save=None if model.projection is None else ["projection"],
    )
    return import_peft().LoraConfig(**{**options, **kwargs})


def module_name(model: nn.Module, module: nn.Module) -> str:
    """Return the name of `module` in `model`, found by identity.

    Raises:
        ValueError: If it is no part of `model`.
    """
    for name, candidate in model.named_modules():
        if candidate is module:
            return name
    raise ValueError(f"{type(module).__name__} is no part of {type(model).__name__}.")


def language_model_layers(model: Any) -> str:
    """Return a regular expression of the linear layers in the blocks of the language model.

    The language model is the smallest part of the backbone that holds both the input embedding and numbered blocks
    with linear layers; its vision tower is outside.

    Raises:
        ValueError: If there is none.
    """
    block = re.compile(r"\.\d+\.")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and block.search(name)]
    part = module_name(model, model.get_input_embeddings())
    while "." in part:
        part = part.rpartition(".")[0]
        if inside := [
            name for name in linear if block.search(name.removeprefix(part)) and name.startswith(part + ".")
        ]:
            leaves = sorted({name.rpartition(".")[2] for name in inside})
            return rf"{re.escape(part)}\..*\.({'|'.join(map(re.escape, leaves))})"
    raise ValueError(
        f"{type(model.backbone).__name__} has no linear layers in numbered blocks: pass `target_modules`."
    )


def merge_adapter(model: PreTrainedModel) -> None:
    """Add the active adapter to the weights of `model`, in place, and forget it: what is saved then is a whole model.

    Args:
        model: A model with an adapter (`model.add_adapter`, `model.load_adapter` or an adapter repository).

    Raises:
        ValueError: If it has none.

    Example:
        >>> merge_adapter(model)
        >>> model.save_pretrained("merged")
    """
    if not model._hf_peft_config_loaded:
        raise ValueError("there is no adapter to merge.")
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
