"""MetaEmbed: multimodal retrieval with as many vectors as you choose at search time."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_metaembed import MetaEmbedConfig
from .inputs_metaembed import InputPolicy
from .modeling_metaembed import MetaEmbedModel, MetaEmbedOutput
from .old_names import OldModules
from .processing_metaembed import MetaEmbedProcessor
from .scoring_metaembed import Embeddings, maxsim

if TYPE_CHECKING:
    from .evaluation.budgets import BudgetEvaluator
    from .retrieval.cascade import Stage, cascade
    from .retrieval.collection import EmbeddingCollection
    from .retrieval.fit_budget import fit_budget
    from .retrieval.full_dial import search_full_dial
    from .retrieval.index import MultiVectorIndex
    from .retrieval.pca import fit_pca, fit_rotation
    from .retrieval.search import search
    from .retrieval.tune_cascade import tune_cascade
    from .sentence_metaembed import to_multi_vector_encoder
    from .stores import create_store, open_store
    from .training.lora import lora_config, merge_adapter
    from .training.losses import CachedMMRLoss, MMRLoss

__version__ = "0.1.0"

# Imported when first asked for: some of them need sentence-transformers or peft, which take seconds to import.
_LAZY = {
    "BudgetEvaluator": ".evaluation.budgets",
    "CachedMMRLoss": ".training.losses",
    "EmbeddingCollection": ".retrieval.collection",
    "MMRLoss": ".training.losses",
    "MultiVectorIndex": ".retrieval.index",
    "Stage": ".retrieval.cascade",
    "cascade": ".retrieval.cascade",
    "create_store": ".stores",
    "fit_budget": ".retrieval.fit_budget",
    "fit_pca": ".retrieval.pca",
    "fit_rotation": ".retrieval.pca",
    "lora_config": ".training.lora",
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

AutoConfig.register(MetaEmbedConfig.model_type, MetaEmbedConfig)
AutoModel.register(MetaEmbedConfig, MetaEmbedModel)
AutoProcessor.register(MetaEmbedConfig, MetaEmbedProcessor)
