"""MetaEmbed: multimodal retrieval with as many vectors as you choose at search time."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .cascade_metaembed import cascade
from .collection_metaembed import EmbeddingCollection
from .configuration_metaembed import MetaEmbedConfig
from .modeling_metaembed import MetaEmbedModel, MetaEmbedOutput
from .processing_metaembed import MetaEmbedProcessor
from .rotation_metaembed import fit_rotation
from .scoring_metaembed import maxsim, search
from .tuning_metaembed import tune_cascade

__version__ = "0.1.0"

__all__ = [
    "EmbeddingCollection",
    "MetaEmbedConfig",
    "MetaEmbedModel",
    "MetaEmbedOutput",
    "MetaEmbedProcessor",
    "cascade",
    "fit_rotation",
    "maxsim",
    "search",
    "tune_cascade",
]

AutoConfig.register(MetaEmbedConfig.model_type, MetaEmbedConfig)
AutoModel.register(MetaEmbedConfig, MetaEmbedModel)
AutoProcessor.register(MetaEmbedConfig, MetaEmbedProcessor)
