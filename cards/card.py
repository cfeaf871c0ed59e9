"""What makes a saved folder a Hub repository: the files of sentence-transformers, a model card, evaluation results."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id, yaml_dump

from ..configuration_metaembed import MetaEmbedConfig

SENTENCE_MODULE = "sentence_metaembed"
SENTENCE_CARD = "sentence_card_metaembed"

MODULES = [{"idx": 0, "name": "0", "path": "", "type": f"{SENTENCE_MODULE}.MetaEmbedTransformer"}]

SENTENCE_CONFIG = {
    "model_type": "MultiVectorEncoder",
    "similarity_fn_name": "maxsim",
    "prompts": {"query": None, "document": None},
    "default_prompt_name": None,
    "requirements": {"sentence-transformers": ">=6.0.0", "transformers": ">=5.20.0"},
}

LIBRARY = "sentence-transformers"
PIPELINE_TAG = "visual-document-retrieval"
TAGS = ["metaembed", "multi-vector", "late-interaction", "matryoshka", "sentence-transformers"]

# Tells our cards, which would be wrong of the next model that is saved there, from those that people write.
MARK = "<!-- Written by metaembed, anew at every save. Delete this line to keep what you change. -->"

# Of our own saving, and of sentence-transformers': that adds what it knows of training and evaluation.
CARD = """\
---
{{ card_data }}
---

{{ mark }}
{% if weights %}<!-- Of the weights {{ weights }} -->{% endif %}

# {{ title }}

A multi-vector retriever whose cost is chosen at search time. A query is encoded as 1 to {{ num_query_tokens }} vectors
and a document as 1 to {{ num_document_tokens }}, of {{ dim }} dimensions each; any prefix of them can be scored with
MaxSim. It is a [MetaEmbed](https://arxiv.org/abs/2509.18095) model
{%- if base %} based on [{{ base }}](https://huggingface.co/{{ base }}){% endif %}, for
{{ "text and images" if takes_images else "text" }}.
{%- if is_adapter %} This repository is an adapter: its loaders fetch what it is based on too.{% endif %}

## Use

With sentence-transformers:

```python
from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder("{{ repository }}", trust_remote_code=True)
queries = model.encode_query(["a red apple"], num_meta={{ small_query }})
documents = model.encode_document(["An apple is a fruit."], num_meta={{ small_document }})
model.similarity(queries, documents)
```

With transformers:

```python
{% if is_adapter -%}
from huggingface_hub import snapshot_download
{% endif -%}
from transformers import AutoModel

{% if is_adapter -%}
folder = snapshot_download("{{ repository }}", local_dir="{{ repository.split("/")[-1] }}")
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
{% else -%}
model = AutoModel.from_pretrained("{{ repository }}", trust_remote_code=True)
{% endif -%}
queries = model.encode_queries(["a red apple"], num_meta={{ small_query }})  # [1, {{ small_query }}, {{ dim }}]
documents = model.encode_documents(["An apple is a fruit."], num_meta={{ small_document }})
model.score(queries, documents)  # [1, 1]
```

{% if takes_images -%}
An input is text, an image, a path (`pathlib.Path`), or a dict with `text` and `image`.

{% endif -%}
## Budgets

{% if quality or not earlier.Budgets -%}
{{ budget_table }}
{% if quality %}
Measured on {{ quality_of }}.
{% else %}
The quality of this model was not measured when it was saved.
{% endif %}
{%- else -%}
{{ earlier.Budgets }}
{% endif %}
{%- if all_hyperparameters %}
## Training
{% for dataset in train_datasets or [] %}
- {{ dataset.name or "Data" }}{% if dataset.size %}: {{ "{:,}".format(dataset.size) }} rows{% endif -%}
{% if dataset.columns %} of {{ dataset.columns | join(", ") }}{% endif -%}
{% if dataset.loss %}; loss `{{ dataset.loss.fullname.split(".")[-1] }}`
{% if dataset.loss.config_code %}
{{ dataset.loss.config_code }}
{% endif %}{% endif %}
{%- endfor %}

Arguments that differ from sentence-transformers' defaults:
{% for name, value in non_default_hyperparameters.items() %}
- `{{ name }}`: {{ value }}
{%- endfor %}
{% if eval_lines %}
<details><summary>Log</summary>

{{ eval_lines }}

</details>
{% endif %}
Versions: Python {{ version.python }}, sentence-transformers {{ version.sentence_transformers }}, transformers
{{ version.transformers }}, torch {{ version.torch }}.
{% elif earlier.Training %}
## Training

{{ earlier.Training }}
{% endif %}
## Licence

The code is under Apache-2.0. The weights are under {% if license -%}
the licence named above ({{ license }}){% else -%}
the licence of {{ base if base else "the model that they come from" }}, unless their publisher says otherwise
{%- endif %}.

## Citation

```bibtex
@inproceedings{xiao2026metaembed,
  title={MetaEmbed: Scaling Multimodal Retrieval at Test-Time with Flexible Late Interaction},
  author={Xiao, Zilin and others},
  booktitle={International Conference on Learning Representations},
  year={2026},
  url={https://arxiv.org/abs/2509.18095}
}
```
"""

Quality = Mapping[tuple[int, int], Mapping[str, float]]


def is_ours(card: str | None) -> bool:
    """Return whether a model card was written by this package, and not by a person."""
    return card is not None and MARK in card


def write_repository_files(folder: Path, model: Any, repository: str | None) -> None:
    """Add to a saved model what else a Hub repository holds.

    The settings of sentence-transformers that are already there are kept, but for prompts that are not what the
    configuration says. A model card is kept if a person wrote it; what one of ours says of quality, training and
    licence is kept if it was written of the same weights.

    Args:
        folder: The saved model.
        model: The `MetaEmbedModel`.
        repository: What the card calls it. None: no card is written.
    """
    for name in (SENTENCE_MODULE, SENTENCE_CARD):
        source = Path(__file__).with_name(f"{name}.py")
        shutil.copyfile(source, folder / source.name)
    path = folder / "config_sentence_transformers.json"
    settings = {**SENTENCE_CONFIG, **(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})}
    instructions = {"query": model.config.query_instruction, "document": model.config.document_instruction}
    settings["prompts"] = {
        name: instructions.get(name, text) if text else text for name, text in settings["prompts"].items()
    }
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "modules.json").write_text(json.dumps(MODULES, indent=2) + "\n", encoding="utf-8")
    card = folder / "README.md"
    if repository is not None and (not card.is_file() or is_ours(card.read_text(encoding="utf-8"))):
        model_card(model, repository, folder).save(card)


def model_card(model: Any, repository: str, folder: Path) -> ModelCard:
    """Return the card of a model of whose training and quality nothing is known, but from an earlier card.

    Args:
        model: The `MetaEmbedModel`.
        repository: What the model is called, in the title and in the examples.
        folder: Where it was saved.
    """
    fields, said = card_fields(model, folder)
    known = dict(library_name=LIBRARY, pipeline_tag=PIPELINE_TAG, tags=list(TAGS), **base_fields(model))
    data = ModelCardData(**{**said, **known, "tags": list(dict.fromkeys([*TAGS, *said.get("tags", [])]))})
    return ModelCard.from_template(data, template_str=CARD, title=repository, repository=repository, **fields)


def weights_digest(folder: Path) -> str:
    """Return a digest of saved weights, and of the instructions, on which the quality of the same weights depends."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    instructions = [config.get("query_instruction"), config.get("document_instruction")]
    digest = hashlib.sha256(json.dumps(instructions).encode())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def still_true(model: Any, folder: Path, weights: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return what a card of ours says that was written of the same weights, in the folder or where they came from.

    Args:
        model: The `MetaEmbedModel`.
        folder: Where it was saved.
        weights: The digest of its weights.

    Returns:
        Its sections, and from its metadata what the weights do not tell. Both empty where there is no such card.
    """
    present = folder / "README.md"
    for text in (
        present.read_text(encoding="utf-8") if present.is_file() else None,
        getattr(model, "earlier_card", None),
    ):
        if text is not None and is_ours(text) and weights in text:
            sections = dict(re.findall(r"^## (\w+)\n\n(.*?)\n*(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
            data = ModelCard(text).data.to_dict()
            return sections, {name: data[name] for name in ("language", "license", "datasets", "tags") if name in data}
    return {}, {}


def hub_id(name: str | None) -> str | None:
    """Return `name` if it is one that others can find on the Hub, and None if it is a folder of this machine."""
    if not name or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def base_model(model: Any) -> str | None:
    """Return the Hub id of what a model was made of: the model an adapter belongs to, else the backbone."""
    return hub_id(model.adapter_base[0] if model._hf_peft_config_loaded else model.config.base_model)


def base_fields(model: Any) -> dict[str, Any]:
    """Return what the metadata of a card says of the base model."""
    base, relation = base_model(model), "adapter" if model._hf_peft_config_loaded else "finetune"
    return {"base_model": base, "base_model_relation": relation} if base else {}


def card_fields(
    model: Any, folder: Path | None, quality: Quality | None = None, quality_of: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the card says of a model, for the template, and the metadata that still hold of an earlier card.

    Args:
        model: The `MetaEmbedModel`.
        folder: Where it was saved. None: nowhere yet.
        quality: Metrics by budget, where they were measured.
        quality_of: On what.
    """
    weights: str | None = None
    earlier: dict[str, str] = {}
    said: dict[str, Any] = {}
    if folder is not None:
        weights = weights_digest(folder)
        earlier, said = still_true(model, folder, weights)
    config = model.config
    dim = config.embedding_dim or config.hidden_size
    small_query, small_document = config.budgets[len(config.budgets) // 2]
    fields = dict(
        mark=MARK,
        weights=weights,
        earlier=earlier,
        base=base_model(model),
        dim=dim,
        num_query_tokens=config.num_query_tokens,
        num_document_tokens=config.num_document_tokens,
        small_query=small_query,
        small_document=small_document,
        is_adapter=model._hf_peft_config_loaded,
        takes_images=model.processor.image_processor is not None,
        quality=bool(quality),
        quality_of=quality_of,
        budget_table=budget_table(config, dim, quality or {}),
    )
    return fields, said


def budget_table(config: MetaEmbedConfig, dim: int, quality: Quality) -> str:
    """Return a Markdown table of the budgets: their bytes, and their quality where it was measured."""
    budgets = sorted({*map(tuple, config.budgets), *quality})
    names = [name for name in next(iter(quality.values()), {}) if name.split("@")[0] in ("ndcg", "recall", "mrr")]
    header = ["query vectors", "document vectors", "bytes a document (float32)", *names]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for r_q, r_c in budgets:
        values = quality.get((r_q, r_c), {})
        cells = [str(r_q), str(r_c), f"{r_c * dim * 4:,}", *(f"{values[n]:.4f}" if n in values else "" for n in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_eval_results(
    folder: Path, dataset: str, task: str, quality: Quality, metric: str, notes: str = ""
) -> list[Path]:
    """Write the Hub's `.eval_results` files, one a budget, which show on the pages of the model and of the data set.

    Args:
        folder: The saved model.
        dataset: Hub id of the data set that the model was evaluated on.
        task: Name of the task in that data set.
        quality: Metrics by budget.
        metric: Which of them to report.
        notes: What else to say of how it was measured.

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
