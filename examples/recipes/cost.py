"""Print the memory and the hours that the recipes should need, by calculation: nothing here was measured.

    python examples/recipes/cost.py                               on one and eight H100
    python examples/recipes/cost.py --gpu A100 --utilization 0.3

Memory of a GPU, with LoRA, bfloat16, gradient checkpointing and GradCache: the weights; what is trained, with its
gradient and Adam's two moments, in float32; of a mini-batch, the input of every layer, and what one layer holds for
its backward pass; the vectors of the whole batch of all GPUs and their gradients; the scores of the largest budget.
Hours: two operations a weight and token of a forward pass, and the attention's. GradCache runs forward without a
gradient, then forward, again forward for the checkpoints, and backward (once: LoRA has almost no weights to
differentiate); the vision tower, which is frozen, runs forward twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from recipe import PRESETS, Preset

from metaembed.evaluation.tables import markdown_table

GPUS = {"H100": (989e12, 80), "A100": (312e12, 80)}  # dense bfloat16 operations a second; GB
R_Q, R_C, RANK, GB = 16, 64, 32, 1e9
ROWS = {"vidore": 118_195, "mmeb": 1_080_000}  # pairs; mmeb: 20 subsets of up to 50,000 and the pages, at most
TOKENS = {"vidore": (32, 768), "mmeb": (300, 400)}  # assumed, of a query and of a document
IMAGES = {"vidore": (0, 768), "mmeb": (256, 384)}  # those of them that are of images, assumed


@dataclass(frozen=True)
class Shape:
    """What a backbone's configuration says: of the language model; and its vision tower's weights, without embeddings.

    Args:
        layers: Number of layers.
        hidden: Width.
        wide: Width of the MLP.
        heads: Query heads, of 128 numbers each.
        kv_heads: Key and value heads.
        vocabulary: Rows of the input embedding.
        vision: Weights of the vision tower.
    """

    layers: int
    hidden: int
    wide: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision: float

    def maps(self) -> list[tuple[int, int]]:
        """Return the inputs and outputs of a layer's seven linear maps, which have LoRA."""
        heads, keys = 128 * self.heads, 128 * self.kv_heads
        attention = [(self.hidden, heads), (self.hidden, keys), (self.hidden, keys), (heads, self.hidden)]
        return [*attention, (self.hidden, self.wide), (self.hidden, self.wide), (self.wide, self.hidden)]

    def memory(self, preset: Preset, tokens: tuple[int, int], gpus: int) -> float:
        """Return the bytes on each GPU."""
        linear = self.layers * sum(a * b for a, b in self.maps())
        frozen = 2 * (linear + self.vocabulary * self.hidden + self.vision)
        trained = self.layers * sum(RANK * (a + b) for a, b in self.maps()) + (R_Q + R_C) * self.hidden
        positions = preset.mini_batch_size * (max(tokens) + R_C)
        kept = 2 * positions * self.layers * self.hidden
        # A layer's linear maps in bfloat16, twice for their gradients; LoRA's inputs after dropout in float32.
        layer = positions * sum(2 * 2 * b + 4 * a for a, b in self.maps())
        pairs = preset.batch_size * gpus
        vectors = 4 * 2 * self.hidden * (preset.batch_size * R_Q + (preset.batch_size + pairs) * R_C)
        scores = 4 * 2 * preset.batch_size * pairs * R_Q * R_C  # and their gradient, unless scored in parts
        return frozen + 16 * trained + kept + layer + vectors + scores

    def operations(self, tokens: tuple[int, int], images: tuple[int, int]) -> float:
        """Return the operations that training on one pair takes."""
        linear = self.layers * sum(a * b for a, b in self.maps())
        total = 0.0
        for count, pictured, meta in zip(tokens, images, (R_Q, R_C), strict=True):
            length = count + meta
            forward = 2 * linear * length + 4 * self.layers * 128 * self.heads * length**2
            total += 4 * forward + 2 * 2 * self.vision * 4 * pictured  # a token of an image is four patches
        return total


SHAPES = {
    "qwen2.5-vl-3b": Shape(36, 2048, 11008, 16, 2, 151936, 0.67e9),
    "qwen2.5-vl-7b": Shape(28, 3584, 18944, 28, 4, 152064, 0.68e9),
    "qwen3-vl-embedding-2b": Shape(28, 2048, 6144, 16, 8, 151936, 0.41e9),
    "qwen3-vl-embedding-8b": Shape(36, 4096, 12288, 32, 8, 151936, 0.58e9),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--utilization", type=float, default=0.35, help="share of the GPU's operations, assumed")
    arguments = parser.parse_args(argv)
    speed, size = GPUS[arguments.gpu]
    rows = []
    for recipe, pairs in ROWS.items():
        for name, shape in SHAPES.items():
            hours = pairs * shape.operations(TOKENS[recipe], IMAGES[recipe]) / (speed * arguments.utilization) / 3600
            for gpus in (1, 8):
                memory = shape.memory(PRESETS[name], TOKENS[recipe], gpus) / GB
                fits = f"{memory:.0f}" if memory < 0.9 * size else f"{memory:.0f} (too much)"
                rows.append([recipe, name, gpus, PRESETS[name].batch_size * gpus, fits, f"{hours / gpus:.1f}"])
    print(f"By calculation: one epoch on {arguments.gpu}, {arguments.utilization:.0%} of its operations used.\n")
    print(markdown_table(["recipe", "preset", "GPUs", "batch", "GB a GPU", "hours"], rows))


if __name__ == "__main__":
    main()
