"""The two tasks: what to train and to test on, and the untrained model.

"pictures": scenes of pictograms and queries that name some of them, with a tiny model of random weights. "manuals":
headings and sections of real manuals, with a pretrained MiniLM.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaembed import MetaEmbedModel

from . import manuals
from .runs import Method, Run, Settings

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "examples"))

from scenes import PICTOGRAMS, Scene, make_task  # noqa: E402
from tiny_backbone import build_backbone, build_processor  # noqa: E402

FILES = ROOT / "outputs/reproduction/manuals"
TEST_SEED = 123_456_789  # no training seed, and not the quickstart's test
PATCH = 4  # pixels; 2 x 2 patches become one token
VOCABULARY = 5_000  # scenes whose queries train the tokenizer


@dataclass
class Data:
    """Queries and documents: a training pair at each index, or a test set with `relevant` [Q, N]."""

    queries: Sequence[str]
    documents: Sequence[Any]
    relevant: Tensor | None = None
    hard_negatives: Sequence[Any] = ()


class Pictures:
    """The scenes, drawn when they are needed."""

    storage = "float32"
    dtype = torch.float32  # of the training's matrix products

    def __init__(self, settings: Settings, seed: int):
        self.settings, self.seed = settings, seed

    @cached_property
    def _scenes(self) -> tuple[list[Scene], list, list[str]]:
        return make_task(self.settings.steps * self.settings.batch, self.seed)

    def batch(self, step: int, hard_negatives: int = 0) -> Data:
        """Return the training pairs of a step. Every scene is new."""
        part = slice(step * self.settings.batch, (step + 1) * self.settings.batch)
        scenes, wanted, texts = (values[part] for values in self._scenes)
        rng = random.Random(f"{self.seed} {step}")
        near = [exchange(*pair, rng) for _ in range(hard_negatives) for pair in zip(scenes, wanted, strict=True)]
        return Data(texts, self._draw(scenes), hard_negatives=self._draw(near))

    def test(self) -> Data:
        """Return the held-out scenes. Every scene that has all pictograms of a query is relevant."""
        scenes, wanted, texts = make_task(self.settings.test, TEST_SEED)
        relevant = torch.tensor([[query <= scene.pictograms for scene in scenes] for query in wanted])
        return Data(texts, self._draw(scenes), relevant)

    def _draw(self, scenes: Sequence[Scene]) -> list:
        return [scene.draw(self.settings.cell) for scene in scenes]

    def model(self, method: Method) -> MetaEmbedModel:
        """Return the untrained model."""
        settings = self.settings
        processor = build_processor(
            make_task(VOCABULARY, self.seed)[2],
            patch_size=PATCH,
            size={"shortest_edge": 16 * 16, "longest_edge": 1024 * 1024},
        )
        backbone = build_backbone(processor, settings.hidden, settings.layers, self.seed)
        return make_model(backbone, method, self.seed, processor=processor)


def exchange(scene: Scene, wanted: frozenset[str], rng: random.Random) -> Scene:
    """Return the scene with one of the wanted pictograms exchanged for another one."""
    old = rng.choice(sorted(wanted))
    new = rng.choice([pictogram for pictogram in PICTOGRAMS if pictogram not in scene.pictograms])
    return Scene(tuple(new if cell == old else cell for cell in scene.cells))


class Manuals:
    """The manuals: each epoch in a new order."""

    storage = "int8"
    dtype = torch.bfloat16

    def __init__(self, settings: Settings, seed: int):
        self.settings, self.seed = settings, seed

    @cached_property
    def _pairs(self) -> tuple[list, list]:
        return manuals.split(manuals.read_pairs(FILES))

    def batch(self, step: int, hard_negatives: int = 0) -> Data:
        """Return the training pairs of a step.

        Raises:
            ValueError: If hard negatives are asked for: there are none here.
        """
        if hard_negatives:
            raise ValueError("the manuals have no hard negatives.")
        pairs, size = self._pairs[0], self.settings.batch
        order: list[int] = []
        for epoch in range((step + 1) * size // len(pairs) + 1):
            order += random.Random(f"{self.seed} {epoch}").sample(range(len(pairs)), len(pairs))
        chosen = [pairs[i] for i in order[step * size : (step + 1) * size]]
        return Data(*zip(*chosen, strict=True))

    def test(self) -> Data:
        """Return the held-out books. Every section under the same heading is relevant."""
        titles, sections = zip(*self._pairs[1], strict=True)
        folded = [title.lower() for title in titles]
        relevant = torch.tensor([[one == other for other in folded] for one in folded])
        queries = {title: i for i, title in reversed(list(enumerate(folded)))}  # the first of equal ones
        rows = sorted(queries.values())
        return Data([titles[i] for i in rows], sections, relevant[rows])

    def model(self, method: Method) -> MetaEmbedModel:
        """Return the pretrained model, with new Meta Tokens."""
        backbone = manuals.fetch_backbone(FILES)
        return make_model(str(backbone), method, self.seed, dtype=torch.float32)


def make_model(backbone: Any, method: Method, seed: int, **options: Any) -> MetaEmbedModel:
    """Return a MetaEmbed model of a backbone, with the Meta Tokens of the paper, whatever the method uses of them."""
    model = MetaEmbedModel.from_backbone(
        backbone,
        seed=seed,
        embedding_dim=method.embedding_dim,
        token_projection=method.projection,
        document_sees_query_tokens=method.sees_query_tokens,
        **options,
    )
    if method.bidirectional:
        attend_both_ways(model)
    if method.rows == "vocabulary":
        with torch.no_grad():
            rows = model.backbone.get_input_embeddings().weight
            ids = [*model.config.query_token_ids, *model.config.document_token_ids]
            generator = torch.Generator().manual_seed(seed)
            rows[ids] = rows[torch.randint(ids[0], (len(ids),), generator=generator)]
    return model


def attend_both_ways(model: MetaEmbedModel) -> None:
    """Let every token of a causal language model see every other one."""
    text = model.backbone.language_model
    text.config.is_causal = False
    for layer in text.layers:
        layer.self_attn.is_causal = False

    def drop_mask(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        seen = kwargs[
            "attention_mask"
        ]  # causal and without the padding: [N, 1, L, L], or None where nothing is padded
        if seen is not None and seen.ndim == 4:
            kwargs["attention_mask"] = seen[:, :, -1:, :].expand_as(seen)  # what the last token sees, all see
        return args, kwargs

    for layer in text.layers:
        layer.register_forward_pre_hook(drop_mask, with_kwargs=True)


class Batches:
    """The training inputs of a task with all Meta Tokens, kept in memory for the runs that follow."""

    def __init__(self, task: Pictures | Manuals):
        self.task, self.kept = task, {}

    def get(self, step: int, processor: Any, hard_negatives: int, sees: bool) -> tuple[dict, dict]:
        """Return the inputs of the queries and of the documents (hard negatives at the end) of a step."""
        if (key := (step, hard_negatives, sees)) not in self.kept:
            data, length = self.task.batch(step, hard_negatives), self.task.settings.length
            documents = [*data.documents, *data.hard_negatives]
            columns = (
                processor.process_queries(list(data.queries), max_length=length),
                processor.process_documents(documents, max_length=length),
            )
            self.kept[key] = [
                {name: value.half() if name == "pixel_values" else value for name, value in column.items()}
                for column in columns
            ]
        return tuple(
            {name: value.float() if name == "pixel_values" else value for name, value in column.items()}
            for column in self.kept[key]
        )


TASKS = {"pictures": Pictures, "manuals": Manuals}


@lru_cache(maxsize=2)
def open_task(name: str, settings: Settings, seed: int) -> Batches:
    """Return a task and its training inputs: the same for all methods of a seed."""
    return Batches(TASKS[name](settings, seed))


def task_of(run: Run) -> Batches:
    """Return the task of a run."""
    return open_task(run.task, replace(run.settings), run.seed)
