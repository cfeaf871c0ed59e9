"""The model card of a saved checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .card import is_ours, model_card

__all__ = ["adopt_card", "is_ours", "write_card"]


def write_card(model: Any, folder: Path, repository: str) -> None:
    """Write the model card of a saved model, unless a person wrote the one that is there.

    Args:
        model: The `MetaEmbedModel`.
        folder: Where it was saved.
        repository: What the card calls it.
    """
    card = folder / "README.md"
    if not card.is_file() or is_ours(card.read_text(encoding="utf-8")):
        model_card(model, repository, folder).save(card)


def adopt_card(encoder: Any) -> None:
    """Let a `MultiVectorEncoder` write our card when it is saved: see `sentence_card.adopt_card`."""
    from .sentence_card import adopt_card

    adopt_card(encoder)
