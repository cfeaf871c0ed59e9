"""Renders pages of PDFs in a process of its own, which a damaged file may crash: run by `app/pdf.py`, by its path.

It imports neither this package nor torch. A request is a line of JSON; an answer is a line of JSON, followed by the
pixels of a page.
"""

import json
import os
import sys
from typing import Any

MOST_BYTES = 4 << 30  # of address space: a page may ask for more than the machine has


def main() -> None:
    """Answer requests until the input ends: with the process that asks."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # Windows, or a lower limit is set
    documents = Documents()
    for line in sys.stdin.buffer:
        pixels = b""
        try:
            answer, pixels = documents.answer(**json.loads(line))
        except MemoryError:
            answer = {"error": f"it needs more than {MOST_BYTES >> 30} GiB of memory"}
        except Exception as error:
            answer = {"error": explain(error)}
        out.write(json.dumps({**answer, "bytes": len(pixels)}).encode() + b"\n")
        out.write(pixels)
        out.flush()


class Documents:
    """Keeps the PDF open that was asked for last."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.document: Any = None

    def answer(
        self, path: str, page: int | None = None, dpi: float = 144, most_pixels: int = 1, image: bool = True
    ) -> tuple[dict[str, Any], bytes]:
        """Return the number of pages, or one page: its size, its text and its pixels, RGB."""
        import pypdfium2

        if path != self.path or page is None:  # counted anew: the file may be another one
            self.close()
            self.document, self.path = pypdfium2.PdfDocument(path), path
        if page is None:
            return {"pages": len(self.document)}, b""
        sheet = self.document[page - 1]
        try:
            text = sheet.get_textpage().get_text_bounded()
            if not image:
                return {"text": text}, b""
            width, height = sheet.get_size()
            scale = min(dpi / 72, (most_pixels / max(width * height, 1)) ** 0.5)
            picture = sheet.render(scale=scale, rev_byteorder=True).to_pil().convert("RGB")
            return {"text": text, "size": picture.size}, picture.tobytes()
        finally:
            sheet.close()

    def close(self) -> None:
        """Close the PDF."""
        if self.document is not None:
            self.document.close()
        self.path = self.document = None


def explain(error: Exception) -> str:
    """Return what is wrong with a PDF, from what PDFium says."""
    text = str(error) or repr(error)
    if "password" in text.lower() or "security" in text.lower():
        return "it is encrypted, and needs a password"
    if "data format" in text.lower() or "file access" in text.lower():
        return "it is no whole PDF: it is damaged, or its end is missing"
    return text[:300]


if __name__ == "__main__":
    main()
