"""The model card that sentence-transformers writes of a MetaEmbed encoder: our text, its record of the training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import yaml_dump
from transformers.utils import HF_MODULES_CACHE

from .card import CARD, LIBRARY, PIPELINE_TAG, TAGS, base_fields, card_fields, is_ours

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

    Nothing of the training data is put into the repository, as it does by default: it may be private.

    Example:
        >>> encoder = to_multi_vector_encoder(model)
        >>> encoder.model_card_data.license = "apache-2.0"
    """

    generate_widget_examples: bool = False
    tags: list[str] = field(default_factory=lambda: list(TAGS))
    pipeline_tag: str = field(default=PIPELINE_TAG, init=False)
    template_path: Path = field(default_factory=template_file, init=False, repr=False)
    said: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # by an earlier card, and still true

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """Return what the template asks for."""
        model = self.model[0].model
        quality, names = {}, []
        for evaluator, metrics in (self.eval_results_dict or {}).items():
            if hasattr(evaluator, "budget_metrics"):
                quality = evaluator.budget_metrics(metrics)
                sizes = f"{len(evaluator.queries):,} queries and {len(evaluator.corpus):,} documents"
                names = [f"{evaluator.name or 'held-out data'}: {sizes}"]
        folder = Path(self.save_dir) if self.save_dir else None
        ours, self.said = card_fields(model, folder, quality, quality_of=", ".join(names))
        name = self.model_id or Path(self.save_dir or "model").name
        ours.update(repository=name, title=name, license=self.license or self.said.get("license"))
        return {**super().get_model_specific_metadata(), **ours}

    def set_widget_examples(self, dataset: Any) -> None:
        """Do nothing: the examples are the template's own."""

    def _save_asset(self, value: Any, assets_dir: str, idx: int, prefix: str = "") -> str | None:
        """Save no picture, and say so."""
        return None

    def format_eval_metrics(self) -> dict[str, Any]:
        """Return nothing for the metadata: figures stand in the table, and in `.eval_results`."""
        return {}

    def try_to_set_base_model(self) -> None:
        """Do nothing: the configuration names the backbone."""

    def to_yaml(self, line_break: Any = None) -> str:
        """Return the metadata of the card."""
        self._cached_dict = None
        values = dict(
            language=self.language or self.said.get("language"),
            license=self.license or self.said.get("license"),
            library_name=LIBRARY,
            pipeline_tag=PIPELINE_TAG,
            tags=list(dict.fromkeys([*self.tags, *self.said.get("tags", [])])),
            datasets=self.datasets or self.said.get("datasets"),
            **base_fields(self.model[0].model),
        )
        return yaml_dump({name: value for name, value in values.items() if value}, line_break=line_break).strip()


def adopt_card(encoder: MultiVectorEncoder) -> None:
    """Let `encoder` write our card when it is saved, also where sentence-transformers itself loaded it.

    A card of ours that it was loaded with is written anew, from what still holds of it. A person's is kept, as
    sentence-transformers does.
    """
    if is_ours(encoder._model_card_text):
        encoder._model_card_text = None
    old = encoder.model_card_data
    if type(old).__name__ == MetaEmbedCardData.__name__:
        return
    given = {known.name: getattr(old, known.name) for known in fields(old) if known.init}
    defaults = MultiVectorEncoderModelCardData().tags
    given["tags"] = [*TAGS, *(tag for tag in old.tags if tag not in (*defaults, *TAGS))]
    given["generate_widget_examples"] = False
    encoder.model_card_data = MetaEmbedCardData(**given)
    encoder.model_card_data.register_model(encoder)
