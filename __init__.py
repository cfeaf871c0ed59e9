"""MetaEmbed: multimodal retrieval with as many vectors as you choose at search time."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .old_names import OldModules
from .registering import register_with_transformers

if TYPE_CHECKING:
    from .configuration_metaembed import MetaEmbedConfig
    from .evaluation.budgets import BudgetEvaluator
    from .inputs_metaembed import InputPolicy
    from .modeling_metaembed import MetaEmbedModel, MetaEmbedOutput
    from .processing_metaembed import MetaEmbedProcessor
    from .retrieval.cascade import Stage, cascade
    from .retrieval.collection import EmbeddingCollection
    from .retrieval.fit_budget import fit_budget
    from .retrieval.full_dial import search_full_dial
    from .retrieval.index import MultiVectorIndex
    from .retrieval.pca import fit_pca, fit_rotation
    from .retrieval.search import search
    from .retrieval.tune_cascade import tune_cascade
    from .scoring_metaembed import Embeddings, maxsim
    from .sentence_metaembed import to_multi_vector_encoder
    from .stores import create_store, open_store
    from .training.lora import lora_config, merge_adapter
    from .training.losses import CachedMMRLoss, MMRLoss

__version__ = "0.1.0"

# Imported when first asked for: torch, transformers, sentence-transformers and peft take seconds each, and neither
# `metaembed --help` nor somebody who only searches needs them all.
_LAZY = {
    "BudgetEvaluator": ".evaluation.budgets",
    "CachedMMRLoss": ".training.losses",
    "EmbeddingCollection": ".retrieval.collection",
    "Embeddings": ".scoring_metaembed",
    "InputPolicy": ".inputs_metaembed",
    "MMRLoss": ".training.losses",
    "MetaEmbedConfig": ".configuration_metaembed",
    "MetaEmbedModel": ".modeling_metaembed",
    "MetaEmbedOutput": ".modeling_metaembed",
    "MetaEmbedProcessor": ".processing_metaembed",
    "MultiVectorIndex": ".retrieval.index",
    "Stage": ".retrieval.cascade",
    "cascade": ".retrieval.cascade",
    "create_store": ".stores",
    "fit_budget": ".retrieval.fit_budget",
    "fit_pca": ".retrieval.pca",
    "fit_rotation": ".retrieval.pca",
    "lora_config": ".training.lora",
    "maxsim": ".scoring_metaembed",
    "merge_adapter": ".training.lora",
    "open_store": ".stores",
    "search": ".retrieval.search",
    "search_full_dial": ".retrieval.full_dial",
    "to_multi_vector_encoder": ".sentence_metaembed",
    "tune_cascade": ".retrieval.tune_cascade",
}

__all__ = [
    "BudgetEvaluator",
    "CachedMMRLoss",
    "EmbeddingCollection",
    "Embeddings",
    "InputPolicy",
    "MMRLoss",
    "MetaEmbedConfig",
    "MetaEmbedModel",
    "MetaEmbedOutput",
    "MetaEmbedProcessor",
    "MultiVectorIndex",
    "Stage",
    "cascade",
    "create_store",
    "fit_budget",
    "fit_pca",
    "fit_rotation",
    "lora_config",
    "maxsim",
    "merge_adapter",
    "open_store",
    "search",
    "search_full_dial",
    "to_multi_vector_encoder",
    "tune_cascade",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.meta_path.append(OldModules())

register_with_transformers()
