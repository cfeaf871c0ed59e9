"""The documents that an index was made of, opened again to be shown: from its roots, and nothing else of the disk."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..inputs_metaembed import InputPolicy, read_image
from .settings import Settings

_PDFIUM = threading.Lock()  # only one thread at a time may use it


class Source:
    """Opens documents by their metadata.

    Args:
        settings: Of the index, which say where its files are. None: there are none, only texts in the metadata.
    """

    def __init__(self, settings: Settings | None):
        self.settings = settings

    def open(self, metadata: Mapping[str, Any]) -> Image.Image | str:
        """Return a document: its picture, its page, or (the beginning of) its text.

        Raises:
            ValueError: If there is no such file in the roots of the index (any more), or it cannot be read.
            ImportError: If it is a PDF, and pypdfium2 is not installed.
        """
        if metadata.get("text"):
            return str(metadata["text"])
        path = None if self.settings is None else self.settings.path_of(dict(metadata))
        if path is None:
            raise ValueError(f"{metadata.get('file') or 'this document'} is not in the folders of the index any more.")
        try:
            if metadata.get("page") is not None:
                return render_page(path, metadata["page"])
            return read_image(path, InputPolicy())  # PIL decodes it, within the usual limits
        except OSError as error:
            raise ValueError(f"{path.name} cannot be read: {error}") from error


def render_page(path: Path, page: int, scale: float = 150 / 72) -> Image.Image:
    """Return a page of a PDF, 1 for the first.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("pages of PDFs need pypdfium2: pip install 'metaembed[app]'") from error
    with _PDFIUM:
        try:
            with pypdfium2.PdfDocument(path) as document:
                return document[page - 1].render(scale=scale).to_pil()
        except (pypdfium2.PdfiumError, IndexError) as error:
            raise ValueError(f"page {page} of {path.name} cannot be read: {error}") from error
