"""What makes a saved folder a Hub repository: the files of sentence-transformers, a model card, evaluation results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from .configuration_metaembed import MetaEmbedConfig

SENTENCE_MODULE = "sentence_metaembed"
SENTENCE_CARD = "sentence_card_metaembed"

MODULES = [{"idx": 0, "name": "0", "path": "", "type": f"{SENTENCE_MODULE}.MetaEmbedTransformer"}]

SENTENCE_CONFIG = {
    "model_type": "MultiVectorEncoder",
    "similarity_fn_name": "maxsim",
    "prompts": {"query": None, "document": None},
    "default_prompt_name": None,
    "requirements": {"sentence-transformers": ">=6.0.0", "transformers": ">=5.10.1"},
}

LIBRARY = "sentence-transformers"
PIPELINE_TAG = "visual-document-retrieval"
TAGS = ["metaembed", "multi-vector", "late-interaction", "matryoshka", "sentence-transformers"]

# Of our own saving, and of sentence-transformers': that adds what it knows of training and evaluation.
CARD = """\
---
{{ card_data }}
---

# {{ title }}

A multi-vector retriever whose cost is chosen at search time. A query is encoded as 1 to {{ num_query_tokens }} vectors
and a document as 1 to {{ num_document_tokens }}, of {{ dim }} dimensions each; any prefix of them can be scored with
MaxSim. It is a [MetaEmbed](https://arxiv.org/abs/2509.18095) model
{%- if backbone %} based on [{{ backbone }}](https://huggingface.co/{{ backbone }}){% endif %}, for
{{ "text and images" if takes_images else "text" }}.
{%- if is_adapter %} This repository is an adapter: its loaders fetch the backbone too.{% endif %}

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

{{ budget_table }}
{% if quality %}
Measured on {{ quality_of }}.
{% else %}
The quality of this model was not measured when it was saved.
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
{% endif %}
## Licence

The code is under Apache-2.0. The weights are under {% if license -%}
the licence named above ({{ license }}){% else -%}
the licence of the {{ "backbone" if backbone else "model that they come from" }}, unless their publisher says otherwise
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


def write_repository_files(folder: Path, config: MetaEmbedConfig, **card: Any) -> None:
    """Add to a saved model what else a Hub repository holds.

    The settings of sentence-transformers and a model card that are already there are kept.

    Args:
        folder: The saved model.
        config: Its configuration.
        **card: For [`model_card`].
    """
    for name in (SENTENCE_MODULE, SENTENCE_CARD):
        source = Path(__file__).with_name(f"{name}.py")
        shutil.copyfile(source, folder / source.name)
    path = folder / "config_sentence_transformers.json"
    present = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**SENTENCE_CONFIG, **present}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "modules.json").write_text(json.dumps(MODULES, indent=2) + "\n", encoding="utf-8")
    if not (folder / "README.md").is_file():
        model_card(config, **{"repository": folder.name, **card}).save(folder / "README.md")


def model_card(
    config: MetaEmbedConfig, repository: str, is_adapter: bool = False, takes_images: bool = True
) -> ModelCard:
    """Return the card of a model of which nothing but its configuration is known.

    Args:
        config: The configuration of the model.
        repository: What the model is called, in the title and in the examples.
        is_adapter: Whether the folder holds an adapter, and not the whole model.
        takes_images: Whether the backbone takes images.
    """
    fields = card_fields(config, is_adapter, takes_images)
    data = ModelCardData(library_name=LIBRARY, pipeline_tag=PIPELINE_TAG, tags=list(TAGS), **base_fields(fields))
    return ModelCard.from_template(data, template_str=CARD, title=repository, repository=repository, **fields)


def base_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the metadata of a card says of the base model."""
    relation = "adapter" if fields["is_adapter"] else "finetune"
    return {"base_model": fields["backbone"], "base_model_relation": relation} if fields["backbone"] else {}


def card_fields(
    config: MetaEmbedConfig,
    is_adapter: bool,
    takes_images: bool,
    quality: Quality | None = None,
    quality_of: str = "",
) -> dict[str, Any]:
    """Return what the card says of a model.

    Args:
        config: The configuration of the model.
        is_adapter: Whether the folder holds an adapter, and not the whole model.
        takes_images: Whether the backbone takes images.
        quality: Metrics by budget, where they were measured.
        quality_of: On what.
    """
    base = config.base_model if config.base_model and not Path(config.base_model).exists() else None
    dim = config.embedding_dim or config.hidden_size
    small_query, small_document = config.budgets[len(config.budgets) // 2]
    return dict(
        backbone=base,
        dim=dim,
        num_query_tokens=config.num_query_tokens,
        num_document_tokens=config.num_document_tokens,
        small_query=small_query,
        small_document=small_document,
        is_adapter=is_adapter,
        takes_images=takes_images,
        quality=bool(quality),
        quality_of=quality_of,
        budget_table=budget_table(config, dim, quality or {}),
    )


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
