"""The documents that an index was made of, opened again to be shown: from one folder, and nothing else of the disk."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..inputs_metaembed import InputPolicy, read_image

_PDFIUM = threading.Lock()  # it may be used by one thread at a time


class Source:
    """Opens documents by their metadata, `{"file", "page", "kind", "text"}`.

    Args:
        root: The folder that files are relative to. None: there are no files, only texts in the metadata.
        options: What the processor was given when the documents were encoded (`max_pixels`, ...).
    """

    def __init__(self, root: Path | None, options: Mapping[str, Any] | None = None):
        self.root = None if root is None else Path(root).resolve()
        self.options = dict(options or {})

    def path(self, file: str) -> Path:
        """Return the path of a file, links followed.

        Raises:
            ValueError: If it is not in the root.
        """
        if self.root is None:
            raise ValueError("this index was not made of files")
        path = (self.root / file).resolve()
        if not path.is_relative_to(self.root):
            raise ValueError(f"{file} is not in the folder that was indexed")
        return path

    def open(self, metadata: Mapping[str, Any]) -> Image.Image | str:
        """Return a document: its picture, its page or its text.

        Raises:
            ValueError: If it cannot be read (any more), or is outside the root.
        """
        if metadata.get("kind") == "text":
            return str(metadata.get("text") or "")
        path, page = self.path(str(metadata.get("file"))), metadata.get("page")
        try:
            if page is not None:
                return render_page(path, page)
            return read_image(path, InputPolicy.server(folders=(self.root,)))
        except OSError as error:
            raise ValueError(f"{path.name} cannot be read: {error}") from error


def render_page(path: Path, page: int, scale: float = 150 / 72) -> Image.Image:
    """Return a page of a PDF, 1 for the first."""
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("pages of PDFs need pypdfium2: pip install 'metaembed[app]'") from error
    with _PDFIUM, pypdfium2.PdfDocument(path) as document:
        return document[page - 1].render(scale=scale).to_pil()
