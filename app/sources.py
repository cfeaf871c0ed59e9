"""What is in a source: pictures, texts and pages of a folder, or rows of a dataset, read when they are needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..inputs_metaembed import InputPolicy
from .pdf import PdfReader

__all__ = ["Columns", "Document", "File", "Problem", "Reading", "documents_of", "inspect", "load", "rows", "walk"]

_TEXT = {".txt", ".text", ".md", ".markdown", ".rst"}
_PICTURE = {
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".avif",
    ".heic",
    ".heif",
}
_SNIPPET = 200  # characters of a text that are kept as metadata
DATASETS = {".parquet", ".jsonl", ".ndjson"}


@dataclass(frozen=True)
class Reading:
    """How sources are read.

    Attributes:
        dpi: Resolution of the pages of PDFs.
        pages: What a page of a PDF is to the model: `"image"`, `"text"` or `"both"`.
        passage: Characters of a passage, at most: longer texts are split at the ends of paragraphs, lines or words.
        follow_links: Whether links are followed out of a source, and to folders.
        allow_urls: Whether pictures of a dataset may be fetched from URLs.
    """

    dpi: float = 144
    pages: str = "image"
    passage: int = 2000
    follow_links: bool = False
    allow_urls: bool = False


@dataclass(frozen=True)
class Columns:
    """The columns of a dataset that make a document."""

    text: str | None = None
    image: str | None = None
    id: str | None = None
    metadata: tuple[str, ...] = ()
    split: str = "train"
    name: str | None = None  # of the configuration, of a dataset of the Hub


@dataclass(frozen=True)
class Problem:
    """What could not be read, or was left out, and why. `status` is "unreadable", "skipped", "changed" or "gone"."""

    source: int
    file: str
    status: str
    reason: str
    page: int | None = None
    row: int | None = None
    part: int | None = None


@dataclass(frozen=True)
class File:
    """A file that was looked at: its kind, the hash of its content and the number of its documents."""

    source: int
    file: str
    path: Path
    kind: str  # "image", "text" or "pdf"
    sha256: str
    count: int
    stamp: tuple[int, int]  # size and time of change, when it was hashed


@dataclass(frozen=True)
class Document:
    """A document to be encoded. `load(reader)` returns the input of the encoder and metadata that it found."""

    id: str
    source: int
    file: str
    kind: str
    sha256: str
    metadata: dict[str, Any]
    load: Callable[[PdfReader], tuple[Any, dict[str, Any]]] = field(repr=False)

    def problem(self, reason: str, status: str = "unreadable") -> Problem:
        """Return a problem with this document."""
        place = {name: self.metadata.get(name) for name in ("page", "row", "part")}
        return Problem(self.source, self.file, status, reason, **place)


# Folders


def walk(
    root: Path, source: int = 0, follow_links: bool = False, leave_out: Iterable[Path] = ()
) -> Iterator[tuple[str, Path] | Problem]:
    """Yield `(name relative to the root, path)` of every file below a folder, by name, and what is left out.

    A link is followed to a file inside the root; anywhere else, and to folders, only with `follow_links`. Each folder
    is entered once, whatever links lead to it. Names that begin with a dot are left out.
    """
    real, avoided = os.path.realpath(root), {os.path.realpath(path) for path in leave_out}
    entered = {real}
    stack = [("", root)]
    while stack:
        prefix, folder = stack.pop()
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            yield Problem(source, prefix or ".", "unreadable", f"its files cannot be listed: {error.strerror}")
            continue
        below = []
        for entry in entries:
            name = prefix + entry.name
            try:
                name.encode()
            except UnicodeEncodeError:
                shown = os.fsencode(name).decode("utf-8", "backslashreplace")
                yield Problem(source, shown, "unreadable", "its name is no valid UTF-8: rename it")
                continue
            if entry.name.startswith("."):
                yield Problem(source, name, "skipped", "its name begins with a dot")
                continue
            target = os.path.realpath(entry.path)
            if target in avoided:
                continue
            try:
                mode = os.stat(entry.path).st_mode
            except OSError as error:
                reason = "it is a link to nothing, or to itself" if entry.is_symlink() else str(error.strerror)
                yield Problem(source, name, "unreadable", reason)
                continue
            if entry.is_symlink() and not follow_links:
                outside = not Path(target).is_relative_to(real)
                if outside or stat.S_ISDIR(mode):
                    where = "out of the source" if outside else "to a folder"
                    yield Problem(source, name, "skipped", f"it is a link {where}: --follow-links follows it")
                    continue
            if stat.S_ISDIR(mode):
                if target in entered:
                    yield Problem(source, name, "skipped", "it is a link to a folder that is indexed already")
                    continue
                entered.add(target)
                below.append((name + "/", Path(entry.path)))
            elif stat.S_ISREG(mode):
                yield name, Path(entry.path)
            else:
                yield Problem(source, name, "skipped", "it is no regular file")
        stack += reversed(below)


def inspect(
    name: str, path: Path, source: int, reading: Reading, policy: InputPolicy, pdf: PdfReader
) -> File | Problem:
    """Look at a file: what it is, by its content, the hash of its content, and how many documents it makes."""
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            head = file.read(1024)
            kind = _kind(head, path)
            if kind is None:
                return Problem(source, name, "skipped", "it is no picture, PDF, text or Markdown")
            if not head:
                raise ValueError("it is empty")
            if kind != "pdf" and before.st_size > policy.max_bytes:
                raise ValueError(f"it has more than {policy.max_bytes} bytes")
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        stamp = before.st_size, before.st_mtime_ns
        count = 1
        if kind == "pdf":
            count = pdf.count(path)
        elif kind == "text":
            count = len(passages(path, stamp, reading.passage))
        if not count:
            raise ValueError("it has no pages" if kind == "pdf" else "it has no text")
        return File(source, name, path, kind, digest, count, stamp)
    except (OSError, ValueError) as error:
        return Problem(source, name, "unreadable", _why(error))


def _kind(head: bytes, path: Path) -> str | None:
    """The kind of a file, by its content; by its name only for texts, which have no signature."""
    suffix = path.suffix.lower()
    if head.startswith(b"%PDF-") or (suffix == ".pdf" and b"%PDF-" in head):
        return "pdf"
    if _is_picture(path):
        return "image"
    if suffix in _TEXT:
        return "text"
    if suffix in _PICTURE or suffix == ".pdf":
        if not head:
            raise ValueError("it is empty")
        raise ValueError(f"it is no {'PDF' if suffix == '.pdf' else 'picture'}, or its start is damaged")
    return None


def _is_picture(path: Path) -> bool:
    try:
        with Image.open(path, formats=InputPolicy().formats):
            return True
    except Image.DecompressionBombError:
        return True  # and refused when it is read
    except Exception:  # PIL's readers raise almost anything
        return False


@lru_cache(maxsize=8)
def passages(path: Path, stamp: tuple[int, int], size: int) -> list[str]:
    """Return the passages of a text file, of at most `size` characters each.

    Raises:
        ValueError: if it is not UTF-8, or UTF-16 with a byte order mark.
    """
    content = path.read_bytes()
    utf_16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = content.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text (byte {error.start}): {error.reason}") from None
    if "\0" in text:
        raise ValueError("it is no text: it holds zero bytes")
    return split(text, size)


def split(text: str, size: int) -> list[str]:
    """Split a text at ends of paragraphs, else of lines, else of words, into parts of at most `size` characters."""
    found, start = [], 0
    while start < len(text):
        end = start + size
        if end < len(text):
            for mark in ("\n\n", "\n", " "):
                place = text.rfind(mark, start + size // 4, end)
                if place > 0:
                    end = place + len(mark)
                    break
        if part := text[start:end].strip():
            found.append(part)
        start = end
    return found


def documents_of(file: File, reading: Reading) -> Iterator[Document]:
    """Yield the documents of a file: one for a picture, one for each passage of a text and each page of a PDF."""
    for number in range(1, file.count + 1):
        place = {"pdf": {"page": number}, "text": {"part": number} if file.count > 1 else {}}.get(file.kind, {})
        suffix = "".join(f"#{key}={value}" for key, value in place.items())
        yield Document(
            f"{_prefixed(file.source, file.file)}{suffix}",
            file.source,
            file.file,
            file.kind,
            file.sha256,
            place,
            lambda reader, number=number: load(file, number, reading, reader),
        )


def _prefixed(source: int, file: str) -> str:
    """An id that no file of another source has."""
    return f"{source}:{file}" if source or re.match(r"\d+:", file) else file


def load(file: File, number: int, reading: Reading, reader: PdfReader) -> tuple[Any, dict[str, Any]]:
    """Read document `number`, from 1, of a file: the input of the encoder, and metadata that was found.

    Raises:
        OSError: if the file is gone.
        ValueError: if it cannot be read, or changed since it was looked at.
    """
    value: Any
    extra: dict[str, Any] = {}
    if file.kind == "image":
        value = file.path.read_bytes()
    elif file.kind == "text":
        value = passages(file.path, file.stamp, reading.passage)[number - 1]
        extra["text"] = _snippet(value)
    else:
        picture, text = reader.page(file.path, number, image=reading.pages != "text")
        text = _clean(text)
        if text:
            extra["text"] = _snippet(text)
        elif reading.pages == "text":
            raise ValueError("the page has no text: it may be scanned. A model that takes pictures can read it")
        value = {"image": picture} if reading.pages != "text" else {}
        if reading.pages != "image" and text:
            value["text"] = text[: reading.passage]
    now = os.stat(file.path)
    if (now.st_size, now.st_mtime_ns) != file.stamp:
        raise ValueError("it changed while it was read: run again")
    return value, extra


def _clean(text: str) -> str:
    """Text of a PDF without half characters and control characters."""
    text = text.encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\ufffe\uffff]+", " ", text).strip()


def _snippet(text: str) -> str:
    text = " ".join(text[: 2 * _SNIPPET].split())
    return text if len(text) <= _SNIPPET else text[: _SNIPPET - 1] + "…"


def _why(error: BaseException) -> str:
    """Why something cannot be read, in a few words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)


# Datasets


def rows(
    place: str, source: int, columns: Columns, reading: Reading, policy: InputPolicy
) -> Iterator[Document | Problem]:
    """Yield the rows of a dataset as documents: a parquet or jsonl file, or a dataset of the Hub.

    Raises:
        ValueError: if a column is not there.
    """
    if not (columns.text or columns.image):
        raise ValueError(f"{place} is a dataset: name its columns, as in --columns text=caption,image=file")
    local = Path(place)
    file, base = (local.name, local.parent) if local.is_file() else (place, None)
    seen: set[str] = set()
    for number, row in enumerate(_read_rows(place, columns), start=1):
        if isinstance(row, str):
            yield Problem(source, file, "unreadable", row, row=number)
            continue
        try:
            document = _row(row, number, file, base, source, columns, reading, policy)
            if document.id in seen:
                raise ValueError(f"its id {document.id!r} is that of an earlier row")
        except (OSError, ValueError) as error:
            yield Problem(source, file, "unreadable", _why(error), row=number)
            continue
        seen.add(document.id)
        yield document


def _row(
    row: dict[str, Any],
    number: int,
    file: str,
    base: Path | None,
    source: int,
    columns: Columns,
    reading: Reading,
    policy: InputPolicy,
) -> Document:
    for name in (columns.text, columns.image, columns.id, *columns.metadata):
        if name is not None and name not in row:
            raise ValueError(f"it has no column {name!r}, but {', '.join(map(repr, row))}")
    value: dict[str, Any] = {}
    digest, extra = hashlib.sha256(), {}
    if columns.image and row[columns.image] is not None:
        value["image"] = _picture(row[columns.image], base, reading, policy)
        digest.update(value["image"] if isinstance(value["image"], bytes) else value["image"].encode())
    if columns.text and row[columns.text] is not None:
        text = row[columns.text]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"its {columns.text!r} is no text")
        value["text"] = text
        digest.update(b"\0text\0" + text.encode())
        extra["text"] = _snippet(text)
    if not value:
        raise ValueError("it is empty")
    extra |= {name: row[name] for name in columns.metadata}
    digest.update(json.dumps(extra, allow_nan=False, sort_keys=True).encode())
    given = f"row={number}" if columns.id is None else row[columns.id]
    if not isinstance(given, str | int) or given == "":
        raise ValueError(f"its id is {given!r}, and must be text or a whole number")
    return Document(
        f"{_prefixed(source, file)}#{given}",
        source,
        file,
        "image" if "image" in value else "text",
        digest.hexdigest(),
        {"row": number, **extra},
        lambda reader: (value, {}),
    )


def _picture(value: Any, base: Path | None, reading: Reading, policy: InputPolicy) -> bytes | str:
    """A picture of a row: its bytes, or the URL that it may be fetched from."""
    path = value
    if isinstance(value, dict):  # as `datasets` keeps pictures
        path = value.get("path")
        value = value.get("bytes") or path
    if isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image):
        raise ValueError("its picture is decoded; a dataset must hold the bytes of picture files")
    if not isinstance(value, str):
        raise ValueError(f"its picture is {type(value).__name__}, and must be bytes, a path or a URL")
    if re.match(r"https?://", value):
        if not reading.allow_urls:
            raise ValueError(f"its picture is a URL, {value[:100]}: --allow-urls fetches it")
        return value
    if base is None:
        raise ValueError("its picture is a path, but the dataset is not a file of this machine")
    target = (base / value).resolve()
    if not target.is_relative_to(base.resolve()) and not reading.follow_links:
        raise ValueError(f"its picture {value!r} lies outside of the folder of the dataset")
    if target.stat().st_size > policy.max_bytes:
        raise ValueError(f"its picture has more than {policy.max_bytes} bytes")
    return target.read_bytes()


def _read_rows(place: str, columns: Columns) -> Iterator[dict[str, Any] | str]:
    """Yield rows as dicts, or why a row cannot be read."""
    path = Path(place)
    if path.is_file() and path.suffix.lower() == ".parquet":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ImportError("parquet files need pyarrow: pip install 'metaembed[app]'") from error
        with ParquetFile(path) as table:
            named = (columns.text, columns.image, columns.id, *columns.metadata)
            wanted = [name for name in dict.fromkeys(named) if name is not None]
            if lacking := [name for name in wanted if name not in table.schema_arrow.names]:
                raise ValueError(f"{place} has no column {lacking[0]!r}, but {', '.join(table.schema_arrow.names)}")
            for batch in table.iter_batches(batch_size=16, columns=wanted):
                yield from batch.to_pylist()
    elif path.is_file():
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            for line in filter(str.strip, lines):
                try:
                    row = json.loads(line)
                    line.encode()
                    yield row if isinstance(row, dict) else "it is no JSON object"
                except ValueError as error:
                    yield f"it is no JSON: {error}"
    else:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("datasets of the Hub need datasets: pip install 'metaembed[app]'") from error
        table = datasets.load_dataset(place, columns.name, split=columns.split, streaming=True)
        if columns.image:
            table = table.cast_column(columns.image, datasets.Image(decode=False))
        yield from table


def count_rows(place: str) -> int | None:
    """Return the number of rows of a dataset, if that is quickly known."""
    path = Path(place)
    if path.is_file() and path.suffix.lower() == ".parquet":
        from pyarrow.parquet import read_metadata

        return read_metadata(path).num_rows
    if path.is_file():
        with open(path, "rb") as file:
            return sum(1 for _ in file)
    return None
