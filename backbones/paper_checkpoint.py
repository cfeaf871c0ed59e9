"""Converts weights trained with the paper's own code to a [`MetaEmbedModel`].

The paper's model is the backbone's class with a head, and beside it `prompt_embed_tokens` [R_q + R_c, hidden], the
Meta Tokens with the query ones first, and `custom_text_proj`, the projection, where there is one. A sequence is
`[input; M_q; M_c]` for both sides. A checkpoint is a full state dict, or a PEFT adapter with these two in full.
"""

from __future__ import annotations

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
from ..loading_metaembed import HUB_ARGUMENTS, check_loading, headless, names_inside
from .create import SETTINGS, set_linear
from .loading import load_backbone

WEIGHTS = re.compile(r"(adapter_model|model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
ADAPTER_CONFIG = "adapter_config.json"
META_TOKENS = "prompt_embed_tokens.weight"
PROJECTION = "custom_text_proj"

# Prefixes of a layer's name in the class with a head, by the version of transformers, and in the class without one.
PREFIXES = (
    ("", ""),
    ("model.", ""),
    ("model.", "language_model."),
    ("language_model.model.", "language_model."),
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations of LoRA that subtract something from the base


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
    """Create a model from weights trained with the paper's own code.

    Args:
        cls: The class of the model, [`MetaEmbedModel`].
        checkpoint: Hub id or folder: a full state dict with its `config.json`, or a PEFT adapter.
        base: Hub id or folder of the plain backbone that an adapter was trained on. None: the one that the adapter
            names. The processor comes from it too, where the checkpoint has none.
        adapter: Hub id or folder of an adapter to merge into a full checkpoint.
        processor: The backbone's processor. None: the one of `base` or of the checkpoint.
        num_query_tokens: R_q: how many of the Meta Tokens are for queries. The rest, R_c, are for documents.
        revision: Branch, tag or commit of `checkpoint`.
        base_revision: Branch, tag or commit of the base. None: the one that the adapter names with its base, else the
            newest.
        adapter_revision: Branch, tag or commit of `adapter`.
        subfolder: Folder of the weights inside `checkpoint`.
        **kwargs: Arguments of [`MetaEmbedModel.from_backbone`] (`budgets`, `query_instruction`, ...) go there;
            `cache_dir`, `token`, `local_files_only` and `force_download` apply to everything that is loaded; others
            (`dtype`, `attn_implementation`, ...) go to `from_pretrained` of the backbone.

    Returns:
        The model, with `document_sees_query_tokens=True`, the layout of the paper's code.

    Raises:
        TypeError: If `num_query_tokens` is not a whole number, or a keyword is unknown.
        ValueError: If the checkpoint has unexpected weights or weights of a wrong shape, a weight of the backbone is
            missing, the Meta Tokens are missing or too few, or an adapter is of a kind that is not supported.
    """
    check_count("num_query_tokens", num_query_tokens, 2**31)
    settings = {name: kwargs.pop(name) for name in (*SETTINGS, "seed") if name in kwargs}
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    options = {"dtype": "auto", **kwargs}
    folder = _folder(checkpoint, revision, hub) / subfolder
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if is_adapter and base is None:
        base, named_revision = _base_of(folder)
        base_revision = base_revision or named_revision
    base_hub = {**hub, "revision": base_revision} if base_revision else hub
    if is_adapter:
        backbone, base_processor = _load_base(base, **base_hub, **options)
        own = _merge_adapter(backbone, folder)
    else:
        backbone, own = _load_full(folder, **options)
        base_processor = None
    if adapter is not None:
        own.update(_merge_adapter(backbone, _folder(adapter, adapter_revision, hub)))
    tokens, projection = _split(own, checkpoint, backbone.get_input_embeddings().weight.shape[1])
    if num_query_tokens >= len(tokens):
        raise ValueError(
            f"{checkpoint} has {len(tokens)} Meta Tokens, for queries and documents together, so num_query_tokens "
            f"must be between 1 and {len(tokens) - 1}, got {num_query_tokens}."
        )
    model = cls.from_backbone(
        backbone,
        processor=processor or base_processor or _processor(base or folder, **(base_hub if base else {})),
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
    model.is_untrained = False
    return model


def _folder(source: str | Path, revision: str | None, hub: dict[str, Any]) -> Path:
    """Return a local folder as it is, and that of a Hub repository after downloading it."""
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(str(source), revision=revision, **hub))


def _read(folder: Path) -> dict[str, Tensor]:
    """Return all the weights in a folder."""
    files = sorted(path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name))
    files = [path for path in files if path.suffix == ".safetensors"] or files  # some publish the same weights in both
    if not files:
        raise ValueError(f"{folder} has no weights: expected model*.safetensors, adapter_model.safetensors or *.bin.")
    state: dict[str, Tensor] = {}
    for path in files:
        part = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
        if twice := state.keys() & part.keys():
            raise ValueError(f"{folder} has {min(twice)} more than once: in {path.name}, and in a file before it.")
        state.update(part)
    return state


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a .bin file, without running code in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, and code in it might run, so it is not read.") from error


def _is_own(name: str) -> bool:
    """Whether a weight is one of the Meta Tokens or the projection, and not the backbone's."""
    return name.endswith((META_TOKENS, f"{PROJECTION}.weight", f"{PROJECTION}.bias"))


def _processor(source: str | Path, **hub: Any) -> Any:
    """Load the processor of a checkpoint or a base."""
    try:
        return AutoProcessor.from_pretrained(source, **hub)
    except OSError as error:
        raise ValueError(
            f"{source} has no processor: pass the backbone's as `processor`, or its repository as `base`."
        ) from error


def _base_of(folder: Path) -> tuple[str, str | None]:
    """Return the base model that an adapter names, and its revision."""
    config = _adapter_config(folder)
    if not config.get("base_model_name_or_path"):
        raise ValueError(f"the adapter {folder} names no base model: pass its backbone as `base`.")
    return config["base_model_name_or_path"], config.get("revision")


def _load_base(base: str | Path, **options: Any) -> tuple[PreTrainedModel, Any]:
    """Return the backbone that an adapter was trained on, loaded completely, and its processor."""
    whole, processor, missing = load_backbone(base, **options)
    check_loading(base, {"missing_keys": missing})
    return headless(whole), processor


def _load_full(folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return the backbone in a full state dict, and its Meta Tokens and projection by their names.

    transformers loads the weights into the class with a head, by its own rules for old names.
    """
    state = _read(folder)
    own = {name: state.pop(name) for name in list(state) if _is_own(name)}
    config = AutoConfig.from_pretrained(folder)
    headed = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if headed is None:
        raise ValueError(
            f"{folder} is a {type(config).__name__}: expected the configuration of a vision-language model."
        )
    model, info = headed.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **options)
    backbone = headless(model)
    missing = names_inside(model, backbone, info["missing_keys"])  # a head's may be missing: it is not used
    check_loading(folder, {**info, "missing_keys": missing})
    return backbone, own


def _adapter_config(folder: Path) -> dict[str, Any]:
    """Read an adapter's settings."""
    return json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))


def _check_adapter(folder: Path, config: dict[str, Any]) -> None:
    """Raise unless an adapter is plain LoRA, the same for every layer, on an unchanged base."""
    if str(config.get("peft_type")).upper() != "LORA":
        raise ValueError(f"the adapter {folder} is of peft_type {config.get('peft_type')!r}: only LORA is supported.")
    for setting in ("rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "layer_replication"):
        if config.get(setting):
            raise ValueError(f"the adapter {folder} uses {setting}={config[setting]!r}, which is not supported.")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"the adapter {folder} was initialised with init_lora_weights={config['init_lora_weights']!r}, which "
            "changes the weights of the base too, so it does not fit the base. Merge it with peft, and pass the full "
            "weights."
        )
    if missing := {"r", "lora_alpha"} - config.keys():
        raise ValueError(f"{folder}/{ADAPTER_CONFIG} has no {' and no '.join(sorted(missing))}.")


def _merge_adapter(backbone: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Merge an adapter's LoRA weights into the backbone, and return its Meta Tokens and projection by their names."""
    config = _adapter_config(folder)
    _check_adapter(folder, config)
    own, pairs = _read_adapter(folder)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    for name, (down, up) in pairs.items():
        _merge_layer(name, _find(backbone, name).weight, down, up, config["r"], scale)
    return own


def _read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Return an adapter's Meta Tokens and projection by their names, and the LoRA weights of each layer.

    Args:
        folder: Folder of the adapter.

    Returns:
        The former, as PEFT names them in the model; and for the name of each layer, down [r, in] and up [out, r].

    Raises:
        ValueError: If a weight is there twice under different names, or is none of these.
    """
    own: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, value in _read(folder).items():
        if ".original_module." in name:  # PEFT's copy of what `modules_to_save` replaces
            continue
        short = re.sub(r"^base_model\.model\.|\.default\b|\.modules_to_save\b", "", name)
        if short in own or short in rest:
            raise ValueError(f"the adapter {folder} has {short} more than once, also as {name}: which one counts?")
        (own if _is_own(short) else rest)[short] = value
    down, up = ".lora_A.weight", ".lora_B.weight"
    layers = sorted(name.removesuffix(down) for name in rest if name.endswith(down))
    pairs = {layer: (rest.pop(layer + down), rest.pop(layer + up)) for layer in layers if layer + up in rest}
    if rest:
        raise ValueError(f"the adapter {folder} has {len(rest)} unexpected weights: {', '.join(sorted(rest)[:5])}.")
    return own, pairs


@torch.no_grad()
def _merge_layer(name: str, weight: Tensor, down: Tensor, up: Tensor, rank: int, scale: float) -> None:
    """Add a layer's LoRA weights, up [out, r] by down [r, in], to its weight [out, in]."""
    shapes, wanted = (tuple(up.shape), tuple(down.shape)), ((weight.shape[0], rank), (rank, weight.shape[1]))
    if shapes != wanted or not (up.isfinite().all() and down.isfinite().all()):
        raise ValueError(
            f"the adapter's layer {name} is {shapes[0]} by {shapes[1]}: expected {wanted[0]} by {wanted[1]} "
            "finite numbers."
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    delta = (up.to(dtype) @ down.to(dtype)) * scale
    weight += delta.to(weight.device, weight.dtype)


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
    """Return the Meta Tokens [R_q + R_c, hidden], and the projection's weight and bias where there is one."""
    tokens = [value for name, value in own.items() if name.endswith(META_TOKENS)]
    if len(tokens) != 1:
        raise ValueError(
            f"{checkpoint} has {len(tokens)} {META_TOKENS} instead of one: these are not the paper's weights."
        )
    parts = [(name.rsplit(".", 1)[1], value) for name, value in own.items() if f"{PROJECTION}." in name]
    projection = dict(parts)
    fits = not projection or {"weight"} <= projection.keys() <= {"weight", "bias"}
    if not fits or len(parts) != len(projection):
        names = sorted(name for name, _ in parts)
        raise ValueError(f"the projection of {checkpoint} has {names} instead of one weight and one bias.")
    for name, value in own.items():
        size = (len(projection["weight"]),) if name.endswith(".bias") else (len(value), hidden_size)
        if tuple(value.shape) != size or not value.isfinite().all():
            raise ValueError(
                f"{name} of {checkpoint} is of shape {tuple(value.shape)}: expected {size} finite numbers, according "
                "to the hidden size of the backbone."
            )
    return tokens[0], projection
