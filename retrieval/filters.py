"""Filters of searches: checked, and evaluated on columns, which hold one key of all metadata as arrays.

SQLite would read the metadata of every document again for every filter. A column is read once, when the first filter
names its key, and grows when documents are added; evaluating a filter then takes some comparisons of arrays.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from .metadata import check_json

_ORDER = {"$lt": operator.lt, "$lte": operator.le, "$gt": operator.gt, "$gte": operator.ge}
_OPERATORS = ("$eq", "$ne", *_ORDER, "$in", "$nin", "$exists")
_MOST_CONDITIONS = 500
_UNNAMEABLE = re.compile(r'["\\\x00-\x1f]')
_MISSING, _NULL, _FALSE, _TRUE, _WHOLE, _REAL, _TEXT, _OTHER = range(8)
_KINDS = {None: _MISSING, "null": _NULL, "false": _FALSE, "true": _TRUE, "integer": _WHOLE, "real": _REAL}
_KINDS |= {"text": _TEXT, "array": _OTHER, "object": _OTHER}

Mask: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"


# Columns


@dataclass(frozen=True)
class Column:
    """The values of one key, for every slot.

    Attributes:
        kinds: `[rows]` uint8, the kind of the value.
        values: `[rows]` int64: a whole number, the bits of a real one, or the number of a text.
        texts: Every text and its number.
    """

    kinds: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    values: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    texts: Mapping[str, int] = field(default_factory=dict)

    def extended(self, found: Sequence[tuple[int, str | None, Any]], rows: int) -> Column:
        """Return the column with more slots, `rows` in all, given what `Catalog.values` found."""
        kinds, values, texts = np.zeros(rows, np.uint8), np.zeros(rows, np.int64), dict(self.texts)
        kinds[: len(self.kinds)], values[: len(self.values)] = self.kinds, self.values
        slots = np.fromiter((slot for slot, _, _ in found), np.int64, len(found))
        kinds[slots] = np.fromiter((_KINDS[kind] for _, kind, _ in found), np.uint8, len(found))
        numbers: dict[str, Callable[[Any], int | float]] = {
            "integer": int,
            "real": lambda pair: float(pair[1 : pair.index(",")]),
            "text": lambda text: texts.setdefault(text, len(texts)),
        }
        for kind, number in numbers.items():
            here = slots[kinds[slots] == _KINDS[kind]]
            of_kind = (number(value) for _, name, value in found if name == kind)
            if kind == "real":
                values[here] = np.fromiter(of_kind, np.float64, len(here)).view(np.int64)
            else:
                values[here] = np.fromiter(of_kind, np.int64, len(here))
        return Column(kinds, values, texts)

    def exists(self) -> Mask:
        """Return whether a document has the key."""
        return self.kinds != _MISSING

    def among(self, operands: Sequence[Any]) -> Mask:
        """Return whether the value is one of these, of the same kind."""
        mask = np.zeros(len(self.kinds), bool)
        kinds, codes, whole, real = set(), list[int](), list[int](), list[float]()
        for operand in operands:
            if operand is None:
                kinds |= {_MISSING, _NULL}
            elif isinstance(operand, bool):
                kinds.add(_TRUE if operand else _FALSE)
            elif isinstance(operand, str):
                codes += [self.texts[operand]] if operand in self.texts else []
            else:
                whole += [int(operand)] if operand == int(operand) and -(2**63) <= operand < 2**63 else []
                real += [float(operand)] if operand == float(operand) else []
        for kind in kinds:
            mask |= self.kinds == kind
        for kind, wanted, dtype in ((_TEXT, codes, np.int64), (_WHOLE, whole, np.int64), (_REAL, real, np.float64)):
            if wanted:
                mask |= (self.kinds == kind) & np.isin(self.values.view(dtype), np.array(wanted, dtype))
        return mask

    def ordered(self, name: str, operand: str | int | float) -> Mask:
        """Return whether the value is smaller or larger than the operand, as the operator says, and of its kind."""
        compare = _ORDER[name]
        if isinstance(operand, str):
            mask = self.kinds == _TEXT
            table = np.fromiter((compare(text, operand) for text in self.texts), bool, len(self.texts))
            mask[mask] = table[self.values[mask]]
            return mask
        # For whole numbers, x < 2.5 is x < 3, and x <= 2.5 is x <= 2.
        nearest = math.ceil(operand) if name in ("$lt", "$gte") else math.floor(operand)
        mask = (self.kinds == _WHOLE) & compare(self.values, nearest)
        real = self.kinds == _REAL
        if real.any():
            numbers = self.values[real].view(np.float64)
            exact = operand == float(operand)  # else Python compares, which rounds neither
            mask[real] = compare(numbers, float(operand)) if exact else [compare(x, operand) for x in numbers.tolist()]
        return mask


# Filters


@dataclass(frozen=True)
class Condition:
    """A condition on the value at a path of the metadata: an operator and what it compares with."""

    path: str
    operator: str
    operand: Any

    def evaluate(self, column: Column) -> Mask:
        """Return whether it holds, for every slot."""
        if self.operator in _ORDER:
            return column.ordered(self.operator, self.operand)
        if self.operator == "$exists":
            return column.exists() == self.operand
        found = column.among(self.operand if self.operator in ("$in", "$nin") else [self.operand])
        return ~found if self.operator in ("$ne", "$nin") else found


@dataclass(frozen=True)
class Group:
    """Filters of which all (`"$and"`) or at least one (`"$or"`) must hold."""

    word: str
    parts: tuple[Condition | Group, ...]


def parse_where(where: Any) -> Group:
    """Check a filter and return it as a tree.

    `{"lang": "en", "page": {"$lt": 10}}` selects documents for which all of it holds; `{"$or": [filter, filter]}`
    those for which one does. A dot leads into nested metadata: `"author.name"`. Text is compared with text, numbers
    with numbers, booleans with booleans; lists and objects are equal to nothing. `$ne` and `$nin` select what `$eq`
    and `$in` do not, so also documents that lack the key. `None` is equal to `null` and to a key that is not there;
    `$exists` tells the two apart.

    Raises:
        TypeError: if a filter or a value is of a type that filters do not have.
        ValueError: if an operator is not known, or a key cannot be named.
    """
    try:
        tree = _parse(where)
        if sum(1 for _ in conditions(tree)) > _MOST_CONDITIONS:
            raise ValueError(f"a filter can have {_MOST_CONDITIONS} conditions; use $in for many values of one key")
    except RecursionError:
        raise ValueError("the filter is nested too deeply") from None
    return tree


def conditions(tree: Condition | Group) -> Iterator[Condition]:
    """Yield the conditions of a filter."""
    if isinstance(tree, Condition):
        yield tree
    else:
        for part in tree.parts:
            yield from conditions(part)


def evaluate(tree: Condition | Group, columns: Mapping[str, Column], rows: int) -> Mask:
    """Return which slots a filter selects, given the column of every path that it names."""
    if isinstance(tree, Condition):
        return tree.evaluate(columns[tree.path])
    mask = np.full(rows, tree.word == "$and")
    for part in tree.parts:
        if tree.word == "$and":
            mask &= evaluate(part, columns, rows)
        else:
            mask |= evaluate(part, columns, rows)
    return mask


def _parse(where: Any) -> Group:
    if not isinstance(where, Mapping):
        raise TypeError(f'a filter must be a dict such as {{"lang": "en"}}, not {where!r}')
    parts = list[Condition | Group]()
    for key, wanted in where.items():
        if not isinstance(key, str):
            raise TypeError(f"the keys of a filter must be str, not {key!r}")
        if key in ("$and", "$or"):
            if isinstance(wanted, str | Mapping) or not isinstance(wanted, Sequence):
                raise TypeError(f"{key} must be a list of filters, not {wanted!r}")
            parts.append(Group(key, tuple(_parse(part) for part in wanted)))
        elif key.startswith("$"):
            raise ValueError(
                f"there is no operator {key} for filters; there are $and and $or, and for a key {_OPERATORS}"
            )
        else:
            parts += _parse_key(key, wanted)
    return Group("$and", tuple(parts))


def _parse_key(key: str, wanted: Any) -> Iterator[Condition]:
    steps = key.split(".")
    if not all(steps) or _UNNAMEABLE.search(key):
        raise ValueError(
            f"a filter cannot name the key {key!r}: no part of it may be empty or hold quotes or backslashes"
        )
    operators = wanted if isinstance(wanted, Mapping) else {"$eq": wanted}
    if not operators:
        raise ValueError(f"the filter for {key!r} is an empty dict; give it an operator such as $eq")
    path = "$" + "".join(f'."{step}"' for step in steps)
    for name, operand in operators.items():
        yield Condition(path, name, _check_operand(name, operand))


def _check_operand(name: Any, operand: Any) -> Any:
    if name in ("$eq", "$ne"):
        if isinstance(operand, list | tuple | Mapping):
            raise TypeError(f"{name} compares with text, a number, a boolean or None, not {operand!r}")
        return _check_value(operand)
    if name in ("$in", "$nin"):
        if not isinstance(operand, list | tuple | set | frozenset):
            raise TypeError(f"{name} takes a list of values, not {operand!r}")
        return [_check_value(value) for value in operand]
    if name == "$exists":
        if not isinstance(operand, bool):
            raise TypeError(f"$exists takes True or False, not {operand!r}")
        return operand
    if name in _ORDER:
        if isinstance(operand, bool) or not isinstance(operand, str | int | float):
            raise TypeError(f"{name} compares with text or a number, not {operand!r}")
        return _check_value(operand)
    raise ValueError(f"there is no operator {name!r} for filters; there are {', '.join(_OPERATORS)}")


def _check_value(value: Any) -> Any:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("a filter cannot look for the character NUL")
    elif isinstance(value, bool | int | float):
        check_json(value)
    elif value is not None:
        raise TypeError(f"a filter compares with text, a number, a boolean or None, not {value!r}")
    return value
