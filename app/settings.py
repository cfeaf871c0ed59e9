"""What an index was made with, kept beside it: the model, where the vectors are, and the sources."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

__all__ = [
    "REPORT",
    "SETTINGS",
    "Settings",
    "folder_of",
    "is_address",
    "open_index",
    "read_settings",
    "write_settings",
]

SETTINGS, REPORT = "metaembed.json", "report.jsonl"
_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """The settings of an index, in `metaembed.json` of its folder.

    Every document of the index has metadata `file` (path relative to its root, with "/"), `source` (the root's place
    in `roots`), `kind` ("image", "text" or "pdf"), `sha256` (of the content); `page` (PDFs, from 1); `part` (passages
    of a longer text, from 1); `text` (the beginning of a text); `row` and named columns (rows of a dataset).
    """

    model: str  # folder or Hub id
    address: str | None = None  # of the store that has the vectors; None: an index in the same folder
    roots: list[str] = field(default_factory=list)  # absolute paths of the sources, or Hub ids of datasets
    revision: str | None = None  # of the model
    trust_remote_code: bool = False
    vectors: int = 64  # of a document
    dim: int = 128
    budgets: list[list[int]] = field(default_factory=list)
    ordered: bool = True  # whether prefixes are trained; else they are ordered summaries
    options: dict[str, Any] = field(default_factory=dict)  # how sources are read: resolution of PDFs, columns, ...

    def path_of(self, metadata: dict[str, Any]) -> Path | None:
        """Return the file that a document was made of, or None if it is outside its root, gone, or was no file."""
        try:
            root = Path(self.roots[metadata["source"]])
            base = root if root.is_dir() else root.parent
            path = (base / metadata["file"]).resolve(strict=True)
        except (KeyError, IndexError, TypeError, OSError, ValueError):
            return None
        inside = path.is_relative_to(base.resolve()) or self.options.get("follow_links", False)
        return path if inside and path.is_file() else None


def read_settings(index_folder: str | os.PathLike[str]) -> Settings:
    """Read the settings of an index.

    Args:
        index_folder: Its folder, or the address of a store that was indexed into from the current directory.

    Raises:
        FileNotFoundError: if there are none; `metaembed index` writes them.
        ValueError: if they are damaged, or of a later version.
    """
    path = folder_of(index_folder) / SETTINGS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{index_folder} is no index of `metaembed index`: there is no {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
        raise ValueError(f"{path} is not of version {_VERSION}; a later version of metaembed may have written it")
    try:
        return Settings(**content)
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_settings(index_folder: str | os.PathLike[str], settings: Settings) -> None:
    """Write the settings of an index, whole or not at all. A password in the address is not written."""
    if settings.address:
        settings = replace(settings, address=without_password(settings.address))
    path = folder_of(index_folder) / SETTINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{SETTINGS}.{os.getpid()}.new")
    content = json.dumps({"version": _VERSION, **asdict(settings)}, indent=2, ensure_ascii=False)
    with open(new, "w", encoding="utf-8") as file:
        file.write(content + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def open_index(index: str | os.PathLike[str], **options: Any) -> Any:
    """Open the vectors of an index, a `VectorStore`: those in its folder, or in the store that its settings name.

    Args:
        index: A folder, or the address of a store. Passwords come with the address or by the engine's own ways
            (`PGPASSWORD`, `QDRANT_API_KEY`).
        **options: Of `open_store`.

    Raises:
        FileNotFoundError: if there is no index.
    """
    from ..stores import open_store

    if is_address(index):
        return open_store(str(index), **options)
    try:
        address = read_settings(index).address
    except FileNotFoundError:
        address = None
    return open_store(address or Path(index), **options)


def is_address(index: str | os.PathLike[str]) -> bool:
    """Whether this is the address of a store, and not a folder."""
    return isinstance(index, str) and re.match(r"[a-z][a-z+]+:", index) is not None and not index.startswith("file:")


def folder_of(index: str | os.PathLike[str]) -> Path:
    """Return the folder that has the settings of an index: its own, or, of a store, `NAME.metaembed` here."""
    if not is_address(index):
        return Path(str(index).removeprefix("file:"))
    name = re.search(r"([\w.-]+)/*$", str(index).partition("#")[0])
    return Path(f"{name[1] if name else 'store'}.metaembed")


def without_password(address: str) -> str:
    """Return an address without the password of its user."""
    parts = urlsplit(address)
    if parts.password is None:
        return address
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}@{host}"))
