"""Scenes and queries of the quickstart, embedded by the model that it trained, and cached."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from metaembed.retrieval.collection import EmbeddingCollection

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from scenes import make_query, make_scene, name_query  # noqa: E402

MODEL = ROOT / "outputs/quickstart/model"
CACHE = ROOT / "outputs/benchmark"
SEED = 123_456_789  # not the quickstart's training seed, nor its test seed
PART = 5000  # scenes encoded and written at a time


def embed_scenes(count: int, queries: int) -> tuple[EmbeddingCollection, Tensor, Tensor]:
    """Embed `count` scenes and the queries of the first `queries` of them, unless they are in the cache.

    Returns:
        The scenes, in float32; the queries `[queries, R_q, D]`; and whether a scene has every pictogram that a query
        names, boolean `[queries, count]`.
    """
    rng = random.Random(SEED)
    scenes = [make_scene(rng) for _ in range(count)]
    rng = random.Random(SEED + 1)
    wanted = [make_query(scene, rng) for scene in scenes[:queries]]
    texts = [name_query(pictograms, rng) for pictograms in wanted]
    folder, file = CACHE / f"scenes-{count}", CACHE / f"queries-{count}.safetensors"
    collection = EmbeddingCollection.load(folder) if (folder / "collection.json").exists() else None
    if not (file.exists() and collection is not None and len(collection) == count):
        torch.set_num_threads(2)
        model = AutoModel.from_pretrained(MODEL, trust_remote_code=True)
        collection = collection or EmbeddingCollection(
            *model.encode_documents([scenes[0].draw(16)]).shape[1:], folder=folder
        )
        while len(collection) < count:
            part = scenes[len(collection) : len(collection) + PART]
            collection.append(model.encode_documents([scene.draw(16) for scene in part], batch_size=64))
            print(f"embedded {len(collection):,} of {count:,} scenes", file=sys.stderr, flush=True)
        save_file({"queries": model.encode_queries(texts)}, file)
    relevant = torch.tensor([[names <= scene.pictograms for scene in scenes] for names in wanted])
    return collection, load_file(file)["queries"], relevant
