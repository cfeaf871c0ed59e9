"""The model card of a sentence-transformers encoder: our template, with its record of the training."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.model_card import MultiVectorEncoderModelCardData

from ..configuration_metaembed import SIDES
from .card import (
    LIBRARY,
    PIPELINE_TAG,
    TAGS,
    TEMPLATE,
    Quality,
    base_fields,
    card_fields,
    card_of_source,
    fingerprint,
    is_ours,
    still_true,
)


@dataclass
class MetaEmbedCardData(MultiVectorEncoderModelCardData):
    """Data of the card that sentence-transformers records, and those that a MetaEmbed model adds.

    No training data are copied into the repository, as they are by default: they may be private. The
    results of [`BudgetEvaluator`] are written only for the weights that it measured.

    Example:
        >>> encoder = to_multi_vector_encoder(model)
        >>> encoder.model_card_data.license = "apache-2.0"
    """

    generate_widget_examples: bool = False
    tags: list[str] = field(default_factory=lambda: list(TAGS))
    pipeline_tag: str = field(default=PIPELINE_TAG, init=False)
    template_path: Path = field(default=TEMPLATE, init=False, repr=False)
    said: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # from an earlier card, and still true
    # Fingerprints of weights, with their quality and what it was measured on. The best checkpoint may not be the last.
    measured: dict[str, tuple[Quality, str]] = field(default_factory=dict, init=False, repr=False)

    def fingerprint(self) -> str | None:
        """Return the fingerprint of the model's weights as they are now, under the encoder's prompts."""
        model, prompts = self.model[0].model, self.model.prompts
        return fingerprint(
            model, [prompts.get(side) or getattr(model.config, f"{side}_instruction") for side in SIDES]
        )

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """Record the results of an evaluator; for a [`BudgetEvaluator`], with the fingerprint of the weights."""
        super().set_evaluation_metrics(evaluator, metrics, epoch, step)
        if hasattr(evaluator, "budget_metrics") and (weights := self.fingerprint()) is not None:
            sizes = f"{len(evaluator.queries):,} queries and {len(evaluator.corpus):,} documents"
            found = evaluator.budget_metrics(metrics)
            self.measured[weights] = found, f"{evaluator.name or 'held-out data'}: {sizes}"

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """Return the values of the template."""
        model, weights = self.model[0].model, self.fingerprint()
        present = Path(self.save_dir) / "README.md" if self.save_dir else None
        text = present.read_text(encoding="utf-8") if present is not None and present.is_file() else None
        earlier, self.said = still_true((text, card_of_source(model)), weights)
        quality, quality_of = self.measured.get(weights or "", ({}, ""))
        name = self.model_id or Path(self.save_dir or "model").name
        return {
            **super().get_model_specific_metadata(),
            **card_fields(model, quality, quality_of),
            "weights": weights,
            "earlier": earlier,
            "repository": name,
            "title": name,
            "license": self.license or self.said.get("license"),
        }

    def set_widget_examples(self, dataset: Any) -> None:
        """Do nothing: the examples are the template's own."""

    def _save_asset(self, value: Any, assets_dir: str, idx: int, prefix: str = "") -> str | None:
        """Save no picture of the training data, and report that none was saved."""
        return None

    def format_eval_metrics(self) -> dict[str, Any]:
        """Return nothing for the metadata: the table and `.eval_results` hold the figures."""
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
    """Let `encoder` write our card when it is saved, whatever class loaded it. A second call changes nothing.

    A card of ours that the encoder was loaded with is rewritten, with what is still true. A person's is kept, as
    in sentence-transformers.
    """
    if is_ours(encoder._model_card_text):
        encoder._model_card_text = None
    old = encoder.model_card_data
    # By name: a checkpoint's code and an installed package of another version may meet in one process.
    if type(old).__name__ == MetaEmbedCardData.__name__:
        return
    given = {known.name: getattr(old, known.name) for known in fields(old) if known.init}
    defaults = MultiVectorEncoderModelCardData().tags
    given["tags"] = [*TAGS, *(tag for tag in old.tags or () if tag not in (*defaults, *TAGS))]
    given["generate_widget_examples"] = False
    encoder.model_card_data = MetaEmbedCardData(**given)
    encoder.model_card_data.register_model(encoder)
