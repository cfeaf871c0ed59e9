"""From weights trained with the paper's own code to a [`MetaEmbedModel`].

Their model is the backbone's class with a head, and beside it `prompt_embed_tokens` [R_q + R_c, hidden], the Meta
Tokens with the query ones first, and `custom_text_proj`, the projection, where there is one. A sequence is
`[input; M_q; M_c]` for both sides. Saved as a full state dict, or as a PEFT adapter with these two in full.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoProcessor, PreTrainedModel

from ..configuration_metaembed import check_count
from ..loading_metaembed import HUB_ARGUMENTS, check_loading, headless, load_backbone, names_inside, set_linear

WEIGHTS = re.compile(r"(adapter_model|model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
META_TOKENS = "prompt_embed_tokens.weight"
PROJECTION = "custom_text_proj"

# What a layer's name began with in the class with a head, by the version of transformers, and begins with without it.
PREFIXES = (
    ("", ""),
    ("model.", ""),
    ("model.", "language_model."),
    ("language_model.model.", "language_model."),
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # ways to begin LoRA that take something from the base


def convert(
    cls: Any,
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    processor: Any = None,
    num_query_tokens: int = 16,
    revision: str | None = None,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    subfolder: str = "",
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
        revision: Branch, tag or commit of `checkpoint`.
        base_revision: The same of the base. None: what the adapter names, where it names the base, else the newest.
        adapter_revision: The same of `adapter`.
        subfolder: Where in `checkpoint` the weights are.
        **kwargs: What [`MetaEmbedModel.from_backbone`] takes (`budgets`, `query_instruction`, ...) is for it;
            `cache_dir`, `token`, `local_files_only` and `force_download` hold for all that is loaded; more (`dtype`,
            `attn_implementation`, ...) is for `from_pretrained` of the backbone.

    Returns:
        The model, with `document_sees_query_tokens=True`, their layout.

    Raises:
        TypeError: If `num_query_tokens` is no whole number, or a keyword means nothing.
        ValueError: If a weight of theirs finds no place or is not what it should be, a weight of the backbone is
            missing, the Meta Tokens are missing or too few, or an adapter is of a kind that is not understood.
    """
    check_count("num_query_tokens", num_query_tokens, 2**31)
    settings = {name: kwargs.pop(name) for name in inspect.signature(cls.from_backbone).parameters if name in kwargs}
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    folder = _folder(checkpoint, revision, hub) / subfolder
    state, adapters = _read(folder), []
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter and base is None:
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base, base_revision = named.get("base_model_name_or_path"), base_revision or named.get("revision")
        if not base:
            raise ValueError(f"the adapter {checkpoint} names no base model: pass its backbone as `base`.")
    base_hub = {**hub, "revision": base_revision} if base_revision else hub
    own: dict[str, Tensor] = {}
    base_processor = None
    if is_adapter:
        adapters.append((folder, state))
        whole, base_processor, missing = load_backbone(base, **{"dtype": "auto", **base_hub, **kwargs})
        backbone = headless(whole)
        check_loading(base, {"missing_keys": missing})
    else:
        own = {name: state.pop(name) for name in list(state) if _is_own(name)}
        backbone = _load_full(folder, state, **{"dtype": "auto", **kwargs})
    if adapter is not None:
        path = _folder(adapter, adapter_revision, hub)
        adapters.append((path, _read(path)))
    for path, weights in adapters:
        own.update(_apply_adapter(backbone, path, weights))
    tokens, projection = _split(own, checkpoint, backbone.get_input_embeddings().weight.shape[1])
    if num_query_tokens >= len(tokens):
        raise ValueError(
            f"{checkpoint} holds {len(tokens)} Meta Tokens, query and document ones together, so num_query_tokens "
            f"must be between 1 and {len(tokens) - 1}, got {num_query_tokens}."
        )
    processor = processor or base_processor or _processor(base or folder, **(base_hub if base else {}))
    model = cls.from_backbone(
        backbone,
        processor=processor,
        num_query_tokens=num_query_tokens,
        num_document_tokens=len(tokens) - num_query_tokens,
        embedding_dim=len(projection["weight"]) if projection else None,
        document_sees_query_tokens=True,
        **settings,
    )
    with torch.no_grad():
        first = model.config.query_token_ids[0]
        model.get_input_embeddings().weight[first : first + len(tokens)] = tokens.to(model.device, model.dtype)
    if projection:
        set_linear(model.projection, projection["weight"], projection.get("bias"))
    model.config.base_model = str(base) if base else model.config.base_model
    return model


def _folder(source: str | Path, revision: str | None, hub: dict[str, Any]) -> Path:
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(str(source), revision=revision, **hub))


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
        part = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
        if twice := state.keys() & part.keys():
            raise ValueError(f"{folder} holds {min(twice)} more than once: in {path.name}, and in a file before it.")
        state.update(part)
    return state


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, and code in it might run, so it is not read.") from error


def _processor(source: str | Path, **hub: Any) -> Any:
    try:
        return AutoProcessor.from_pretrained(source, **hub)
    except OSError as error:
        raise ValueError(
            f"{source} holds no processor: pass the backbone's as `processor`, or where it is as `base`."
        ) from error


def _is_own(name: str) -> bool:
    return name.endswith((META_TOKENS, f"{PROJECTION}.weight", f"{PROJECTION}.bias"))


def _load_full(folder: Path, state: dict[str, Tensor], **kwargs: Any) -> PreTrainedModel:
    """Load their state dict into the backbone's class with a head, by transformers' own rules for old names."""
    config = AutoConfig.from_pretrained(folder)
    auto = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if auto is None:
        raise ValueError(
            f"{folder} is a {type(config).__name__}: expected the configuration of a vision-language model."
        )
    model, info = auto.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **kwargs)
    missing = names_inside(model, headless(model), info["missing_keys"])  # the head stays behind
    check_loading(folder, {**info, "missing_keys": missing})
    return headless(model)


def _check_adapter(folder: Path, config: dict[str, Any]) -> None:
    """Raise unless an adapter is plain LoRA, the same for every layer, on a base that stayed as it was."""
    if str(config.get("peft_type")).upper() != "LORA":
        raise ValueError(f"the adapter {folder} is of peft_type {config.get('peft_type')!r}: only LORA is supported.")
    for setting in ("rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "layer_replication"):
        if config.get(setting):
            raise ValueError(f"the adapter {folder} uses {setting}={config[setting]!r}, which is not supported.")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"the adapter {folder} was begun with init_lora_weights={config['init_lora_weights']!r}, which changes "
            "the base's weights too, so it does not fit the base. Merge it with peft, and load the full weights."
        )
    if missing := {"r", "lora_alpha"} - config.keys():
        raise ValueError(f"{folder}/adapter_config.json names no {' and no '.join(sorted(missing))}.")


def _apply_adapter(backbone: PreTrainedModel, folder: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge an adapter's LoRA weights into the backbone, and return its Meta Tokens and projection."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _check_adapter(folder, config)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    own: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".original_module." in name:  # PEFT's copy of what `modules_to_save` replaces
            continue
        short = re.sub(r"^base_model\.model\.|\.default\b|\.modules_to_save\b", "", name)
        if short in own or short in rest:
            raise ValueError(f"the adapter {folder} holds {short} more than once, also as {name}: which one counts?")
        (own if _is_own(short) else rest)[short] = value
    for short in sorted(rest):
        match = re.fullmatch(r"(.+)\.lora_A\.weight", short)
        if match is None:
            continue
        other = f"{match[1]}.lora_B.weight"
        if other not in rest:
            break  # named below, as not understood
        down, up = rest.pop(short), rest.pop(other)  # [r, in], [out, r]
        weight = _find(backbone, match[1]).weight  # [out, in]
        shapes = tuple(up.shape), tuple(down.shape)
        wanted = (weight.shape[0], config["r"]), (config["r"], weight.shape[1])
        if shapes != wanted or not (up.isfinite().all() and down.isfinite().all()):
            raise ValueError(
                f"the adapter's layer {match[1]} is {shapes[0]} by {shapes[1]}: expected {wanted[0]} by {wanted[1]} "
                "finite numbers."
            )
        with torch.no_grad():
            work = torch.promote_types(weight.dtype, torch.float32)
            delta = (up.to(work) @ down.to(work)) * scale
            weight += delta.to(weight.device, weight.dtype)
    if rest:
        raise ValueError(
            f"{len(rest)} weights of the adapter {folder} are not understood: {', '.join(sorted(rest)[:5])}."
        )
    return own


def _find(backbone: PreTrainedModel, name: str) -> nn.Linear:
    """Find a layer by its name in the class with a head, in any version of transformers."""
    modules = dict(backbone.named_modules())
    paths = {new + name.removeprefix(old) for old, new in PREFIXES if name.startswith(old)}
    found = [modules[path] for path in paths if isinstance(modules.get(path), nn.Linear)]
    if len(found) != 1:
        raise ValueError(
            f"the adapter's layer {name} has no place in {type(backbone).__name__}: there is no linear layer "
            f"{' or '.join(sorted(paths))}."
        )
    return found[0]


def _split(own: dict[str, Tensor], checkpoint: Any, hidden_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the Meta Tokens [R_q + R_c, hidden] and the parts of the projection, if there is one."""
    tokens = [value for name, value in own.items() if name.endswith(META_TOKENS)]
    if len(tokens) != 1:
        raise ValueError(
            f"{checkpoint} holds {len(tokens)} {META_TOKENS} instead of one: these are not the paper's weights."
        )
    parts = [(name.rsplit(".", 1)[1], value) for name, value in own.items() if f"{PROJECTION}." in name]
    projection = dict(parts)
    fits = not projection or {"weight"} <= projection.keys() <= {"weight", "bias"}
    if not fits or len(parts) != len(projection):
        names = sorted(name for name, _ in parts)
        raise ValueError(f"the projection of {checkpoint} holds {names} instead of one weight and one bias.")
    for name, value in own.items():
        size = (len(projection["weight"]),) if name.endswith(".bias") else (len(value), hidden_size)
        if tuple(value.shape) != size or not value.isfinite().all():
            raise ValueError(
                f"{name} of {checkpoint} is of shape {tuple(value.shape)}: expected {size} finite numbers, as the "
                "hidden size of the backbone asks for."
            )
    return tokens[0], projection
