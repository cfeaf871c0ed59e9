"""What of the sources is in an index already, so that a run that was killed goes on where it was."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

__all__ = ["JOURNAL", "Journal"]

JOURNAL = "sources.sqlite"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    id TEXT PRIMARY KEY, source INTEGER, file TEXT, kind TEXT, sha256 TEXT, stored INTEGER) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS of_file ON documents (source, file);
CREATE TABLE IF NOT EXISTS files (source INTEGER, file TEXT, sha256 TEXT, PRIMARY KEY (source, file)) WITHOUT ROWID;
"""
_MANY = 500  # parameters of a statement


class Journal:
    """A table of the documents that are stored, by id, and of the files of which all documents are.

    The store and the journal are two files, or two machines, so a batch is written in three steps: its ids are
    noted as not stored yet, the store takes it, the ids are noted as stored. A kill leaves at most one batch in
    doubt, and the store is asked which of it it has.
    """

    def __init__(self, path: Path):
        self._database = sqlite3.connect(path, isolation_level=None)
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and everything is encoded anew") from None

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def stored(self, ids: Sequence[str]) -> dict[str, str]:
        """Return the content hashes of those documents that are stored, by id."""
        return {row[0]: row[1] for row in self._among("SELECT id, sha256 FROM documents WHERE stored AND id", ids)}

    def begin(self, documents: Iterable[tuple[str, int, str, str, str]]) -> None:
        """Note `(id, source, file, kind, sha256)` of documents that are about to be stored."""
        with self._database:
            self._database.execute("BEGIN")
            self._database.executemany("INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?, ?, 0)", documents)

    def commit(self, ids: Sequence[str]) -> None:
        """Note that documents that were begun are stored."""
        with self._database:
            self._database.execute("BEGIN")
            self._among("UPDATE documents SET stored = 1 WHERE id", ids)

    def in_doubt(self) -> dict[str, str]:
        """Return the content hashes of what was begun and perhaps not stored, by id."""
        return dict(self._database.execute("SELECT id, sha256 FROM documents WHERE stored = 0"))

    def doubt(self, ids: Sequence[str]) -> None:
        """Note that documents are not stored, or no longer."""
        with self._database:
            self._database.execute("BEGIN")
            self._among("UPDATE documents SET stored = 0 WHERE id", ids)

    def forget(self, ids: Sequence[str]) -> None:
        """Drop documents."""
        with self._database:
            self._database.execute("BEGIN")
            self._among("DELETE FROM documents WHERE id", ids)

    def stale(self, source: int, file: str, sha256: str) -> list[str]:
        """Return the ids of the documents of a file that were made of other content than this."""
        query = "SELECT id FROM documents WHERE source = ? AND file = ? AND sha256 != ?"
        return [row[0] for row in self._database.execute(query, (source, file, sha256))]

    def ids(self) -> list[str]:
        """Return the ids of all stored documents."""
        return [row[0] for row in self._database.execute("SELECT id FROM documents WHERE stored")]

    def finish(self, source: int, file: str, sha256: str) -> None:
        """Note that all documents of a file are stored."""
        self._database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (source, file, sha256))

    def finished(self, source: int, file: str) -> str | None:
        """Return the content hash with which a file was finished."""
        query = "SELECT sha256 FROM files WHERE source = ? AND file = ?"
        row = self._database.execute(query, (source, file)).fetchone()
        return row and row[0]

    def ids_of(self, source: int, file: str) -> list[str]:
        """Return the ids of the documents of a file."""
        query = "SELECT id FROM documents WHERE source = ? AND file = ? ORDER BY id"
        return [row[0] for row in self._database.execute(query, (source, file))]

    def files(self, source: int) -> list[str]:
        """Return the files of a source that have documents."""
        query = "SELECT DISTINCT file FROM documents WHERE source = ? ORDER BY file"
        return [row[0] for row in self._database.execute(query, (source,))]

    def forget_file(self, source: int, file: str) -> None:
        """Note that a file is gone, with its documents."""
        with self._database:
            self._database.execute("BEGIN")
            for table in ("documents", "files"):
                self._database.execute(f"DELETE FROM {table} WHERE source = ? AND file = ?", (source, file))

    def counts(self) -> dict[str, int]:
        """Return the number of stored documents of each kind."""
        query = "SELECT kind, COUNT(*) FROM documents WHERE stored GROUP BY kind ORDER BY kind"
        return dict(self._database.execute(query))

    def _among(self, statement: str, ids: Sequence[str]) -> list[Any]:
        found = []
        for start in range(0, len(ids), _MANY):
            some = ids[start : start + _MANY]
            marks = ", ".join("?" * len(some))
            with closing(self._database.execute(f"{statement} IN ({marks})", some)) as rows:
                found += rows.fetchall()
        return found
