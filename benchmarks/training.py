"""How much longer a training step takes with five budgets than with one.

    make benchmark-training                              writes a section of docs/performance.md
    python benchmarks/training.py --print                prints only

Alternates the same step (forward, backward, optimizer) with the loss at (16, 64) only and at all five budgets, so that
other work on the machine slows both. Reports the medians, also of the loss alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import describe_load, describe_machine, write_report

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from tiny_backbone import build_backbone, build_processor

from metaembed import MetaEmbedModel
from metaembed.evaluation.tables import markdown_table
from metaembed.sentence_metaembed import to_multi_vector_encoder
from metaembed.training.losses import CachedMMRLoss, MMRLoss


def timed(work) -> float:
    """Return the seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=48, help="side of the pictures in pixels")
    parser.add_argument("--mini-batch-size", type=int, help="GradCache; default: the plain loss")
    parser.add_argument("--print", action="store_true", help="do not write docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    words = ["cat", "red", "apple", "boat"]
    processor = build_processor([" ".join(words)])
    backbone = build_backbone(processor, hidden_size=arguments.hidden_size, layers=arguments.layers)
    encoder = to_multi_vector_encoder(MetaEmbedModel.from_backbone(backbone, processor=processor), device="cpu")
    rng = np.random.default_rng(0)
    size = (arguments.batch_size, arguments.side, arguments.side, 3)
    pictures = [Image.fromarray(array) for array in rng.integers(0, 256, size, dtype=np.uint8)]
    queries = [" ".join(rng.choice(words, 5)) for _ in pictures]
    batch = [encoder.preprocess(queries, task="query"), encoder.preprocess(pictures, task="document")]
    optimizer = torch.optim.AdamW(encoder.train().parameters(), lr=1e-5)

    def make(budgets):
        if arguments.mini_batch_size:
            return CachedMMRLoss(encoder, budgets=budgets, mini_batch_size=arguments.mini_batch_size)
        return MMRLoss(encoder, budgets=budgets)

    def step(loss):
        torch.stack(list(loss([dict(column) for column in batch]).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    generator = torch.Generator().manual_seed(0)
    vectors = [
        torch.nn.functional.normalize(
            torch.randn(arguments.batch_size, r, arguments.hidden_size, generator=generator), dim=-1
        ).requires_grad_()
        for r in (16, 64)
    ]

    def score(loss):
        torch.stack(list(loss.losses(*vectors, torch.arange(arguments.batch_size)).values())).sum().backward()

    losses = {"(16, 64) only": make([(16, 64)]), "five budgets": make(None)}
    seconds = {(name, what): [] for name in losses for what in ("step", "loss alone")}
    for _ in range(arguments.steps + 2):
        for name, loss in losses.items():
            seconds[name, "step"].append(timed(lambda loss=loss: step(loss)))
            seconds[name, "loss alone"].append(timed(lambda loss=loss: score(loss)))
    median = {key: 1000 * statistics.median(values[2:]) for key, values in seconds.items()}
    kind = (
        f"GradCache, {arguments.mini_batch_size} inputs at a time," if arguments.mini_batch_size else "the plain loss"
    )
    lines = [
        "## Training",
        "",
        f"{describe_machine()}.",
        f"A training step of a Qwen2.5-VL with random weights, hidden size {arguments.hidden_size} and "
        f"{arguments.layers} layers, on one thread, with {arguments.batch_size} queries and pictures of "
        f"{arguments.side} x {arguments.side} and {kind}: medians of {arguments.steps} steps each.",
        "",
    ]
    rows = []
    for what in ("step", "loss alone"):
        one, five = (median[name, what] for name in losses)
        rows.append([what, f"{one:.2f} ms", f"{five:.2f} ms", f"{five / one - 1:+.1%}"])
    lines += [markdown_table(["", *losses, "five over one"], rows), "", describe_load()]
    print("\n".join(lines))
    if not arguments.print:
        write_report({"training": "\n".join(lines)})


if __name__ == "__main__":
    main()
