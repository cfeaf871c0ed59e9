"""The model card that sentence-transformers writes of a MetaEmbed encoder: our text, its record of the training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import yaml_dump
from transformers.utils import HF_MODULES_CACHE

from .card_metaembed import CARD, LIBRARY, PIPELINE_TAG, TAGS, base_fields, card_fields

try:  # in a `try`, so that transformers does not ask users of AutoModel alone to install it
    from sentence_transformers.multi_vector_encoder.model_card import MultiVectorEncoderModelCardData
except ImportError as error:
    raise ImportError("this door needs sentence-transformers: pip install 'sentence-transformers>=6.0'") from error

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder


def template_file() -> Path:
    """Return a file that holds our template, which sentence-transformers reads from a file only."""
    content = CARD.encode()
    path = Path(HF_MODULES_CACHE) / f"metaembed-card-{hashlib.sha1(content).hexdigest()[:12]}.md"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


@dataclass
class MetaEmbedCardData(MultiVectorEncoderModelCardData):
    """What sentence-transformers records for the card, with what a MetaEmbed model adds.

    Pictures of the training data are not put into the repository, as it does by default.

    Example:
        >>> encoder = to_multi_vector_encoder(model)
        >>> encoder.model_card_data.license = "apache-2.0"
    """

    generate_widget_examples: bool = False
    tags: list[str] = field(default_factory=lambda: list(TAGS))
    pipeline_tag: str = field(default=PIPELINE_TAG, init=False)
    template_path: Path = field(default_factory=template_file, init=False, repr=False)

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """Return what the template asks for."""
        model = self.model[0].model
        quality, names = {}, []
        for evaluator, metrics in (self.eval_results_dict or {}).items():
            if hasattr(evaluator, "budget_metrics"):
                quality = evaluator.budget_metrics(metrics)
                sizes = f"{len(evaluator.queries):,} queries and {len(evaluator.corpus):,} documents"
                names = [f"{evaluator.name or 'held-out data'}: {sizes}"]
        fields = card_fields(
            model.config,
            is_adapter=model._hf_peft_config_loaded,
            takes_images=self.model[0].processor.image_processor is not None,
            quality=quality,
            quality_of=", ".join(names),
        )
        repository = self.model_id or Path(self.save_dir or "model").name
        return {**super().get_model_specific_metadata(), **fields, "repository": repository, "title": repository}

    def format_eval_metrics(self) -> dict[str, Any]:
        """Return nothing for the metadata: figures stand in the table, and in `.eval_results`."""
        return {}

    def try_to_set_base_model(self) -> None:
        """Do nothing: the configuration names the backbone."""

    def to_yaml(self, line_break: Any = None) -> str:
        """Return the metadata of the card."""
        self._cached_dict = None
        model = self.model[0].model
        base = base_fields(card_fields(model.config, model._hf_peft_config_loaded, takes_images=True))
        values = dict(
            language=self.language,
            license=self.license,
            library_name=LIBRARY,
            pipeline_tag=PIPELINE_TAG,
            tags=self.tags,
            datasets=self.datasets,
            **base,
        )
        return yaml_dump({name: value for name, value in values.items() if value}, line_break=line_break).strip()


def adopt_card(encoder: MultiVectorEncoder) -> None:
    """Let `encoder` write our card when it is saved, also where sentence-transformers itself loaded it."""
    old = encoder.model_card_data
    if type(old).__name__ == MetaEmbedCardData.__name__:
        return
    kept = ("language", "license", "model_name", "model_id", "train_datasets", "eval_datasets")
    encoder.model_card_data = MetaEmbedCardData(**{name: getattr(old, name) for name in kept})
    encoder.model_card_data.register_model(encoder)
