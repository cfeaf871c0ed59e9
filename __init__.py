"""MetaEmbed: multimodal retrieval with as many vectors as you choose at search time."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_metaembed import MetaEmbedConfig
from .modeling_metaembed import MetaEmbedModel, MetaEmbedOutput
from .processing_metaembed import MetaEmbedProcessor
from .scoring_metaembed import maxsim, search

__version__ = "0.1.0"

__all__ = [
    "MetaEmbedConfig",
    "MetaEmbedModel",
    "MetaEmbedOutput",
    "MetaEmbedProcessor",
    "maxsim",
    "search",
]

AutoConfig.register(MetaEmbedConfig.model_type, MetaEmbedConfig)
AutoModel.register(MetaEmbedConfig, MetaEmbedModel)
AutoProcessor.register(MetaEmbedConfig, MetaEmbedProcessor)
