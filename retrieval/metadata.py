"""The catalog of an index, a SQLite database: ids, metadata, deletions, and how many rows of the files are valid.

Every operation is committed by one transaction here. The database is in WAL mode: a reader keeps a transaction open
and sees the state at its start, even if others write meanwhile. Every important row has a CRC-32.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sqlite3
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .storage import DamagedIndexError, check_regular, flush_folder

DATABASE = "index.sqlite"
_APPLICATION = 0x4D455442
_MOST_MANIFEST = 1 << 16  # bytes
_PATIENCE = 60  # seconds that a statement waits for a lock of SQLite, which is never held for long
_INHERITED: list[sqlite3.Connection] = []  # of the parent process: must be neither used nor closed
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_SCHEMA = """
CREATE TABLE manifest (one INTEGER PRIMARY KEY CHECK (one = 1), json TEXT NOT NULL, pca BLOB, sum INTEGER NOT NULL);
CREATE TABLE chunks (first INTEGER PRIMARY KEY, count INTEGER NOT NULL, sums TEXT NOT NULL, sum INTEGER NOT NULL);
CREATE TABLE tail (first INTEGER PRIMARY KEY, count INTEGER NOT NULL, vectors BLOB NOT NULL, sum INTEGER NOT NULL);
CREATE TABLE documents (slot INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    metadata TEXT NOT NULL, sum INTEGER NOT NULL);
CREATE TABLE dead (number INTEGER PRIMARY KEY, slot INTEGER NOT NULL);
"""


class Catalog:
    """A connection to the database of an index. A slot is the position of a document: 0, 1, 2, ... in insertion order.

    Args:
        folder: Of the index; without one the catalog lives in memory.
        read: Start a read transaction, so that the connection keeps seeing the present state.
    """

    def __init__(self, folder: Path | None, *, read: bool = False):
        self.folder, self._pid = folder, os.getpid()
        self._db = _connect_memory() if folder is None else _connect(folder)
        with self.errors():
            if folder is not None:
                _check_schema(self._db)
            if read:
                self._db.execute("BEGIN")
                self.manifest()

    @classmethod
    def create(
        cls, folder: Path, manifest: Mapping[str, Any], pca: bytes | None, fill: Callable[[Catalog], None]
    ) -> None:
        """Create the database of a folder, or leave nothing behind.

        Args:
            folder: Where.
            manifest: What `manifest` returns later.
            pca: What `pca` returns later.
            fill: Adds the initial contents.
        """
        path = folder / f"{DATABASE}.{os.urandom(6).hex()}.new"
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # with the permissions of the umask
        self = cls.__new__(cls)
        self.folder, self._pid = folder, os.getpid()
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            with self.errors():
                self._db.executescript(f"PRAGMA application_id = {_APPLICATION}; BEGIN; {_SCHEMA}")
                self._set_manifest(manifest, pca)
                fill(self)
                self._db.execute("COMMIT")
                self._db.execute("PRAGMA journal_mode = WAL")
                self.close()
            os.replace(path, folder / DATABASE)
            flush_folder(folder)
        except BaseException:
            self.close()
            for suffix in ("", "-wal", "-shm", "-journal"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            raise

    @classmethod
    def create_in_memory(cls, manifest: Mapping[str, Any], pca: bytes | None) -> Catalog:
        """Create a catalog in memory."""
        self = cls(None)
        self._set_manifest(manifest, pca)
        return self

    def close(self) -> None:
        """Close the connection, unless it is a parent process's."""
        if self._pid == os.getpid():
            self._db.close()
        else:
            _INHERITED.append(self._db)

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # A connection refers to itself, so it would stay open until the garbage is collected. At the end of the
        # interpreter modules are gone already (hence the default argument), and with them the need.
        if hasattr(self, "_db") and not finalizing():
            self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Catalog]:
        """Commit everything that the block writes, or nothing."""
        with self.errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn errors of SQLite into errors about the index."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise _explained(error, self.folder) from error

    def checkpoint(self, how: str = "PASSIVE") -> None:
        """Move the write-ahead log into the database, as far as readers of earlier states allow."""
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA busy_timeout = 0").fetchall()  # waiting for readers is of no use
            self._db.execute(f"PRAGMA wal_checkpoint({how})").fetchall()
        self._db.execute(f"PRAGMA busy_timeout = {_PATIENCE * 1000}").fetchall()

    def log_size(self) -> int:
        """Return the size of the write-ahead log in bytes."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(f"{self.folder / DATABASE}-wal").st_size if self.folder else 0
        return 0

    def vacuum(self) -> None:
        """Free the space of deleted rows. Nothing depends on it, so errors are ignored."""
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("VACUUM")

    def manifest(self) -> dict[str, Any]:
        """Return the manifest: see `Manifest`."""
        rows = self._db.execute("SELECT length(CAST(json AS BLOB)), length(pca) FROM manifest").fetchall()
        if len(rows) != 1 or not 0 < rows[0][0] <= _MOST_MANIFEST:
            raise self._damaged("its manifest is missing or too large")
        text, pca, total = self._db.execute("SELECT json, pca, sum FROM manifest").fetchone()
        if not isinstance(text, str) or not isinstance(pca, bytes | None) or total != _sum(text, pca or b""):
            raise self._damaged("its manifest does not match its checksum")
        try:
            manifest = json.loads(text)
        except ValueError:
            raise self._damaged("its manifest is not JSON") from None
        if not isinstance(manifest, dict):
            raise self._damaged("its manifest is not a JSON object")
        return manifest

    def pca(self) -> bytes | None:
        """Return the bytes of the PCA matrix, if there is one."""
        return self._db.execute("SELECT pca FROM manifest").fetchone()[0]

    def set_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest."""
        self._set_manifest(manifest, self.pca())

    def _set_manifest(self, manifest: Mapping[str, Any], pca: bytes | None) -> None:
        text = json.dumps(manifest)
        self._db.execute("REPLACE INTO manifest VALUES (1, ?, ?, ?)", (text, pca, _sum(text, pca or b"")))

    # Documents

    def add(self, first: int, documents: Iterable[tuple[str, str]]) -> None:
        """Insert documents, `(id, metadata as JSON)`, from slot `first` on. Their ids must be new."""
        rows = ((slot, i, text, _sum(slot, i, text)) for slot, (i, text) in enumerate(documents, first))
        self._db.executemany("INSERT INTO documents VALUES (?, ?, ?, ?)", rows)

    def bury(self, slots: Sequence[int]) -> None:
        """Delete documents. Their slots stay dead until the index is compacted."""
        one = [(slot,) for slot in slots]
        self._db.executemany("DELETE FROM documents WHERE slot = ?", one)
        self._db.executemany("INSERT INTO dead (slot) VALUES (?)", one)

    def slots(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the slots of those ids that are in the index."""
        found = self._db.execute(
            "SELECT id, slot FROM documents WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(list(ids), ensure_ascii=False),),
        )
        return dict(found.fetchall())

    def values(self, path: str, first: int) -> list[tuple[int, str | None, Any]]:
        """Read what documents have at a path of their metadata, for those from slot `first` on.

        Args:
            path: As SQLite writes paths: `$."author"."name"`.
            first: The first slot.

        Returns:
            Slot, type in JSON (`None` if there is nothing at the path) and value. A value of type `"real"` is the
            text `"[1.5,1.5]"`, because not every version of SQLite reads the last digit right.
        """
        return self._db.execute(
            "SELECT slot, json_type(metadata, ?), CASE json_type(metadata, ?) "
            "WHEN 'real' THEN json_extract(metadata, ?, ?) ELSE json_extract(metadata, ?) END "
            "FROM documents WHERE slot >= ? ORDER BY slot",
            (path, path, path, path, path, first),
        ).fetchall()

    def documents(self, slots: Sequence[int]) -> dict[int, tuple[str, dict[str, Any]]]:
        """Return the ids and metadata of those slots that are not dead."""
        found = {}
        for slot in slots:
            row = self._db.execute("SELECT id, metadata FROM documents WHERE slot = ?", (slot,)).fetchone()
            if row is not None:
                found[slot] = (row[0], json.loads(row[1]) if row[1] != "{}" else {})
        return found

    def all(self) -> Iterator[tuple[str, str]]:
        """Return the id and the metadata (as JSON) of every document, in order of slots."""
        return self._db.execute("SELECT id, metadata FROM documents ORDER BY slot")

    def after(self, slot: int, count: int) -> list[int]:
        """Return the next `count` slots from `slot` on that are not dead."""
        found = self._db.execute("SELECT slot FROM documents WHERE slot >= ? ORDER BY slot LIMIT ?", (slot, count))
        return [slot for (slot,) in found]

    def dead(self, after: int = 0) -> tuple[np.ndarray, int]:
        """Return the slots that died after deletion number `after`, and the number of the last deletion."""
        rows = self._db.execute("SELECT number, slot FROM dead WHERE number > ? ORDER BY number", (after,)).fetchall()
        return np.array([slot for _, slot in rows], np.int64), rows[-1][0] if rows else after

    def renumber(self) -> None:
        """Renumber the slots, without the dead ones."""
        run = self._db.execute
        run("CREATE TEMP TABLE kept AS SELECT id, metadata FROM documents ORDER BY slot")
        run("DELETE FROM documents")
        run("INSERT INTO documents SELECT rowid - 1, id, metadata, row_sum(rowid - 1, id, metadata) FROM kept")
        run("DROP TABLE kept")
        run("DELETE FROM dead")

    # Vectors

    def tail(self, first: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield the vectors of small adds from slot `first` on: first slot, number of documents, bytes."""
        for at, count, vectors, total in self._db.execute(
            "SELECT * FROM tail WHERE first >= ? ORDER BY first", (first,)
        ):
            if not isinstance(vectors, bytes) or total != _sum(at, count, vectors):
                raise self._damaged(f"the vectors of documents {at} to {at + count - 1} do not match their checksum")
            yield at, count, vectors

    def tail_sizes(self) -> list[tuple[int, int, int]]:
        """Return the same with the number of bytes instead of the bytes."""
        return self._db.execute("SELECT first, count, length(vectors) FROM tail ORDER BY first").fetchall()

    def add_tail(self, first: int, count: int, vectors: bytes) -> None:
        """Store the vectors of a small add."""
        self._db.execute("INSERT INTO tail VALUES (?, ?, ?, ?)", (first, count, vectors, _sum(first, count, vectors)))

    def chunks(self) -> list[tuple[int, int, list[int]]]:
        """Return what each append wrote to the files: first slot, number of documents, CRC-32 per file."""
        chunks = []
        for first, count, sums, total in self._db.execute("SELECT * FROM chunks ORDER BY first"):
            if total != _sum(first, count, sums):
                raise self._damaged(f"the checksums of documents {first} to {first + count - 1} are damaged")
            chunks.append((first, count, json.loads(sums)))
        return chunks

    def add_chunk(self, first: int, count: int, sums: Sequence[int]) -> None:
        """Record an append to the files, which included the small adds before it."""
        text = json.dumps(list(sums))
        self._db.execute("DELETE FROM tail")
        self._db.execute("INSERT INTO chunks VALUES (?, ?, ?, ?)", (first, count, text, _sum(first, count, text)))

    def forget_vectors(self) -> None:
        """Delete all records of vectors, which will be written anew."""
        self._db.execute("DELETE FROM tail")
        self._db.execute("DELETE FROM chunks")

    def verify(self, rows: int) -> list[str]:
        """Read the whole database and return what is wrong with it, given the number of slots."""
        wrong = [f"{DATABASE}: {line}" for (line,) in self._db.execute("PRAGMA integrity_check(20)") if line != "ok"]
        alive = np.zeros(rows, np.uint8)
        for slot, document, metadata, total in self._db.execute("SELECT * FROM documents"):
            if not 0 <= slot < rows or total != _sum(slot, document, metadata):
                wrong.append(f"{DATABASE}: document {slot} does not match its checksum")
            else:
                alive[slot] += 1
        for (slot,) in self._db.execute("SELECT slot FROM dead"):
            if isinstance(slot, int) and 0 <= slot < rows:
                alive[slot] += 1
        if (alive != 1).any():
            wrong.append(f"{DATABASE}: {int((alive != 1).sum())} documents are lost, or both deleted and present")
        return wrong

    def _damaged(self, what: str) -> DamagedIndexError:
        return DamagedIndexError(f"{self.folder / DATABASE if self.folder else 'the index'} is damaged: {what}")


def _connect_memory() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    db.executescript(_SCHEMA)
    db.create_function("row_sum", 3, _sum, deterministic=True)
    return db


def _connect(folder: Path) -> sqlite3.Connection:
    path = folder / DATABASE
    for suffix in ("", "-wal", "-shm", "-journal"):  # what SQLite opens
        check_regular(Path(f"{path}{suffix}"))
    mode = "mode=rw"
    if not os.access(folder, os.W_OK) or not os.access(path, os.W_OK):
        log = Path(f"{path}-wal")
        mode = "mode=ro" if log.exists() and log.stat().st_size else "immutable=1"
    try:
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?{mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=_PATIENCE,
        )
        try:
            for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = FULL", "query_only = OFF"):
                db.execute(f"PRAGMA {pragma}")
            db.create_function("row_sum", 3, _sum, deterministic=True)
        except BaseException:
            db.close()
            raise
    except (sqlite3.Error, UnicodeDecodeError) as error:  # of text that is damaged
        raise _explained(error, folder) from error
    return db


@cache
def _expected_schema() -> frozenset[Any]:
    db = sqlite3.connect(":memory:")
    db.executescript(_SCHEMA)
    return frozenset(db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"))


def _check_schema(db: sqlite3.Connection) -> None:
    """Raise if the database has other tables, or a trigger or view, which our statements would run."""
    if frozenset(db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT 100")) != _expected_schema():
        raise DamagedIndexError("the database of the index does not have the expected tables")


def _explained(error: sqlite3.Error | UnicodeDecodeError, folder: Path | None) -> Exception:
    """Return the error of the operating system or the index that an error of SQLite stands for."""
    name = getattr(error, "sqlite_errorname", "") or ""
    where = "the index" if folder is None else folder / DATABASE
    if name.startswith("SQLITE_FULL"):
        return OSError(errno.ENOSPC, f"the disk of {folder} is full; the operation was rolled back")
    if name.startswith(("SQLITE_READONLY", "SQLITE_PERM")):
        return PermissionError(errno.EROFS, f"{where} is not writable for this process; nothing was changed")
    if isinstance(error, UnicodeDecodeError) or name.startswith(
        ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_MISMATCH", "SQLITE_FORMAT", "SQLITE_ERROR")
    ):
        return DamagedIndexError(f"{where} is damaged: {error}")
    return OSError(errno.EIO, f"{where} cannot be used: {error} ({name})")


def _sum(*values: Any) -> int:
    """The CRC-32 of the values of a row. Bytes come last."""
    *texts, last = values
    texts += [] if isinstance(last, bytes) else [last]
    total = zlib.crc32("".join([f"{value}\0" for value in texts]).encode("utf-8", "replace"))
    return zlib.crc32(last, total) if isinstance(last, bytes) else total


# Metadata


def to_json(metadata: Any) -> str:
    """Return the metadata of a document as JSON.

    Raises:
        TypeError: if it is not a dict, or JSON cannot represent a value.
        ValueError: if it contains NaN, infinity, the character NUL, or an integer of more than 64 bits.
    """
    if metadata is None or metadata == {}:
        return "{}"
    if not isinstance(metadata, Mapping):
        raise TypeError(f"the metadata of a document must be a dict, not {type(metadata).__name__}")
    try:
        check_json(metadata)
        text = _ENCODER.encode(metadata)
        text.encode()
    except RecursionError:
        raise ValueError("metadata is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("metadata contains a lone surrogate, which UTF-8 cannot encode") from None
    return text


def check_json(value: Any, depth: int = 0) -> None:
    """Raise a `TypeError` or a `ValueError` unless the value can be stored as JSON."""
    if isinstance(value, str):  # the usual types come first
        if "\0" in value:
            raise ValueError("metadata cannot contain the character NUL")
    elif value is None or isinstance(value, bool):
        pass
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"metadata can contain integers of up to 64 bits, not {value}; store it as text")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("metadata cannot contain NaN or infinity")
    elif depth > 100:
        raise ValueError("metadata is nested more than 100 levels deep")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the keys of metadata must be str, not {key!r}")
            check_json(key)
            check_json(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_json(inner, depth + 1)
    else:
        raise TypeError(f"metadata must have values that JSON can represent, not {type(value).__name__}")
