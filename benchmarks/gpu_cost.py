"""Print the memory and the time of encoding and training on GPUs, by calculation: nothing here was measured.

    python benchmarks/gpu_cost.py                        the tables of docs/gpu.md

Pages of 1,024 tokens with 64 Meta Tokens. Bytes a weight: 2 in bfloat16; for the linear layers of the language model 1
in 8-bit (fp8 or int8), and 0.56 in 4-bit (with scales). Encoding adds what one layer holds of a batch. LoRA: as in
examples/recipes/cost.py, 128 pairs, 8 at a time. Full: the weights, gradients and Adam's two moments in float32 and a
copy of the weights in bfloat16, 18 bytes a weight, divided over the GPUs by FSDP; and what LoRA keeps of a mini-batch.
Operations: two a weight and token, and the attention's. LoRA takes four times those of encoding, full training five.
The share of a GPU's operations that is used is assumed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples" / "recipes"))

from cost import GB, R_C, SHAPES, Shape  # noqa: E402
from recipe import PRESETS  # noqa: E402

from metaembed.evaluation.tables import markdown_table  # noqa: E402

MODELS = {
    "3B": SHAPES["qwen2.5-vl-3b"],
    "7B": SHAPES["qwen2.5-vl-7b"],
    "32B": Shape(64, 5120, 27648, 40, 8, 152064, 0.69e9),
}
# Dense bfloat16 operations a second, and GB, as their makers state them.
CARDS = {
    "RTX 4090": (165e12, 24),
    "L40S": (362e12, 48),
    "A100 40 GB": (312e12, 40),
    "A100 80 GB": (312e12, 80),
    "H100": (989e12, 80),
    "H200": (989e12, 141),
}
TOKENS, BATCH, USABLE = 1024, 8, 0.9
PRESET = replace(PRESETS["qwen2.5-vl-3b"], batch_size=128, mini_batch_size=8)
FORMATS = {"bfloat16": 2.0, "8-bit": 1.0, "4-bit": 0.56}


def linear(shape: Shape) -> int:
    """Return the weights of the language model's linear layers."""
    return shape.layers * sum(a * b for a, b in shape.maps())


def others(shape: Shape) -> float:
    """Return the weights of the embedding and the vision tower."""
    return shape.vocabulary * shape.hidden + shape.vision


def encoding(shape: Shape, bytes_a_weight: float) -> float:
    """Return the bytes that encoding a batch of pages takes."""
    layer = 2 * BATCH * (TOKENS + R_C) * (2 * shape.hidden + 3 * shape.wide)
    return bytes_a_weight * linear(shape) + 2 * others(shape) + layer


def lora(shape: Shape) -> float:
    """Return the bytes that training with LoRA takes on one GPU."""
    return shape.memory(PRESET, (32, TOKENS), 1)


def full(shape: Shape, gpus: int) -> float:
    """Return the bytes on each of so many GPUs that training all weights takes."""
    weights = linear(shape) + others(shape)
    return 18 * weights / gpus + lora(shape) - 2 * weights


def forward(shape: Shape) -> float:
    """Return the operations of encoding a page."""
    length = TOKENS + R_C
    own = 2 * linear(shape) * length + 4 * shape.layers * 128 * shape.heads * length**2
    return own + 2 * shape.vision * 4 * TOKENS  # a token of an image is four patches


def what_fits(shape: Shape, memory: float) -> list[str]:
    """Return, for a card of so many GB, in what format encoding fits, and how training does."""
    usable = memory * GB * USABLE
    formats = [name for name, size in FORMATS.items() if encoding(shape, size) < usable]
    trains = "LoRA" if lora(shape) < usable else "LoRA on a 4-bit backbone"
    small = lora(shape) - (2 - FORMATS["4-bit"]) * linear(shape)
    if lora(shape) >= usable and small >= usable:
        trains = "LoRA, sharded"
    gpus = next((n for n in (1, 2, 4, 8, 16, 32) if full(shape, n) < usable), None)
    return [formats[0] if formats else "several GPUs", trains, str(gpus) if gpus else "more than 32"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utilization", type=float, default=0.35, help="share of the GPU's operations, assumed")
    share = parser.parse_args(argv).utilization
    rows = []
    for name, shape in MODELS.items():
        sizes = [encoding(shape, size) for size in FORMATS.values()]
        sizes += [lora(shape), full(shape, 1), full(shape, 8)]
        rows.append([name, f"{(linear(shape) + others(shape)) / GB:.1f}", *(f"{size / GB:.0f}" for size in sizes)])
    head = ["model", "billion weights", *(f"encode, {each}" for each in FORMATS)]
    print("GB on a GPU, by calculation:\n")
    print(markdown_table([*head, "LoRA", "full, 1 GPU", "full, each of 8 GPUs"], rows))
    rows = []
    for card, (speed, _) in CARDS.items():
        cells = []
        for shape in MODELS.values():
            one = forward(shape) / (speed * share)
            cells += [f"{1 / one:.1f}", f"{1 / (4 * one):.2f}", f"{1 / (5 * one):.2f}"]
        rows.append([card, *cells])
    head = ["card", *(f"{name}, {what}" for name in MODELS for what in ("encode", "LoRA", "full"))]
    print(f"\nPages a second on one GPU, by calculation, {share:.0%} of its operations used:\n")
    print(markdown_table(head, rows))
    rows = []
    for card, (_, memory) in CARDS.items():
        for name, shape in MODELS.items():
            rows.append([card, name, *what_fits(shape, memory)])
    print("\nWhat to set, by calculation:\n")
    print(markdown_table(["card", "model", "encode in", "train on one", "GPUs for full training"], rows))


if __name__ == "__main__":
    main()
