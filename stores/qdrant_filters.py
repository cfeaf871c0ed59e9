"""Our filters in Qdrant's language, with the answers of `parse_where`.

Qdrant looks into lists, compares 1 with true when embedded, and has no order of text. So the payload of a document
notes, beside its metadata, at which paths it holds lists and booleans: its marks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ..retrieval.filters import parse_where

METADATA, MARKS = "metadata", "marks"  # keys of the payload
_EXACT = 1 << 53  # whole numbers from here on are not told apart by an engine that compares 64-bit floats
_BOUNDS = {"$lt": "lt", "$lte": "lte", "$gt": "gt", "$gte": "gte"}


class Conditions(Protocol):
    """How one of Qdrant's libraries writes conditions."""

    def any_of(self, key: str, values: list[str]) -> Any:
        """The text at the key is one of these."""

    def between(self, key: str, **bounds: float) -> Any:
        """The number at the key is within the bounds `lt`, `lte`, `gt`, `gte`."""

    def empty(self, key: str) -> Any:
        """There is nothing at the key, or null, or an empty list."""

    def null(self, key: str) -> Any:
        """There is null at the key."""

    def has_id(self, points: list[str]) -> Any:
        """The point is one of these."""

    def filter(self, must: list[Any], should: list[Any], must_not: list[Any]) -> Any:
        """All of, one of, and none of these conditions; empty lists demand nothing."""


def marks(metadata: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield where metadata holds lists and booleans, as far as a filter can name the place."""
    for key, value in metadata.items():
        if not key or "." in key:
            continue
        path = f"{above}.{key}" if above else key
        if isinstance(value, Mapping):
            yield from marks(value, path)
        elif isinstance(value, list | tuple):
            yield f"list {path}"
        elif isinstance(value, bool):
            yield f"{str(value).lower()} {path}"


def payload_key(key: str) -> str:
    """Return Qdrant's path of a key of the metadata, quoted, so that no character of it has a meaning."""
    return ".".join((METADATA, *(f'"{step}"' for step in key.split("."))))


def translate(where: Mapping[str, Any], c: Conditions) -> Any:
    """Translate a filter.

    Raises:
        TypeError: as `parse_where`.
        ValueError: as `parse_where`, and if Qdrant cannot answer as our own index does.
    """
    parse_where(where)
    return _all(where, c)


def _all(where: Mapping[str, Any], c: Conditions) -> Any:
    must = []
    for key, wanted in where.items():
        if key == "$and":
            must += [_all(part, c) for part in wanted]
        elif key == "$or":
            must.append(_one_of([_all(part, c) for part in wanted], c))
        else:
            operators = wanted if isinstance(wanted, Mapping) else {"$eq": wanted}
            must += [_compare(key, operator, operand, c) for operator, operand in operators.items()]
    return c.filter(must, [], [])


def _one_of(conditions: list[Any], c: Conditions) -> Any:
    return c.filter([], conditions, []) if conditions else c.has_id([])


def _compare(key: str, operator: str, operand: Any, c: Conditions) -> Any:
    if operator in _BOUNDS:
        if isinstance(operand, str):
            raise ValueError(
                f"Qdrant cannot compare text by order, as in {{{key!r}: {{{operator!r}: {operand!r}}}}}; "
                "keep a number instead, such as a date as seconds, or list the values with $in"
            )
        bounds = {_BOUNDS[operator]: _number(operand)}
        return c.filter([c.between(payload_key(key), **bounds)], [], [_mark("list", key, c)])
    if operator == "$exists":
        nothing = c.filter([c.empty(payload_key(key))], [], [c.null(payload_key(key)), _mark("list", key, c)])
        return c.filter([], [], [nothing]) if operand else nothing
    found = _among(key, [operand] if operator in ("$eq", "$ne") else list(operand), c)
    return found if operator in ("$eq", "$in") else c.filter([], [], [found])


def _among(key: str, operands: list[Any], c: Conditions) -> Any:
    """The value at the key is one of these, and no list that holds one of them."""
    path, should = payload_key(key), []
    texts = [value for value in operands if isinstance(value, str)]
    if texts:
        should.append(c.any_of(path, texts))
    for value in operands:
        if isinstance(value, bool):
            should.append(_mark(str(value).lower(), key, c))
        elif value is None:
            should.append(c.empty(path))
        elif not isinstance(value, str):
            should.append(c.between(path, gte=_number(value), lte=_number(value)))
    return c.filter([], should, [_mark("list", key, c)]) if should else c.has_id([])


def _mark(kind: str, key: str, c: Conditions) -> Any:
    return c.any_of(MARKS, [f"{kind} {key}"])


def _number(value: float) -> float:
    if abs(value) >= _EXACT:
        raise ValueError(
            f"Qdrant compares numbers as 64-bit floats, so a filter cannot name {value}; keep numbers "
            "of 2**53 and beyond as text"
        )
    return float(value)
