"""Filters as people write them: JSON, in the command line's `--where` and in the field of the search page."""

from __future__ import annotations

import json
from typing import Any

EXAMPLE = '{"kind": "pdf", "page": {"$lt": 10}}'


def read_where(text: str | None, name: str) -> dict[str, Any] | None:
    """Return the filter that a text stands for, as `MultiVectorIndex.search` takes it; None for no filter.

    Args:
        text: JSON, such as `{"kind": "pdf", "page": {"$lt": 10}}`.
        name: What errors call it.

    Raises:
        ValueError: If it is no JSON object, or no filter.

    Example:
        >>> read_where('{"kind": "pdf"}', "--where")
        {'kind': 'pdf'}
    """
    if text is None or not text.strip():
        return None
    from ..retrieval.filters import parse_where

    try:
        condition = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON, such as {EXAMPLE}: {error}") from None
    if not isinstance(condition, dict):
        raise ValueError(f"{name} must be a JSON object, such as {EXAMPLE}")
    try:
        parse_where(condition)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no filter: {error}") from None
    return condition
