"""From weights trained with the paper's own code to a [`MetaEmbedModel`].

Their model is the backbone's class with a head, and beside it `prompt_embed_tokens` [R_q + R_c, hidden], the Meta
Tokens with the query ones first, and `custom_text_proj`, the projection, where there is one. A sequence is
`[input; M_q; M_c]` for both sides. Saved as a full state dict, or as a PEFT adapter with these two in full.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoProcessor, PreTrainedModel

from .loading_metaembed import HUB_ARGUMENTS, check_loading, headless, load_backbone, names_inside, set_linear

WEIGHTS = re.compile(r"(adapter_model|model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
META_TOKENS = "prompt_embed_tokens.weight"
PROJECTION = "custom_text_proj"


def convert(
    cls: Any,
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    processor: Any = None,
    num_query_tokens: int = 16,
    dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> Any:
    """Make a model of weights trained with the paper's own code.

    Args:
        cls: The class of the model, [`MetaEmbedModel`].
        checkpoint: Hub id or folder: a full state dict with its `config.json`, or a PEFT adapter.
        base: Hub id or folder of the plain backbone that an adapter was trained on. None: what the adapter names. It
            also gives the processor, where the checkpoint has none.
        adapter: Hub id or folder of an adapter to put on a full checkpoint.
        processor: The backbone's processor. None: that of the checkpoint or of `base`.
        num_query_tokens: R_q: how many of the Meta Tokens are the query's. R_c is the rest of them.
        dtype: Data type of the weights. None: the checkpoint's.
        **kwargs: Where to load from (`revision`, `cache_dir`, `token`, `local_files_only`); more is for
            [`MetaEmbedModel.from_backbone`] (`budgets`, `query_instruction`, ...).

    Returns:
        The model, with `document_sees_query_tokens=True`, their layout.

    Raises:
        ValueError: If a weight of theirs finds no place, a weight of the backbone is missing, or the Meta Tokens are
            missing or too few.
    """
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    folder = _folder(checkpoint, hub)
    state, adapters = _read(folder), []
    if (folder / "adapter_config.json").is_file():
        adapters.append((folder, state))
        base = (
            base or json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        )
        if not base:
            raise ValueError(f"the adapter {checkpoint} names no base model: pass its backbone as `base`.")
        whole, base_processor, missing = load_backbone(base, dtype=dtype or "auto", **hub)
        backbone = headless(whole)
        check_loading(base, {"missing_keys": missing})
        own: dict[str, Tensor] = {}
    else:
        own = {name: state.pop(name) for name in list(state) if _is_own(name)}
        backbone, base_processor = _load_full(folder, state, dtype), None
    if adapter is not None:
        path = _folder(adapter, hub)
        adapters.append((path, _read(path)))
    for path, weights in adapters:
        own.update(_apply_adapter(backbone, path, weights))
    tokens, projection = _split(own, checkpoint)
    if not 1 <= num_query_tokens < len(tokens):
        raise ValueError(
            f"{checkpoint} holds {len(tokens)} Meta Tokens, query and document ones together, so num_query_tokens "
            f"must be between 1 and {len(tokens) - 1}, got {num_query_tokens}."
        )
    processor = processor or base_processor or AutoProcessor.from_pretrained(base or folder, **hub)
    model = cls.from_backbone(
        backbone,
        processor=processor,
        num_query_tokens=num_query_tokens,
        num_document_tokens=len(tokens) - num_query_tokens,
        embedding_dim=len(projection["weight"]) if projection else None,
        document_sees_query_tokens=True,
        **kwargs,
    )
    with torch.no_grad():
        first = model.config.query_token_ids[0]
        model.get_input_embeddings().weight[first : first + len(tokens)] = tokens.to(model.device, model.dtype)
    if projection:
        set_linear(model.projection, projection["weight"], projection.get("bias"))
    model.config.base_model = str(base) if base else model.config.base_model
    return model


def _folder(source: str | Path, hub: dict[str, Any]) -> Path:
    if Path(source).is_dir():
        return Path(source)
    names = {
        name: value for name, value in hub.items() if name in ("revision", "cache_dir", "token", "local_files_only")
    }
    return Path(snapshot_download(str(source), **names))


def _read(folder: Path) -> dict[str, Tensor]:
    """Return all the weights in a folder."""
    files = sorted(path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name))
    formats = [path for path in files if path.suffix == ".safetensors"] or files  # the same weights may stand in both
    if not formats:
        raise ValueError(
            f"{folder} holds no weights: expected model*.safetensors, adapter_model.safetensors or *.bin."
        )
    state: dict[str, Tensor] = {}
    for path in formats:
        state.update(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True))
    return state


def _is_own(name: str) -> bool:
    return name.endswith((META_TOKENS, f"{PROJECTION}.weight", f"{PROJECTION}.bias"))


def _load_full(folder: Path, state: dict[str, Tensor], dtype: Any) -> PreTrainedModel:
    """Load their state dict into the backbone's class with a head, by transformers' own rules for old names."""
    config = AutoConfig.from_pretrained(folder)
    auto = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if auto is None:
        raise ValueError(
            f"{folder} is a {type(config).__name__}: expected the configuration of a vision-language model."
        )
    model, info = auto.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype or "auto", output_loading_info=True
    )
    if unknown := sorted(info["unexpected_keys"]):
        raise ValueError(
            f"{len(unknown)} weights of {folder} find no place in {auto.__name__}: {', '.join(unknown[:5])}."
        )
    missing = names_inside(model, headless(model), info["missing_keys"])  # the head stays behind
    check_loading(folder, {**info, "missing_keys": missing})
    return headless(model)


def _apply_adapter(backbone: PreTrainedModel, folder: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge an adapter's LoRA weights into the backbone, and return its Meta Tokens and projection."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for setting in ("rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out"):
        if config.get(setting):
            raise ValueError(f"the adapter {folder} uses {setting}={config[setting]!r}, which is not supported.")
    names = {re.sub(r"^base_model\.model\.|\.default\b|\.modules_to_save\b", "", name): name for name in state}
    own: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for short, name in names.items():
        if ".original_module." in short:  # PEFT's copy of what `modules_to_save` replaces
            continue
        (own if _is_own(short) else rest)[short] = state[name]
    for short in sorted(rest):
        match = re.fullmatch(r"(.+)\.lora_A\.weight", short)
        if match is None:
            continue
        other = f"{match[1]}.lora_B.weight"
        if other not in rest:
            break  # named below, as not understood
        down, up = rest.pop(short), rest.pop(other)  # [r, in], [out, r]
        root = len(down) ** 0.5 if config.get("use_rslora") else len(down)
        with torch.no_grad():
            weight = _find(backbone, match[1], (len(up), down.shape[1])).weight
            work = torch.promote_types(weight.dtype, torch.float32)
            delta = (up.to(work) @ down.to(work)) * (config["lora_alpha"] / root)
            weight += delta.to(weight.device, weight.dtype)
    if rest:
        raise ValueError(
            f"{len(rest)} weights of the adapter {folder} are not understood: {', '.join(sorted(rest)[:5])}."
        )
    return own


def _find(backbone: PreTrainedModel, name: str, shape: tuple[int, int]) -> nn.Linear:
    """Find a layer by the end of its name: what comes before it has changed between versions of transformers."""
    linears = {
        f".{path}": module
        for path, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and tuple(module.weight.shape) == shape
    }
    parts = name.split(".")
    for start in range(len(parts)):
        found = [module for path, module in linears.items() if path.endswith("." + ".".join(parts[start:]))]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise ValueError(f"the adapter's layer {name} {shape} has no one place in {type(backbone).__name__}.")


def _split(own: dict[str, Tensor], checkpoint: Any) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = [value for name, value in own.items() if name.endswith(META_TOKENS)]
    if len(tokens) != 1:
        raise ValueError(
            f"{checkpoint} holds {len(tokens)} {META_TOKENS} instead of one: these are not the paper's weights."
        )
    projection = {name.rsplit(".", 1)[1]: value for name, value in own.items() if f"{PROJECTION}." in name}
    if projection and not {"weight"} <= projection.keys() <= {"weight", "bias"}:
        raise ValueError(f"the projection of {checkpoint} holds {sorted(projection)} instead of weight and bias.")
    return tokens[0], projection
