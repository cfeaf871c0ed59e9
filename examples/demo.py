"""Search the quickstart's 2,000 test scenes in the browser, with the model that the quickstart trained.

    python examples/quickstart.py     first: it trains the model
    python examples/demo.py           then open http://127.0.0.1:7860

Writes the pictures and the index to `outputs/demo`, once: a folder as `metaembed index` makes it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from quickstart import TEST_SEED
from safetensors.torch import load_file
from scenes import GRID, make_task

from metaembed import MultiVectorIndex
from metaembed.app.encoder import Encoder, load_encoder
from metaembed.app.page import launch
from metaembed.app.settings import Settings, write_settings

EXAMPLES = [  # whose scene comes the nearer to the top, the more vectors a search uses
    "cactus, koala, bread, rocket",
    "game die, owl, alarm clock, watermelon",
    "owl, airplane, wrapped present, game die",
]
CELL, SHOWN_CELL = 16, 64  # pixels of a cell: as the model was trained, and as the pictures are kept


def make_index(quickstart: Path, output: Path) -> Path:
    """Write the scenes as pictures, and their embeddings as an index; return its folder."""
    folder = output / "index"
    if folder.exists():
        return folder
    documents = load_file(quickstart / "documents.safetensors")["documents"]  # [N, R_c, D]
    scenes, _, _ = make_task(len(documents), TEST_SEED)
    pictures, new = output / "pictures", output / "index.new"
    pictures.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)
    files = [f"scene {number:04}.png" for number in range(1, len(scenes) + 1)]
    for file, scene in zip(files, scenes, strict=True):
        scene.draw(SHOWN_CELL).save(pictures / file)
    with MultiVectorIndex.create(new, documents.shape[1], documents.shape[2], "int8") as index:
        index.add(documents, ids=files, metadata=[{"file": file, "source": 0, "kind": "image"} for file in files])
    settings = Settings(
        model=str((quickstart / "model").resolve()),
        roots=[str(pictures.resolve())],
        vectors=documents.shape[1],
        dim=documents.shape[2],
    )
    write_settings(new, settings)
    return new.rename(folder)


def load_model(quickstart: Path) -> Encoder:
    """Load the quickstart's model, which sees every picture as small as those that it was trained on."""
    encoder = load_encoder(quickstart / "model", device="cpu")
    size = encoder.model.processor.image_processor.size
    size["longest_edge"] = (GRID * CELL) ** 2  # pixels, in this processor
    return encoder


def main(argv: list[str] | None = None, **options: Any) -> Any:
    """Make the index if there is none, and start the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quickstart", type=Path, default=Path("outputs/quickstart"), help="what the quickstart wrote"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args(argv)
    if not (arguments.quickstart / "documents.safetensors").exists():
        raise SystemExit(
            f"{arguments.quickstart} holds no trained model: run `make quickstart` first, about 3 minutes"
        )
    return launch(
        make_index(arguments.quickstart, arguments.output),
        load_model(arguments.quickstart),
        arguments.host,
        arguments.port,
        title="Find a scene",
        examples=EXAMPLES,
        words=EXAMPLES[0],
        **options,
    )


if __name__ == "__main__":
    main()
