"""Pages of PDFs as pictures and text, read in processes that may crash or hang without harm."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["PdfReader"]

_WORKER = Path(__file__).with_name("pdf_worker.py")


class PdfReader:
    """Reads PDFs in a process of its own, started when first needed. For one thread at a time.

    Args:
        dpi: Resolution that pages are rendered at.
        most_pixels: Of a page; larger ones are rendered at a lower resolution.
        timeout: Seconds that one page may take.
    """

    def __init__(self, dpi: float = 144, most_pixels: int = 4_000_000, timeout: float = 60):
        self.options = {"dpi": dpi, "most_pixels": most_pixels}
        self.timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None

    def count(self, path: Path) -> int:
        """Return the number of pages.

        Raises:
            ValueError: if the file cannot be read.
        """
        return self._ask(path=str(path))[0]["pages"]

    def page(self, path: Path, number: int, image: bool = True) -> tuple[Image.Image | None, str]:
        """Return page `number`, from 1, as a picture (if `image`) and as its text.

        Raises:
            ValueError: if it cannot be read.
        """
        answer, pixels = self._ask(path=str(path), page=number, image=image, **self.options)
        picture = Image.frombytes("RGB", tuple(answer["size"]), pixels) if image else None
        return picture, answer["text"]

    def _ask(self, **request: Any) -> tuple[dict[str, Any], bytes]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self.timeout, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            pixels = process.stdout.read(answer["bytes"])
            if len(pixels) < answer["bytes"]:
                raise EOFError
        except (OSError, EOFError, ValueError):
            hung = not timer.is_alive()
            self.close()
            crashed = f"it took more than {self.timeout:g} seconds" if hung else "it crashed the PDF renderer"
            raise ValueError(crashed) from None
        finally:
            timer.cancel()
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer, pixels

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            try:
                import pypdfium2  # noqa: F401
            except ImportError as error:
                raise ImportError("PDFs need pypdfium2: pip install 'metaembed[app]'") from error
            command = [sys.executable, "-I", str(_WORKER)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process

    def kill(self) -> None:
        """End the process; a thread that waits for it gets an error."""
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process.wait()
            self._process = None
