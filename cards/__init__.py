"""The model card of a saved checkpoint: a template, and what fills it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .card import is_ours, write_card

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

__all__ = ["adopt_card", "is_ours", "write_card"]


def adopt_card(encoder: MultiVectorEncoder) -> None:
    """Let `encoder` write our model card when it is saved, whatever class loaded it. A second call changes nothing.

    Args:
        encoder: The encoder, whose one module holds the `MetaEmbedModel`.
    """
    from .sentence_card import adopt_card  # imports sentence-transformers, which saving a model does not need

    adopt_card(encoder)
