"""A small index of pictures, texts and pages of a PDF, and what finds Chromium."""

import shutil

from PIL import Image, ImageDraw
from tiny_models import tiny_model

from metaembed import MultiVectorIndex
from metaembed.app.encoder import load_encoder
from metaembed.app.page import Search
from metaembed.app.settings import Settings, write_settings
from metaembed.app.source import Source

TEXT = "red apple\n\ngreen <b>boat</b> & blue fish"


def find_chromium():
    """The path of an installed Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def make_pdf(path, pages):
    pictures = []
    for number in range(1, pages + 1):
        picture = Image.new("RGB", (120, 160), "white")
        ImageDraw.Draw(picture).rectangle((20, 20, 20 + 30 * number, 60), fill=(200, 40 * number, 0))
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:])


def make_files(folder, count=6):
    """Pictures, a text and a PDF of two pages; return the metadata of each document."""
    folder.mkdir()
    for number in range(count):
        picture = Image.new("RGB", (64, 48), "white")
        ImageDraw.Draw(picture).ellipse(
            (8 * number, 4, 8 * number + 20, 40), fill=(40 * number, 90, 200 - 30 * number)
        )
        picture.save(folder / f"picture {number}.png")
    (folder / "note.md").write_text(TEXT)
    make_pdf(folder / "report.pdf", 2)
    images = [{"file": f"picture {number}.png", "kind": "image"} for number in range(count)]
    pages = [{"file": "report.pdf", "kind": "pdf", "page": page, "text": "words of a page"} for page in (1, 2)]
    note = {"file": "note.md", "kind": "text", "text": TEXT[:40]}
    return [{"source": 0, **metadata} for metadata in (*images, note, *pages)]


def make_index(folder):
    """An index of such files, as `metaembed index` writes it, and the encoder that it was made with."""
    encoder = load_encoder(tiny_model(), device="cpu")
    settings = Settings("tiny", roots=[str(folder / "files")], vectors=8, dim=encoder.dim, options={"dpi": 72})
    metadata = make_files(folder / "files")
    source = Source(settings)
    documents = encoder.encode_documents([source.open(one) for one in metadata])
    with MultiVectorIndex.create(folder / "index", 8, encoder.dim, "int8") as index:
        index.add(documents, ids=[f"{one['file']}#{one.get('page')}" for one in metadata], metadata=metadata)
    write_settings(folder / "index", settings)
    return folder / "index", encoder


def make_search(folder):
    index, encoder = make_index(folder)
    from metaembed.app.settings import read_settings

    return Search(MultiVectorIndex.open(index), encoder, Source(read_settings(index)), k=9)
