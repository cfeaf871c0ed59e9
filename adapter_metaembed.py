"""Adapters (PEFT): the paper's LoRA recipe, and adapter repositories that stand on their own.

An adapter repository holds the LoRA weights, the rows of the Meta Tokens and the projection, and beside them the
configuration and the processor. From these and the plain backbone that it names, the whole model is rebuilt.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers.integrations.peft
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .backbone_metaembed import grow_embedding
from .loading_metaembed import HUB_ARGUMENTS, check_unused, headless, load_backbone
from .processing_metaembed import PROCESSOR_FILE, MetaEmbedProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def import_peft() -> Any:
    """Return the module `peft`, which users without adapters do not need.

    Raises:
        ImportError: If it is not installed, or older than the installed transformers asks for.
    """
    needed = getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0")
    try:
        installed = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"adapters need peft: pip install 'peft>={needed}'") from None
    if Version(installed) < Version(needed):
        raise ImportError(
            f"transformers {transformers.__version__} needs peft>={needed}, but peft {installed} is installed. Run "
            f"pip install --upgrade 'peft>={needed}' or, if there is no such release yet, "
            f"pip install 'transformers<{transformers.__version__}'"
        )
    import peft

    return peft


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


def find_adapter(source: str | Path, **hub: Any) -> dict[str, Any] | None:
    """Return the adapter configuration of a repository, or None where it is no adapter repository.

    Args:
        source: Hub id or folder.
        **hub: Where to load from (`revision`, `cache_dir`, ...).
    """
    path = cached_file(source, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False, **hub)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def lasting_name(source: str | Path) -> str:
    """Return a Hub id as it is, and a folder by its full path: a relative one may be taken for an id elsewhere."""
    return str(Path(source).absolute()) if Path(source).is_dir() else str(source)


def commit_of(source: str | Path | None, **hub: Any) -> str | None:
    """Return the commit of a Hub repository that loading from it now reads, or None for a folder."""
    if source is None:
        return None
    return extract_commit_hash(cached_file(source, "config.json", **hub), None)


def load_with_adapter(
    cls: Any,
    source: str | Path,
    adapter: dict[str, Any],
    hub: dict[str, Any],
    is_trainable: bool = False,
    **kwargs: Any,
) -> Any:
    """Rebuild a model from an adapter repository and the model that it names.

    Args:
        cls: `MetaEmbedModel`.
        source: Hub id or folder of the adapter.
        adapter: Its adapter configuration.
        hub: Where to load `source` from.
        is_trainable: Whether the adapter is to be trained further.
        **kwargs: For `AutoModel.from_pretrained` of the base.

    Returns:
        The model with its adapter, in evaluation mode.

    Raises:
        ValueError: If a weight of the base or of the adapter is missing, or what tells how to rebuild the model.
    """
    check_stands_alone(source, adapter, hub)
    for name in (*HUB_ARGUMENTS, "adapter_kwargs"):
        kwargs.pop(name, None)
    trusted = kwargs.get("trust_remote_code", __name__.startswith("transformers_modules."))
    config = kwargs.pop("config", None) or cls.config_class.from_pretrained(source, **hub)
    base, commit = adapter["base_model_name_or_path"], adapter.get("revision")
    base_hub = {**{name: hub[name] for name in hub if name not in ("revision", "subfolder")}, "revision": commit}
    missing: set[str] = set()
    if PreTrainedConfig.get_config_dict(base, **base_hub)[0].get("model_type") == config.model_type:
        model = cls.from_pretrained(base, **base_hub, **kwargs)
        config.backbone_config = model.config.backbone_config
        model.config = config
    else:
        whole, _, missing = load_backbone(base, **base_hub, **kwargs)
        backbone = headless(whole)
        ids = [*config.query_token_ids, *config.document_token_ids]
        grow_embedding(backbone, ids, vocabulary=ids[0], seed=0)  # the adapter brings the values
        config.backbone_config = backbone.config
        model = cls(config, backbone).eval()
        if model.projection is not None:
            model.projection.to(backbone.device, backbone.dtype)
    model.processor = MetaEmbedProcessor.from_pretrained(source, trust_remote_code=trusted, **hub)
    model.adapter_base = (base, commit)
    model.load_adapter(str(source), is_trainable=is_trainable, adapter_kwargs=hub)
    if missing:
        check_unused(base, backbone, missing, model.embed(**model.processor.process_documents("a").to(model.device)))
    return model


def check_stands_alone(source: str | Path, adapter: dict[str, Any], hub: dict[str, Any]) -> None:
    """Raise if an adapter repository does not hold, or name, what the model is rebuilt from.

    Raises:
        ValueError: If it names no base, or holds no configuration or no processor.
    """
    lacks = [
        f"no {name}"
        for name in ("config.json", PROCESSOR_FILE)
        if cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub) is None
    ]
    if not adapter.get("base_model_name_or_path"):
        lacks.insert(0, f"no base_model_name_or_path in its {ADAPTER_CONFIG}")
    if lacks:
        raise ValueError(
            f"the adapter {source} does not stand on its own: it holds {', '.join(lacks)}. It was saved by peft "
            "(get_peft_model), which knows only weights. Make the model as it was before training, "
            f"MetaEmbedModel.from_backbone(...), then model.load_adapter({str(source)!r}), and save that: "
            "model.save_pretrained(folder). Adapters made with model.add_adapter(lora_config(model)) are saved whole."
        )


def adapter_parameters(model: PreTrainedModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield the name of each parameter of adapters in `model`, the adapter that it belongs to, and the parameter."""
    for prefix, module in model.named_modules():
        for layer in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())):
            own = getattr(module, layer, None)
            for name, value in own.named_parameters() if isinstance(own, nn.Module) else ():
                yield f"{prefix}.{layer}.{name}", name.partition(".")[0], value


def check_adapter_whole(model: PreTrainedModel, given: set[str]) -> None:
    """Raise if a state dict has some weights of an adapter and lacks others.

    Args:
        model: The model that the state dict is loaded into.
        given: Names in the state dict.

    Raises:
        ValueError: If weights of an adapter are lacking.
    """
    expected: dict[str, set[str]] = {}
    for name, adapter, _ in adapter_parameters(model):
        expected.setdefault(adapter, set()).add(name)
    for adapter, names in expected.items():
        if names & given and (missing := names - given):
            raise ValueError(
                f'{len(missing)} weights of the adapter "{adapter}" are missing from what is loaded, so would be '
                f"random: {min(missing)}, ... It was not saved whole, or is of another model."
            )


def upcast_adapter(model: PreTrainedModel) -> None:
    """Hold the weights of adapters in float32 where the backbone's are shorter: steps of training are lost in those.

    What follows peft's habit in `get_peft_model`, which transformers' `add_adapter` does not.
    """
    for _, _, value in adapter_parameters(model):
        if value.dtype in (torch.float16, torch.bfloat16):
            value.data = value.data.float()


@torch.no_grad()
def fill_adapter(model: PreTrainedModel, source: str | Path, adapter_name: str, **hub: Any) -> None:
    """Set the trained parts of `model` to what the repository holds, whole or not at all.

    Args:
        model: A model with such an adapter.
        source: Hub id or folder of the adapter.
        adapter_name: Name of the adapter in the model.
        **hub: Where to load from.

    Raises:
        ValueError: If a part is missing (and so would be random), left over, or of another shape.
    """
    prefix = "base_model.model."
    weights = load_file(cached_file(source, ADAPTER_WEIGHTS, **hub))
    saved = {name.removeprefix(prefix): value for name, value in weights.items()}
    actual = model.get_adapter_state_dict(adapter_name)
    problems = {
        "missing from the adapter, so random": actual.keys() - saved.keys(),
        "in the adapter but not in the model": saved.keys() - actual.keys(),
        "of another shape": {name for name in actual.keys() & saved.keys() if actual[name].shape != saved[name].shape},
    }
    found = [f"{len(names)} weights {what}: {min(names)}, ..." for what, names in problems.items() if names]
    if found:
        raise ValueError(f"the adapter {source} did not load whole: {'; '.join(found)}")
    for name, value in saved.items():
        actual[name].copy_(value)


def name_base(folder: Path, base: tuple[str | None, str | None]) -> None:
    """Write the model that an adapter belongs to into its saved configuration.

    Args:
        folder: Where the adapter was saved.
        base: Hub id and commit of the model.

    Raises:
        ValueError: If the base is not known.
    """
    name, commit = base
    if name is None:
        raise ValueError(
            "an adapter must name the model it belongs to, and this one was made of a loaded backbone that came from "
            "nowhere. Pass the backbone to from_backbone by its Hub id, or set model.adapter_base = (id, None)."
        )
    if Path(name).exists():
        logger.warning(
            f"The adapter in {folder} names a folder of this machine as its base ({name}): nobody else can load it. "
            "Set model.adapter_base = (Hub id, None) before saving."
        )
    path = folder / ADAPTER_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"], content["revision"] = name, commit
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_saves_whole(model: PreTrainedModel, folder: Path) -> None:
    """Raise if what is saved would not load as `model`.

    Raises:
        ValueError: If the model was wrapped with `get_peft_model`, so that its weights have other names, or if
            `folder` holds an adapter and the model has none, or the other way round.
    """
    adapter = model._hf_peft_config_loaded
    if not adapter and any("lora_A" in name for name, _ in model.named_parameters()):
        raise ValueError(
            "this model was wrapped with get_peft_model, so it can no longer save itself. Save what "
            "peft_model.merge_and_unload() returns; or use model.add_adapter(lora_config(model)) instead of "
            "get_peft_model: its model.save_pretrained saves an adapter that every loader takes."
        )
    other = "model.safetensors" if adapter else ADAPTER_CONFIG
    if (folder / other).is_file():
        what, held = ("an adapter", "a whole model") if adapter else ("a whole model", "an adapter")
        raise ValueError(f"{folder} holds {held} ({other}); {what} saved beside it would not load. Save elsewhere.")


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
