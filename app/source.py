"""The documents of an index, opened again to be shown: from its sources, and nothing else of the disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from PIL import Image

from ..inputs_metaembed import InputPolicy, read_image
from .pdf import PdfReader
from .settings import Settings
from .sources import File, Reading, load


class Source:
    """Opens documents by their metadata. Several threads may share it.

    Args:
        settings: Of the index, which say where its files are. None: there are none to open.
    """

    def __init__(self, settings: Settings | None):
        self.settings = settings or Settings("")
        names = {field.name for field in fields(Reading)}
        self._reading = Reading(**{name: value for name, value in self.settings.options.items() if name in names})
        self._pdf, self._lock = PdfReader(self._reading.dpi), threading.Lock()

    def open(self, metadata: Mapping[str, Any]) -> Any:
        """Return a document as it was encoded: a picture, a text, or a dict of both.

        Raises:
            ValueError: If it was no file of a source of the index, is there no more, or cannot be read.
        """
        name = metadata.get("file") or "this document"
        if metadata.get("row") is not None or metadata.get("kind") not in ("image", "text", "pdf"):
            raise ValueError(f"{name} is no file that could be opened.")
        path = self.settings.path_of(dict(metadata))
        if path is None:
            raise ValueError(f"{name} is not in the sources of the index any more.")
        try:
            status = os.stat(path)
            stamp = status.st_size, status.st_mtime_ns
            file = File(metadata["source"], name, path, metadata["kind"], str(metadata.get("sha256")), 1, stamp)
            with self._lock:
                number = metadata.get("page") or metadata.get("part") or 1
                value, _ = load(file, number, self._reading, self._pdf)
            return read_image(value, InputPolicy.server()) if isinstance(value, bytes) else value
        except (OSError, IndexError) as error:
            raise ValueError(f"{name} cannot be read any more: {error}") from error


def picture_of(item: Any) -> Image.Image | None:
    """Return the picture of a query or document, or None if it is text."""
    picture = item.get("image") if isinstance(item, dict) else item
    return picture if isinstance(picture, Image.Image) else None
