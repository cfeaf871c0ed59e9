"""Loading and saving checkpoints, backbones and adapters: completely, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .configuration_metaembed import SIDES, hub_id, of_package
from .processing_metaembed import PROCESSOR_FILE, MetaEmbedProcessor

logger = logging.get_logger(__name__)

# The files that travel with a checkpoint: all the code that `trust_remote_code=True` runs.
PARTS = ("configuration", "inputs", "processing", "modeling", "loading", "scoring", "sentence")
TRAVELLING = tuple(f"{part}_metaembed.py" for part in PARTS)

# What sentence-transformers reads.
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_metaembed.MetaEmbedTransformer"}]
SENTENCE_CONFIG = {
    "model_type": "MultiVectorEncoder",
    "similarity_fn_name": "maxsim",
    "prompts": {"query": None, "document": None},
    "default_prompt_name": None,
    "requirements": {"sentence-transformers": ">=6.0.0", "transformers": ">=5.20.0"},
}

# Arguments of `from_pretrained` that say where to load from.
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def find_file(source: str | Path, name: str, **hub: Any) -> str | None:
    """Return the path of a file of a repository (Hub id or folder), or None if there is no such file."""
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)


def commit_of(source: str | Path | None, **hub: Any) -> str | None:
    """Return the commit of a Hub repository that loading from it now reads, or None for a folder."""
    return None if source is None else extract_commit_hash(find_file(source, "config.json", **hub), None)


def check_loading(source: Any, info: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if weights of `source` were not loaded completely, as the `info` of transformers tells."""
    problems = []
    for kind, what in (
        ("missing_keys", "missing, so random"),
        ("mismatched_keys", "of another shape, so random"),
        ("unexpected_keys", "unexpected, so lost"),
    ):
        if keys := sorted(map(str, info.get(kind) or [])):
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            problems.append(f"{len(keys)} weights are {what}: {shown}")
    if problems:
        raise ValueError(f"the weights of {source} did not load completely: {'; '.join(problems)}.")


def load_plain_model(source: Any, **kwargs: Any) -> tuple[PreTrainedModel, set[str], list[str]]:
    """Load a model that contains a backbone: a plain backbone, one with a head, or a late-interaction retriever.

    Returns the model, of which [`headless`] is the backbone; the backbone's weights that are missing, allowed only
    if no embedding depends on them ([`check_unused`]); the unexpected weights, allowed only if a head's.

    Raises:
        ValueError: If a weight has another shape than the checkpoint's, or one of a retriever is missing.
    """
    hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    kind = type(AutoConfig.from_pretrained(source, **hub))
    retriever = kind not in MODEL_MAPPING and kind in transformers.MODEL_FOR_PRETRAINING_MAPPING
    autos = [transformers.AutoModelForPreTraining if retriever else AutoModel]
    if kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not retriever:  # the base class may miss weights
        autos.append(transformers.AutoModelForImageTextToText)
    candidates = []
    for auto in autos:
        model, info = auto.from_pretrained(source, output_loading_info=True, **kwargs)
        wrong = ("mismatched_keys", "missing_keys") if retriever else ("mismatched_keys",)
        check_loading(source, {name: info[name] for name in wrong})
        missing = names_inside(model, headless(model), info["missing_keys"])
        candidates.append((model, missing, info["unexpected_keys"]))
        if not missing:
            break
    return min(candidates, key=lambda candidate: len(candidate[1]))


def headless(model: PreTrainedModel) -> PreTrainedModel:
    """Return the base model that is the backbone: `model` itself, or the one under its head or in a retriever."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module) is MODEL_MAPPING.get(type(module.config), None):
            return module
    return model


def names_inside(model: nn.Module, backbone: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those of `names` (weights of `model`) that belong to `backbone`, under their names there."""
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    prefix = f"{prefix}." if prefix else ""
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def check_unused(source: Any, backbone: nn.Module, missing: set[str], rows: torch.Tensor) -> None:
    """Raise a `ValueError` if embeddings (`rows`, of every kind of input, with their graph) depend on missing weights.

    A base class may have parts that no checkpoint holds and no hidden state passes, such as a pooler: the graph tells.
    """
    parameters = {name: value for name, value in backbone.named_parameters() if name in missing}
    buffers = missing - parameters.keys()  # nothing tells whether these are used
    gradients = torch.autograd.grad(rows.sum(), list(parameters.values()), allow_unused=True) if parameters else []
    used = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    check_loading(source, {"missing_keys": [*buffers, *used]})


def resize_embedding(backbone: PreTrainedModel, last_id: int) -> None:
    """Make the backbone's input embedding, in place, large enough for `last_id`: spare rows are used first."""
    rows, text_config = backbone.get_input_embeddings().weight.shape[0], backbone.config.get_text_config()
    if last_id >= rows:
        extra = rows - text_config.vocab_size  # some backbones keep rows beyond their vocabulary size
        backbone.resize_token_embeddings(last_id + 1 + extra, mean_resizing=False)
        text_config.vocab_size = last_id + 1


def find_adapter(source: str | Path, **hub: Any) -> dict[str, Any] | None:
    """Return the adapter configuration of a repository (Hub id or folder), or None if it is not an adapter."""
    path = find_file(source, ADAPTER_CONFIG, **hub)
    return None if path is None else read_json(path)


def load_with_adapter(
    cls: Any, source: str | Path, adapter: dict[str, Any], hub: dict[str, Any], options: dict[str, Any]
) -> Any:
    """Rebuild a model of class `cls` from the repository of an adapter, `source`, and the base that it names.

    `adapter` is its configuration, `hub` says where to load it from, and `options` are those of `from_pretrained`.

    Raises:
        ValueError: If a weight or file is missing, or the base is an adapter itself or brings code nobody trusted.
    """
    options = {name: value for name, value in options.items() if name not in (*HUB_ARGUMENTS, "adapter_kwargs")}
    trusted, trusted_base = options.pop("trust_remote_code"), options.pop("trusted_base", None)
    is_trainable = options.pop("is_trainable", False)
    if import_peft := of_package("training.lora", "import_peft"):
        import_peft()  # before anything large is loaded
    base, commit = adapter.get("base_model_name_or_path") or "", adapter.get("revision")
    lacks = [] if base else [f"no base_model_name_or_path in its {ADAPTER_CONFIG}"]
    lacks += [f"no {name}" for name in ("config.json", PROCESSOR_FILE) if find_file(source, name, **hub) is None]
    if lacks:
        raise ValueError(
            f"the adapter {source} was saved by peft itself: it holds {', '.join(lacks)}. Create the model as before "
            f"training (MetaEmbedModel.from_backbone), then model.load_adapter({str(source)!r}), and save that."
        )
    config = options.pop("config", None) or cls.config_class.from_pretrained(source, **hub)
    base_hub = {**{name: hub[name] for name in hub if name not in ("revision", "subfolder")}, "revision": commit}
    if find_adapter(base, **base_hub) is not None:
        raise ValueError(f"{source} names {base} as its base, which is an adapter too: merge and save that one first.")
    content = PreTrainedConfig.get_config_dict(base, **base_hub)[0]
    missing: set[str] = set()
    if content.get("model_type") == config.model_type:  # no code of its repository is needed
        model, _ = cls._load_whole(base, **base_hub, **options)
        config.backbone_config = model.config.backbone_config
        model.config = config
    else:
        if trusted and trusted_base != base and "auto_map" in content:
            raise ValueError(
                f"the adapter {source} is based on {base}, which brings code of its own, and trust_remote_code=True "
                f"is trust in the adapter only. If you trust the base too, also pass trusted_base={base!r}."
            )
        options["trust_remote_code"] = trusted and trusted_base == base
        whole, missing, _ = load_plain_model(base, **base_hub, **options)
        backbone = headless(whole)
        resize_embedding(backbone, config.document_token_ids[-1])  # the adapter brings the values
        config.backbone_config = backbone.config
        model = cls(config, backbone).eval()
        for projection in filter(None, (model.projection, model.token_projection)):
            projection.to(backbone.device, backbone.dtype)
    trust = {"trust_remote_code": trusted, "trusted_base": trusted_base}
    model.processor = MetaEmbedProcessor.from_pretrained(source, **trust, **hub)
    model.adapter_base = (base, commit)
    model.load_adapter(str(source), is_trainable=is_trainable, adapter_kwargs=hub)
    if missing:
        check_unused(base, backbone, missing, model.embed(**model.processor.process_documents("a").to(model.device)))
    return model


def adapter_parameters(model: PreTrainedModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield, for each parameter of adapters in `model`, its name, the name of its adapter, and the parameter."""
    for prefix, module in model.named_modules():
        for layer in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())):
            own = getattr(module, layer, None)
            for name, value in own.named_parameters() if isinstance(own, nn.Module) else ():
                yield f"{prefix}.{layer}.{name}", name.partition(".")[0], value


def upcast_adapter(model: PreTrainedModel) -> None:
    """Hold adapter weights in float32 (bfloat16 loses steps of training), as `get_peft_model` does."""
    for _, _, value in adapter_parameters(model):
        if value.dtype in (torch.float16, torch.bfloat16):
            value.data = value.data.float()


@torch.no_grad()
def fill_adapter(model: PreTrainedModel, source: str | Path, adapter_name: str, **hub: Any) -> None:
    """Set the trained parts of `model` to the weights that `source` holds, completely or not at all."""
    weights = load_file(cached_file(source, ADAPTER_WEIGHTS, **hub))
    saved = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    actual = model.get_adapter_state_dict(adapter_name)
    missing, unexpected = actual.keys() - saved.keys(), saved.keys() - actual.keys()
    mismatched = [name for name in actual.keys() & saved.keys() if actual[name].shape != saved[name].shape]
    info = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}
    check_loading(f"the adapter {source}", info)
    for name, value in saved.items():
        actual[name].copy_(value)


def check_saves_whole(model: Any, folder: Path | None, publish: bool) -> None:
    """Raise if what is saved in `folder` would not load as `model`, or not for others if it is to `publish`."""
    config, adapter, base = model.config, model._hf_peft_config_loaded, model.adapter_base[0]
    config.validate()
    ids = [config.token_ids(side) for side in SIDES]
    last = max((side[-1] for side in ids if side), default=0)
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)  # not of the weight, which may be sharded
    dim = getattr(model.projection, "out_features", None)
    kinds = [("an adapter", ADAPTER_CONFIG), ("a whole model", "model.safetensors")]
    (what, _), (held, file) = kinds if adapter else reversed(kinds)
    holds_other = folder is not None and (folder / file).is_file()
    local = f"the adapter names a folder of this machine as its base ({base}): nobody else can load it. "
    local += "Set model.adapter_base = (Hub id, None) before saving."
    is_local = adapter and base is not None and hub_id(base) is None
    is_wrapped = not adapter and any("lora_A" in name for name, _ in model.named_parameters())
    differs = (config.embedding_dim, config.token_projection) != (dim, model.token_projection is not None)
    for problem, wrong in {
        "query_token_ids and document_token_ids must be set.": None in ids,
        f"model.config does not fit the weights: embedding_dim is {config.embedding_dim} for a projection to {dim}, "
        f"token_projection is {config.token_projection} for a {type(model.token_projection).__name__}, and the "
        f"last Meta Token is {last} of {rows} rows.": differs or (rows is not None and last >= rows),
        "this model was wrapped with get_peft_model. Save what peft_model.merge_and_unload() returns; or use "
        "model.add_adapter(lora_config(model)) instead of get_peft_model.": is_wrapped,
        f"{folder} holds {held} ({file}); {what} saved beside it would not load. Save elsewhere.": holds_other,
        "an adapter must name the model it belongs to, which is unknown for a backbone that was passed loaded. Pass "
        "its Hub id to from_backbone instead, or set model.adapter_base = (id, None).": adapter and base is None,
        local: is_local and publish,
    }.items():
        if wrong:
            raise ValueError(problem)
    if model._processor is not None:
        model.processor.check()
    if is_local:
        logger.warning(local)


def write_repository_files(folder: Path, model: Any) -> None:
    """Add to a saved model the Python files, what sentence-transformers reads and, of an adapter, what it belongs to.

    Settings of sentence-transformers that are there are kept, except prompts other than the instructions.
    """
    for name in TRAVELLING:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    path, config = folder / "config_sentence_transformers.json", model.config
    settings = {**SENTENCE_CONFIG, **(read_json(path) if path.is_file() else {})}
    prompts = settings["prompts"].items()
    settings["prompts"] = {s: p and getattr(config, f"{s}_instruction") if s in SIDES else p for s, p in prompts}
    contents = {path: settings, folder / "modules.json": MODULES}
    if model._hf_peft_config_loaded:
        config.save_pretrained(folder)
        path, (base, commit) = folder / ADAPTER_CONFIG, model.adapter_base
        contents[path] = {**read_json(path), "base_model_name_or_path": base, "revision": commit}
    for path, content in contents.items():
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
