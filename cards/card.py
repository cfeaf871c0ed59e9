"""The model card: the values for the template, and the parts of an earlier card that are still true."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id, yaml_dump
from torch import Tensor, nn
from transformers.utils import cached_file

from ..configuration_metaembed import SIDES
from ..evaluation.tables import markdown_table

TEMPLATE = Path(__file__).with_name("template.md")

LIBRARY = "sentence-transformers"
PIPELINE_TAG = "visual-document-retrieval"
TAGS = ["metaembed", "multi-vector", "late-interaction", "matryoshka", "sentence-transformers"]

# Marks our cards, which are rewritten at every save; cards that people write are kept. It never changes, since saved
# cards contain it.
MARK = "<!-- Written by metaembed, anew at every save. Delete this line to keep what you change. -->"

SMALL = 2**16  # numbers of a tensor that the fingerprint reads completely

Quality = Mapping[tuple[int, int], Mapping[str, float]]


def is_ours(card: str | None) -> bool:
    """Return whether this package wrote a model card, and not a person."""
    return card is not None and MARK in card


def write_card(model: Any, folder: Path, repository: str) -> None:
    """Write the model card of a saved model, unless the folder has one that a person wrote.

    Quality, training and licence are copied from an earlier card of ours, in the folder or at the source of the model,
    if it describes the same weights.

    Args:
        model: The `MetaEmbedModel`.
        folder: Where it was saved.
        repository: What the card calls it, in the title and in the examples.
    """
    path = Path(folder) / "README.md"
    present = path.read_text(encoding="utf-8") if path.is_file() else None
    if present is not None and not is_ours(present):
        return
    weights = fingerprint(model, [getattr(model.config, f"{side}_instruction") for side in SIDES])
    earlier, said = still_true((present, card_of_source(model)), weights)
    data = ModelCardData(
        **{
            **said,
            **base_fields(model),
            "library_name": LIBRARY,
            "pipeline_tag": PIPELINE_TAG,
            "tags": list(dict.fromkeys([*TAGS, *said.get("tags", [])])),
        }
    )
    fields = dict(card_fields(model), weights=weights, earlier=earlier, title=repository, repository=repository)
    ModelCard.from_template(data, template_path=str(TEMPLATE), **fields).save(path)


def fingerprint(model: nn.Module, instructions: Iterable[str | None]) -> str | None:
    """Return a digest of everything that measured quality depends on, without reading all of the weights.

    It covers the instructions, and the type, the shape and a sample of each parameter and saved buffer in memory.
    Tensors of up to 65,536 numbers (norms, biases, small adapters) are read completely. Of a larger one, at least one
    number of every row is read, in columns that shift from row to row. Training, merging an adapter, replacing rows of
    an embedding table and initializing anew change whole rows at least, so they change the digest; so does another
    dtype. For 10 billion parameters that is 5 million numbers.

    The opposite error, two digests of the same weights (such as those of a sharded model), only costs the card a
    sentence.

    Args:
        model: The model.
        instructions: The default instructions of queries and documents, on which quality depends as well.

    Returns:
        The digest, or None if the weights cannot be read here (because they are offloaded, for instance).
    """
    digest = hashlib.sha256(json.dumps(list(instructions)).encode())
    seen = 0
    for tensor in saved_tensors(model):
        try:
            sample = sample_of(tensor)
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            copy = sample.cpu().contiguous().clone()  # of its own memory: FSDP cannot free what numpy has viewed
            digest.update(copy.view(torch.uint8).numpy().tobytes())
        except RuntimeError:  # on the meta device, or of a class that has no plain numbers
            return None
        seen += sample.numel()
    return digest.hexdigest()[:32] if seen else None


def saved_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and the buffers that are saved, in the order of the modules, which names do not enter."""
    for module in model.modules():
        yield from (tensor for tensor in module._parameters.values() if tensor is not None)
        kept = set(module._buffers) - module._non_persistent_buffers_set
        yield from (tensor for name, tensor in module._buffers.items() if name in kept and tensor is not None)


def sample_of(tensor: Tensor) -> Tensor:
    """Return a small tensor whole, and of a larger one at least one number of every row, as a vector."""
    tensor = tensor.detach()
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # the part of a sharded one that is here
    if tensor.numel() <= SMALL:
        return tensor.flatten()
    columns = tensor.shape[-1]
    # One less than a row, so that no row is passed over, and every row is met at another column than the one before.
    return tensor.flatten()[:: max(1, min(columns, tensor.numel() // columns) - 1)]


def card_of_source(model: Any) -> str | None:
    """Return the model card at the source of a model, or None if there is none."""
    source, where = model.config._name_or_path, getattr(model, "_hub_arguments", None)
    if not source or where is None:
        return None
    try:
        path = cached_file(source, "README.md", _raise_exceptions_for_missing_entries=False, **where)
    except OSError:
        return None
    return None if path is None else Path(path).read_text(encoding="utf-8")


def still_true(cards: Iterable[str | None], weights: str | None) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the content of the first card of ours that describes the same weights.

    Args:
        cards: Earlier cards. None: there is none.
        weights: The fingerprint of the weights.

    Returns:
        Its sections by title, and the metadata that the weights do not determine. Both are empty if there is no such
        card.
    """
    for text in cards:
        if text is not None and weights is not None and is_ours(text) and f"<!-- Weights: {weights} -->" in text:
            sections = dict(re.findall(r"^## (\w+)\n\n(.*?)\n*(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
            data = ModelCard(text).data.to_dict()
            return sections, {name: data[name] for name in ("language", "license", "datasets", "tags") if name in data}
    return {}, {}


def hub_id(name: str | None) -> str | None:
    """Return `name` if others can find it on the Hub, and None if it is a folder of this machine."""
    if not name or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def base_fields(model: Any) -> dict[str, Any]:
    """Return the base model fields of a card's metadata: the base of an adapter, or else the backbone."""
    is_adapter = model._hf_peft_config_loaded
    base = hub_id(model.adapter_base[0] if is_adapter else model.config.base_model)
    return {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"} if base else {}


def card_fields(model: Any, quality: Quality | None = None, quality_of: str = "") -> dict[str, Any]:
    """Return the values of the template that the model itself determines.

    Args:
        model: The `MetaEmbedModel`.
        quality: Metrics by budget, if they were measured with these weights.
        quality_of: The data that they were measured on.
    """
    config = model.config
    dim = config.embedding_dim or config.hidden_size
    small_query, small_document = config.budgets[len(config.budgets) // 2]
    takes_images = model.processor.image_processor is not None
    return dict(
        mark=MARK,
        base=base_fields(model).get("base_model"),
        dim=dim,
        num_query_tokens=config.num_query_tokens,
        num_document_tokens=config.num_document_tokens,
        token_projection=config.token_projection,
        small_query=small_query,
        small_document=small_document,
        is_adapter=model._hf_peft_config_loaded,
        takes_images=takes_images,
        modalities="text and images" if takes_images else "text",
        quality=bool(quality),
        quality_of=quality_of,
        budget_table=budget_table(config.budgets, dim, quality or {}),
    )


def budget_table(budgets: Iterable[Sequence[int]], dim: int, quality: Quality) -> str:
    """Return a Markdown table of the budgets: their bytes, and their quality if it was measured."""
    names = [name for name in next(iter(quality.values()), {}) if name.split("@")[0] in ("ndcg", "recall", "mrr")]
    rows = []
    for r_q, r_c in sorted({(r_q, r_c) for r_q, r_c in budgets} | set(quality)):
        values = quality.get((r_q, r_c), {})
        rows.append([r_q, r_c, f"{r_c * dim * 4:,}", *(f"{values[n]:.4f}" if n in values else "" for n in names)])
    return markdown_table(["query vectors", "document vectors", "bytes a document (float32)", *names], rows)


def write_eval_results(
    folder: Path, dataset: str, task: str, quality: Quality, metric: str, notes: str = ""
) -> list[Path]:
    """Write the Hub's `.eval_results` files, one per budget, for the pages of the model and of the data set.

    Args:
        folder: The saved model.
        dataset: Hub id of the data set that the model was evaluated on.
        task: Name of the task in that data set.
        quality: Metrics by budget.
        metric: Which of them to report.
        notes: Further remarks on the measurement.

    Returns:
        The files.
    """
    files = []
    for (r_q, r_c), values in quality.items():
        entry = {
            "dataset": {"id": dataset, "task_id": task},
            "value": round(100 * values[metric], 2),
            "notes": ", ".join(filter(None, [f"{metric} x 100, with {r_q} query and {r_c} document vectors", notes])),
        }
        name = "".join(c if c.isalnum() else "-" for c in f"{dataset} {task}".lower())
        files.append(folder / ".eval_results" / f"{name}-{r_q}x{r_c}.yaml")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_text(yaml_dump([entry], sort_keys=False), encoding="utf-8")
    return files
