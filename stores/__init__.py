"""Where documents are kept: our own index in a folder, Qdrant or PostgreSQL, behind one protocol and by address."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable
from urllib.parse import unquote, urlsplit

from ..retrieval.index import Document, MultiVectorIndex, SearchHits
from ..scoring_metaembed import Budget

__all__ = ["Document", "SearchHits", "VectorStore", "create_store", "open_store"]

_FORMS = """
  a folder, `pages/` or `file:pages`                            an index of this package
  `qdrant+edge:pages/`                                          Qdrant in this process, in a folder
  `http://host:6333/pages`                                      the collection `pages` of a Qdrant server or cluster
  `postgresql://user:password@host:5432/database?table=pages`   a table of PostgreSQL with pgvector"""


@runtime_checkable
class VectorStore(Protocol):
    """What every store does, with the arguments and the meaning that `MultiVectorIndex` documents.

    What an engine cannot do raises an error that says so; it never answers with something else.
    """

    @property
    def vectors(self) -> int:
        """How many vectors of a document are kept."""

    @property
    def dim(self) -> int:
        """Dimensions of documents and queries."""

    def add(
        self, embeddings: Any, ids: Sequence[str], metadata: Sequence[Mapping[str, Any] | None] | None = None
    ) -> None:
        """Add documents `[n, r, dim]`; ids that are there already are an error."""

    def upsert(
        self, embeddings: Any, ids: Sequence[str], metadata: Sequence[Mapping[str, Any] | None] | None = None
    ) -> None:
        """Add documents, and replace those whose ids are there already."""

    def delete(self, ids: Sequence[str] | None = None, where: Mapping[str, Any] | None = None) -> int:
        """Delete documents, by id or by a filter, and return their number."""

    def get(self, ids: Sequence[str]) -> list[Document]:
        """Return the documents with these ids, in their order."""

    def search(
        self,
        queries: Any,
        k: int = 10,
        budget: Budget | None = None,
        stages: Any = "auto",
        where: Mapping[str, Any] | None = None,
        include_ids: Sequence[str] | None = None,
        exclude_ids: Sequence[str] | None = None,
    ) -> SearchHits:
        """Find the best documents of every query `[Q, r, dim]`."""

    def close(self) -> None:
        """Close files and connections."""

    def __len__(self) -> int: ...

    def __contains__(self, id: object) -> bool: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def create_store(address: str | os.PathLike[str] | None, vectors: int, dim: int, **settings: Any) -> VectorStore:
    """Create an empty store.

    Args:
        address: Where: see `open_store`. `None` is an index in memory.
        vectors: How many vectors of a document are kept: its first ones.
        dim: Dimensions of documents and queries.
        **settings: Of the engine, such as `quantization`: those of `MultiVectorIndex.create`, `EdgeStore.create`,
            `QdrantStore.create` or `PgvectorStore.create`.

    Raises:
        ValueError: if the address is of no known form, something is there already, or a setting does not fit.
        TypeError: if the engine has no such setting.
        ImportError: if the engine's client is not installed; the message says what to install.
    """
    kind, place = _parse(address)
    if kind == "folder":
        return MultiVectorIndex.create(place, vectors, dim, **settings)
    return _engine(kind).create(place, vectors, dim, **settings)


def open_store(address: str | os.PathLike[str], **options: Any) -> VectorStore:
    """Open a store by its address.

    Args:
        address: A folder of an index, `qdrant+edge:FOLDER`, `http(s)://HOST:PORT/COLLECTION` for Qdrant, or
            `postgresql://USER:PASSWORD@HOST:PORT/DATABASE?table=TABLE`.
        **options: Of the engine, such as `timeout` or `api_key`.

    Raises:
        ValueError: if the address is of no known form, or what is there is no store.
        FileNotFoundError: if there is nothing at this address.
        ImportError: if the engine's client is not installed; the message says what to install.
    """
    kind, place = _parse(address)
    if kind == "folder":
        if place is None:
            raise TypeError("an index in memory cannot be opened; make one with create_store(None, ...)")
        return MultiVectorIndex.open(place, **options)
    return _engine(kind).open(place, **options)


def _parse(address: Any) -> tuple[str, Any]:
    """The kind of store at an address, and where it is."""
    if address is None or isinstance(address, os.PathLike):
        return "folder", address
    if not isinstance(address, str) or not address:
        raise TypeError(f"the address of a store must be text or a path, not {address!r}; it is one of:{_FORMS}")
    scheme, colon, rest = address.partition(":")
    if not colon or len(scheme) == 1 or os.sep in scheme:  # a letter is a drive of Windows
        return "folder", Path(address)
    if scheme == "file":
        parts = urlsplit(address)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ValueError(f"{address!r} names no folder of this machine; write file:FOLDER or file:///FOLDER")
        return "folder", Path(unquote(parts.path))
    if scheme == "qdrant+edge":
        if not rest:
            raise ValueError("qdrant+edge: must be followed by a folder, as in qdrant+edge:pages")
        return "edge", Path(rest)
    if scheme in ("http", "https"):
        return "qdrant", address
    if scheme in ("postgresql", "postgres"):
        return "pgvector", address
    raise ValueError(f"there is no store for {_hidden(address)!r}; an address is one of:{_FORMS}")


def _hidden(address: str) -> str:
    """An address without what may be a password."""
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if rest else address


def _engine(kind: str) -> Any:
    if kind == "pgvector":
        from .pgvector import PgvectorStore

        return PgvectorStore
    from . import qdrant

    return qdrant.EdgeStore if kind == "edge" else qdrant.QdrantStore
