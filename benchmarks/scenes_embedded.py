"""Scenes and queries of the quickstart, embedded by the model that it trained, and cached.

    python benchmarks/scenes_embedded.py 1000000         embeds a million: half an hour, and 8 GB on disk

The cache is made of parts of 10,000 scenes, in .npy files of float16 that any library reads. A run that is stopped
continues where it was.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from scenes import GRID, PICTOGRAMS, Scene, make_query, make_scene, name_query  # noqa: E402

from metaembed import search  # noqa: E402

MODEL = ROOT / "outputs/quickstart/model"
CACHE = ROOT / "outputs/benchmark"
SEED = 123_456_789  # not the quickstart's training seed, nor its test seed
PART = 10_000  # scenes in a file
QUERIES = 200  # of the first scenes


def make_part(part: int) -> list[Scene]:
    """Return the scenes of a part: each has a seed of its own, so parts can be made in any order."""
    rng = random.Random(f"{SEED} {part}")
    return [make_scene(rng) for _ in range(PART)]


def part_file(part: int) -> Path:
    """Return the file of a part: `[PART, 64, D]` float16."""
    return CACHE / f"scenes/{part:04}.npy"


def load_model() -> torch.nn.Module:
    """Load the quickstart's model."""
    from transformers import AutoModel

    if not MODEL.exists():
        raise SystemExit(f"{MODEL} is not there: run `make quickstart` first")
    return AutoModel.from_pretrained(MODEL, trust_remote_code=True)


def save_whole(file: Path, array: np.ndarray) -> None:
    """Write a .npy file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.new")
    with unfinished.open("wb") as f:
        np.save(f, array)
    unfinished.replace(file)


class Encoder:
    """Embeds scenes as `model.encode_documents` does, to the last bit, but prepares each pictogram only once.

    A cell of a scene is one token, and the text around the picture is always the same.
    """

    def __init__(self, batch_size: int = 128) -> None:
        self.model, self.batch_size = load_model().eval(), batch_size
        cells = [*PICTOGRAMS, ""]
        self.place = {cell: i for i, cell in enumerate(cells)}
        process = self.model.processor.process_documents
        pictures = process([Scene((cell,) * GRID**2).draw(16) for cell in cells])["pixel_values"]
        self.cells = pictures.view(len(cells), GRID**2, -1, pictures.shape[1])[:, 0]  # [cells, patches, values]
        self.inputs = process([Scene(("",) * GRID**2).draw(16)])
        some = make_part(0)[:8]
        expected = self.model.encode_documents([scene.draw(16) for scene in some], batch_size=len(some))
        if not torch.equal(self(some), expected):
            raise SystemExit("the embeddings are not those of encode_documents")

    @torch.no_grad()
    def __call__(self, scenes: list[Scene]) -> Tensor:
        """Return the embeddings `[n, 64, D]`."""
        done = []
        for start in range(0, len(scenes), self.batch_size):
            some = scenes[start : start + self.batch_size]
            inputs = {name: value.repeat(len(some), *[1] * (value.ndim - 1)) for name, value in self.inputs.items()}
            places = torch.tensor([[self.place[cell] for cell in scene.cells] for scene in some])
            inputs["pixel_values"] = self.cells[places].flatten(0, 2)
            done.append(self.model.embed(**inputs))
        return torch.cat(done)


def embed_scenes(count: int) -> None:
    """Embed the first `count` scenes, but not those in the cache."""
    missing = [part for part in range(-(-count // PART)) if not part_file(part).exists()]
    encoder = Encoder() if missing else None
    for part in missing:
        start = time.process_time()
        save_whole(part_file(part), encoder(make_part(part)).half().numpy())
        speed = PART / (time.process_time() - start)
        print(f"embedded {(part + 1) * PART:,} of {count:,} scenes, {speed:.0f} a second", file=sys.stderr, flush=True)


def iterate_scenes(count: int) -> Iterator[Tensor]:
    """Yield the embeddings of the first `count` scenes, a part at a time: `[at most PART, 64, D]` float16."""
    embed_scenes(count)
    for start in range(0, count, PART):
        yield torch.from_numpy(np.load(part_file(start // PART))[: count - start])


def load_scenes(count: int, vectors: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the embeddings of the first `count` scenes: `[count, vectors, D]`."""
    return torch.cat([part[:, :vectors].to(dtype) for part in iterate_scenes(count)])


def load_queries(count: int = QUERIES) -> Tensor:
    """Return the embeddings of queries for the first `count` scenes: `[count, R_q, D]` float32."""
    file = CACHE / "queries.npy"
    if not file.exists():
        texts = [text for _, text in make_queries(QUERIES)]
        save_whole(file, load_model().encode_queries(texts, convert_to_numpy=True))
    return torch.from_numpy(np.load(file))[:count]


def make_queries(count: int) -> list[tuple[frozenset[str], str]]:
    """Return the pictograms that each query names, and its text."""
    made = []
    for i, scene in enumerate(make_part(0)[:count]):
        rng = random.Random(f"{SEED} query {i}")
        pictograms = make_query(scene, rng)
        made.append((pictograms, name_query(pictograms, rng)))
    return made


def find_best(count: int, k: int = 10, queries: int = QUERIES) -> Tensor:
    """Return the positions of the best `k` of the first `count` scenes: `[queries, k]`, by an exact search in float32.

    The best of every whole part are cached, so a larger count only adds parts.
    """
    best = []
    for part, documents in enumerate(iterate_scenes(count)):
        file = CACHE / f"best/{part:04}.npy"
        whole = len(documents) == PART
        if whole and file.exists():
            rows = torch.from_numpy(np.load(file))
        else:
            found = search(load_queries(), documents.float(), k)
            rows = torch.stack([found.scores.double(), (found.indices + part * PART).double()])
            if whole:
                save_whole(file, rows.numpy())
        best.append(rows)
    scores, positions = torch.cat(best, dim=2)[:, :queries]  # each [queries, parts * k]
    order = scores.topk(k, dim=1).indices
    return positions.gather(1, order).long()


def find_relevant(count: int, queries: int) -> Tensor:
    """Return whether a scene has every pictogram that a query names: boolean `[queries, count]`."""
    wanted = [pictograms for pictograms, _ in make_queries(queries)]
    scenes = [scene.pictograms for part in range(-(-count // PART)) for scene in make_part(part)][:count]
    return torch.tensor([[names <= pictograms for pictograms in scenes] for names in wanted])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="how many scenes")
    torch.set_num_threads(1)
    embed_scenes(parser.parse_args().count)
    load_queries()
    find_best(parser.parse_args().count)
