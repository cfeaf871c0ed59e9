"""What makes a saved folder a Hub repository: the files of sentence-transformers, and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .configuration_metaembed import MetaEmbedConfig

SENTENCE_MODULE = "sentence_metaembed"

MODULES = [{"idx": 0, "name": "0", "path": "", "type": f"{SENTENCE_MODULE}.MetaEmbedTransformer"}]

SENTENCE_CONFIG = {
    "model_type": "MultiVectorEncoder",
    "similarity_fn_name": "maxsim",
    "prompts": {"query": None, "document": None},
    "default_prompt_name": None,
    "requirements": {"sentence-transformers": ">=6.0", "transformers": ">=5.0"},
}

CARD = """
# {title}

A multi-vector retriever whose cost is chosen at search time. A query is encoded as 1 to {num_query_tokens} vectors
and a document as 1 to {num_document_tokens}, of {dim} dimensions each; any prefix of them can be scored with MaxSim.
It is a [MetaEmbed](https://arxiv.org/abs/2509.18095) model{based_on}.

## Use

With transformers:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{model_id}", trust_remote_code=True)
queries = model.encode_queries(["a red apple"], num_meta={small_query})        # [1, {small_query}, {dim}]
documents = model.encode_documents(["An apple is a fruit."], num_meta={small_document})  # [1, {small_document}, {dim}]
model.score(queries, documents)  # [1, 1]
```

With sentence-transformers:

```python
from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder("{model_id}", trust_remote_code=True)
queries = model.encode_query(["a red apple"], num_meta={small_query})
documents = model.encode_document(["An apple is a fruit."], num_meta={small_document})
model.similarity(queries, documents)
```

## Budgets

| query vectors | document vectors | bytes a document (float32) |
|---|---|---|
{budgets}

## Citation

```bibtex
@inproceedings{{xiao2026metaembed,
  title={{MetaEmbed: Scaling Multimodal Retrieval at Test-Time with Flexible Late Interaction}},
  author={{Xiao, Zilin and others}},
  booktitle={{International Conference on Learning Representations}},
  year={{2026}},
  url={{https://arxiv.org/abs/2509.18095}}
}}
```
"""


def write_repository_files(folder: Path, config: MetaEmbedConfig) -> None:
    """Add to a saved model what else a Hub repository holds.

    The settings of sentence-transformers and a model card that are already there are kept.

    Args:
        folder: The saved model.
        config: Its configuration.
    """
    source = Path(__file__).with_name(f"{SENTENCE_MODULE}.py")
    shutil.copyfile(source, folder / source.name)
    path = folder / "config_sentence_transformers.json"
    present = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**SENTENCE_CONFIG, **present}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "modules.json").write_text(json.dumps(MODULES, indent=2) + "\n", encoding="utf-8")
    if not (folder / "README.md").is_file():
        model_card(config, folder.name).save(folder / "README.md")


def model_card(config: MetaEmbedConfig, name: str) -> ModelCard:
    """Return the card of a model: what it is and how to use it.

    Args:
        config: The configuration of the model.
        name: What the model is called, in the title and in the examples.
    """
    base = config.base_model if config.base_model and not Path(config.base_model).exists() else None
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="visual-document-retrieval",
        tags=["metaembed", "multi-vector", "late-interaction", "sentence-transformers", "matryoshka"],
        base_model=base,
    )
    dim = config.embedding_dim or config.hidden_size
    small_query, small_document = config.budgets[len(config.budgets) // 2]
    text = CARD.format(
        title=name,
        model_id=name,
        dim=dim,
        num_query_tokens=config.num_query_tokens,
        num_document_tokens=config.num_document_tokens,
        small_query=small_query,
        small_document=small_document,
        based_on=f" based on [{base}](https://huggingface.co/{base})" if base else "",
        budgets="\n".join(f"| {q} | {d} | {d * dim * 4:,} |" for q, d in config.budgets),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
