"""MetaEmbed: multimodal retrieval with as many vectors as you choose at search time."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_metaembed import MetaEmbedConfig
from .modeling_metaembed import MetaEmbedModel, MetaEmbedOutput
from .processing_metaembed import MetaEmbedProcessor
from .retrieval.cascade import cascade
from .retrieval.collection import EmbeddingCollection
from .retrieval.pca import fit_pca, fit_rotation
from .retrieval.search import search
from .retrieval.tune_cascade import tune_cascade
from .scoring_metaembed import maxsim

__version__ = "0.1.0"

__all__ = [
    "EmbeddingCollection",
    "MetaEmbedConfig",
    "MetaEmbedModel",
    "MetaEmbedOutput",
    "MetaEmbedProcessor",
    "cascade",
    "fit_pca",
    "fit_rotation",
    "maxsim",
    "search",
    "tune_cascade",
]

AutoConfig.register(MetaEmbedConfig.model_type, MetaEmbedConfig)
AutoModel.register(MetaEmbedConfig, MetaEmbedModel)
AutoProcessor.register(MetaEmbedConfig, MetaEmbedProcessor)
