"""Folders of files as people have them: pictures, texts and PDFs, and what only looks like one."""

import os
import random
from pathlib import Path

from PIL import Image

ENCRYPTED = b"""%PDF-1.4
1 0 obj <</Type /Catalog /Pages 2 0 R>> endobj
2 0 obj <</Type /Pages /Kids [3 0 R] /Count 1>> endobj
3 0 obj <</Type /Page /Parent 2 0 R /MediaBox [0 0 200 200]>> endobj
4 0 obj <</Filter /Standard /V 1 /R 2 /P -4
/O (OOOOOOOOOOOOOOOOOOOOOOOOOOOOOOOO) /U (UUUUUUUUUUUUUUUUUUUUUUUUUUUUUUUU)>>
endobj
trailer <</Root 1 0 R /Encrypt 4 0 R /Size 5 /ID [(0123456789abcdef) (0123456789abcdef)]>>
%%EOF
"""


def picture(seed: int, size=(12, 8)) -> Image.Image:
    """A picture that no other seed gives."""
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def pdf(path: Path, pages: int, seed: int = 0) -> Path:
    """Write a PDF of pages that all differ."""
    sheets = [picture(seed * 10_000 + page) for page in range(pages)]
    sheets[0].save(path, save_all=True, append_images=sheets[1:])
    return path


def messy(folder: Path, files: int = 200) -> dict[str, str]:
    """Write a folder of that many files, and return what must become of each: a kind, "unreadable" or "skipped"."""
    folder.mkdir()
    expected = {}

    def put(name: str, content: bytes, what: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        expected[name] = what

    put("a.png", _png(1), "image")
    whole = pdf(folder / "book.pdf", 30).read_bytes()
    expected["book.pdf"] = "pdf"
    put("half.pdf", whole[: len(whole) // 2], "unreadable")
    put("encrypted.pdf", ENCRYPTED, "unreadable")
    put("empty.pdf", b"", "unreadable")
    put("empty.png", b"", "unreadable")
    put("empty.txt", b"", "unreadable")
    put("blank.md", b" \n\n", "unreadable")
    put("truncated.png", _png(2)[:-40], "unreadable")
    put("picture.txt", _png(3), "image")
    put("text.jpg", b"I am no picture", "unreadable")
    put("text.pdf", b"I am no PDF", "unreadable")
    put("book.png", whole, "pdf")
    put("latin.txt", "café au lait".encode("latin-1"), "unreadable")
    put("utf16.txt", "häuser".encode("utf-16"), "text")
    put("about.txt", b"A file that begins with %PDF- is a PDF", "text")
    put("archive.zip", b"PK\3\4", "skipped")
    put(".hidden.png", _png(4), "skipped")
    put("図/絵.png", _png(5), "image")
    put("τέχνη/заметка.md", "# Яблоко\n\nкрасное".encode(), "text")  # noqa: RUF001
    put("صورة.png", _png(6), "image")
    put("long.md", ("A paragraph of words.\n\n" * 300).encode(), "text")
    os.symlink("..", folder / "τέχνη" / "loop")
    os.symlink("self", folder / "self.png")
    os.symlink("/etc/hostname", folder / "out.txt")
    os.symlink("a.png", folder / "inside.png")
    os.mkfifo(folder / "pipe.txt")
    expected |= {"τέχνη/loop": "skipped", "self.png": "unreadable", "out.txt": "skipped"}
    expected |= {"inside.png": "image", "pipe.txt": "skipped"}
    if os.geteuid():
        put("secret.txt", b"secret", "unreadable")
        (folder / "secret.txt").chmod(0)
    for number in range(files - len(expected)):
        kind = number % 3
        if kind == 0:
            put(f"more/{number:03}.png", _png(100 + number), "image")
        elif kind == 1:
            put(f"more/{number:03}.txt", f"text number {number}".encode(), "text")
        else:
            put(f"more/{number:03}.png", _png(100 + number)[:-30], "unreadable")
    return expected


def _png(seed: int) -> bytes:
    import io

    content = io.BytesIO()
    picture(seed).save(content, "PNG")
    return content.getvalue()
