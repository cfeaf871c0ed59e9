"""Loading a backbone whole or not at all: headless, from under a head, or from inside a trained retriever."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .processing_metaembed import PROCESSOR_FILE, MetaEmbedProcessor

logger = logging.get_logger(__name__)

# The files that travel with a checkpoint, and all that a person who trusts its code must read.
TRAVELLING = tuple(
    f"{name}_metaembed.py"
    for name in ("configuration", "inputs", "processing", "modeling", "loading", "scoring", "sentence")
)

# What sentence-transformers reads.
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_metaembed.MetaEmbedTransformer"}]
SENTENCE_CONFIG = {
    "model_type": "MultiVectorEncoder",
    "similarity_fn_name": "maxsim",
    "prompts": {"query": None, "document": None},
    "default_prompt_name": None,
    "requirements": {"sentence-transformers": ">=6.0.0", "transformers": ">=5.20.0"},
}

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


def grow_embedding(backbone: PreTrainedModel, token_ids: list[int], vocabulary: int, seed: int) -> None:
    """Give every Meta Token a row of its own in the backbone's input embedding.

    The rows are drawn from a normal distribution with the mean and the standard deviation, dimension by dimension, of
    the rows of the tokens that were there before: at home in the space that the backbone knows, and all different.

    Args:
        backbone: Changed in place; its embedding grows where the tokens do not fit its spare rows.
        token_ids: Ids of the Meta Tokens, the last ones of the vocabulary.
        vocabulary: Number of tokens before the Meta Tokens, whose rows are trained.
        seed: Seed of the draw.
    """
    rows = backbone.get_input_embeddings().weight.shape[0]
    if token_ids[-1] >= rows:
        text_config = backbone.config.get_text_config()
        extra = rows - text_config.vocab_size  # some backbones keep rows beyond their vocabulary size
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # for further tables that some backbones keep, and grow along
            backbone.resize_token_embeddings(token_ids[-1] + 1 + extra, mean_resizing=False)
        text_config.vocab_size = token_ids[-1] + 1
    with torch.no_grad():
        weight = backbone.get_input_embeddings().weight
        known = weight[:vocabulary].float()  # [vocabulary, hidden]
        noise = torch.randn(len(token_ids), weight.shape[1], generator=torch.Generator().manual_seed(seed))
        drawn = known.mean(dim=0) + known.std(dim=0) * noise.to(weight.device)
        weight[token_ids[0] : token_ids[-1] + 1] = drawn.to(weight.dtype)


def gather_weights(model: nn.Module) -> dict[str, Any] | None:
    """Return the whole weights of a model that is sharded over several processes (FSDP2), or None where it is not.

    Args:
        model: The model, in every process.

    Returns:
        The weights on the CPU in the first process, and nothing in the others.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    # Of the state dictionary: after an evaluation, the parameters themselves may be whole for the moment.
    if not any(isinstance(value, DTensor) for value in model.state_dict().values()):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def import_peft() -> Any:
    """Return the module `peft`, which users without adapters need not have."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'peft>=0.20'") from error
    return peft


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


def write_repository_files(folder: Path, config: Any) -> None:
    """Add to a saved model the Python files and what sentence-transformers reads.

    Settings of sentence-transformers that are there already are kept, except prompts that differ from the
    configuration's instructions.

    Args:
        folder: Where the model was saved.
        config: Its configuration.
    """
    for name in TRAVELLING:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    path = folder / "config_sentence_transformers.json"
    settings = {**SENTENCE_CONFIG, **(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})}
    instructions = {"query": config.query_instruction, "document": config.document_instruction}
    settings["prompts"] = {
        name: instructions.get(name, text) if text else text for name, text in settings["prompts"].items()
    }
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "modules.json").write_text(json.dumps(MODULES, indent=2) + "\n", encoding="utf-8")
