"""Our filters as SQL on JSONB, with the answers of `parse_where`. Every value is a bound parameter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..retrieval.filters import parse_where

COLUMN_TYPES = {"text": 'text COLLATE "C"', "number": "numeric", "boolean": "boolean"}
_CASTS = {"text": "text", "number": "numeric", "boolean": "boolean"}
_COMPARISONS = {"$lt": "<", "$lte": "<=", "$gt": ">", "$gte": ">="}
# What a value is, if it is of the kind. CASE, because PostgreSQL may compute the sides of AND in any order.
_AS_KIND = {
    "text": "(CASE WHEN jsonb_typeof({0}) = 'string' THEN ({0} #>> '{{}}') COLLATE \"C\" END)",
    "number": "(CASE WHEN jsonb_typeof({0}) = 'number' THEN ({0})::numeric END)",
    "boolean": "(CASE WHEN jsonb_typeof({0}) = 'boolean' THEN ({0})::boolean END)",
}


def column_name(key: str) -> str:
    """Return the name of the column for a key of the metadata.

    Raises:
        ValueError: if PostgreSQL cannot take it.
    """
    return check_name(f"meta_{key}")


def check_name(name: str) -> str:
    """Return the name of a table or a column.

    Raises:
        ValueError: if PostgreSQL would cut it, or psycopg misread it.
    """
    if len(name.encode()) > 63 or "\0" in name or "%" in name:
        raise ValueError(f"names in PostgreSQL have 63 bytes at most, and here no percent sign: not {name!r}")
    return name


def expression(sql: Any, key: str, kind: str) -> Any:
    """Return the value of a key if it is of the kind, else NULL, for the definition of a column."""
    value = sql.SQL("jsonb_path_query_first(metadata, {}::jsonpath, '{{}}', true)").format(sql.Literal(_path(key)))
    return sql.SQL(_AS_KIND[kind]).format(value)


def translate(sql: Any, where: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Any, list[Any]]:
    """Translate a filter into a condition and its values; `columns` are keys with a column and the kind of it.

    Raises:
        TypeError: as `parse_where`.
        ValueError: as `parse_where`.
    """
    parse_where(where)
    return _Translation(sql, columns).run(where)


class _Translation:
    def __init__(self, sql: Any, columns: Mapping[str, str]):
        self.sql, self.columns, self.values = sql, columns, list[Any]()

    def run(self, where: Mapping[str, Any]) -> tuple[Any, list[Any]]:
        return self._all(where), self.values

    def _all(self, where: Mapping[str, Any]) -> Any:
        parts = []
        for key, wanted in where.items():
            if key in ("$and", "$or"):
                parts.append(self._join([self._all(part) for part in wanted], key[1:].upper()))
            else:
                operators = wanted if isinstance(wanted, Mapping) else {"$eq": wanted}
                parts += [self._compare(key, operator, operand) for operator, operand in operators.items()]
        return self._join(parts, "AND")

    def _join(self, parts: list[Any], word: str) -> Any:
        if not parts:
            return self.sql.SQL("true" if word == "AND" else "false")
        return self.sql.SQL("({})").format(self.sql.SQL(f" {word} ").join(parts))

    def _compare(self, key: str, operator: str, operand: Any) -> Any:
        if operator in _COMPARISONS:
            kind = "text" if isinstance(operand, str) else "number"
            sign = _COMPARISONS[operator]
            return self._holds(key, kind, sign + " %s::{}", operand if kind == "text" else json.dumps(operand))
        if operator == "$exists":
            return self.sql.SQL(f"({{}} IS {'NOT ' if operand else ''}NULL)").format(self._value(key))
        found = self._among(key, [operand] if operator in ("$eq", "$ne") else list(operand))
        return found if operator in ("$eq", "$in") else self.sql.SQL("(NOT {})").format(found)

    def _among(self, key: str, operands: list[Any]) -> Any:
        """The value at the key is one of these, of the same kind."""
        kinds: dict[str, list[Any]] = {"text": [], "boolean": [], "number": []}
        for value in operands:
            kind = "text" if isinstance(value, str) else "boolean" if isinstance(value, bool) else "number"
            if value is not None:
                kinds[kind].append(json.dumps(value) if kind == "number" else value)
        parts = []
        for kind, values in kinds.items():
            if values:
                parts.append(self._holds(key, kind, "= ANY(%s::{}[])", values))
        if None in operands:
            value = self.sql.SQL("(coalesce(jsonb_typeof({}), 'null') = 'null')")
            parts.append(value.format(self._value(key)))
        return self._join(parts, "OR")

    def _holds(self, key: str, kind: str, comparison: str, operand: Any) -> Any:
        """The value at the key is of the kind and compares so with the operand: true or false, and never NULL."""
        comparison = comparison.format(_CASTS[kind])
        if self.columns.get(key) == kind:  # IS TRUE would keep PostgreSQL from using the index of the column
            column = self.sql.Identifier(column_name(key))
            found = self.sql.SQL(f"({{0}} IS NOT NULL AND {{0}} {comparison})").format(column)
        else:  # the value is written twice, and its path bound twice
            value = self.sql.SQL(_AS_KIND[kind].replace("{0}", "{}")).format(self._value(key), self._value(key))
            found = self.sql.SQL(f"(({{}} {comparison}) IS TRUE)").format(value)
        self.values.append(operand)
        return found

    def _value(self, key: str) -> Any:
        self.values.append(_path(key))
        return self.sql.SQL("jsonb_path_query_first(metadata, %s::text::jsonpath, '{{}}', true)").format()


def _path(key: str) -> str:
    """The JSON path of a key. It is strict: a lax one would look into lists."""
    return "strict $" + "".join(f'."{step}"' for step in key.split("."))
