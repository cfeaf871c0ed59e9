"""How much longer encoding takes than the bare backbone, what fewer Meta Tokens save, and how long the model waits.

    make benchmark-encode                                writes a section of docs/performance.md
    python benchmarks/encode.py --print                  prints only; [--hidden-size 256] [--layers 6] [--repeats 12]
    python benchmarks/encode.py --print --only waiting   one of overhead, saving, order, waiting

Uses a Qwen2.5-VL with random weights and its real processor, on the CPU. The variants of a row take turns, and each
reports its fastest run, because other work on the machine can only add time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from report import describe_load, describe_machine, write_report  # noqa: E402
from tiny_backbone import build_backbone, build_processor  # noqa: E402

from metaembed import MetaEmbedModel  # noqa: E402
from metaembed.encoding.batches import plan  # noqa: E402
from metaembed.evaluation.tables import markdown_table  # noqa: E402

WORDS = ["red", "apple", "green", "pear", "blue", "table", "two", "cats", "under", "one", "chair"]


def fastest(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the seconds that each variant took at its fastest, taking turns."""
    seconds = dict.fromkeys(variants, float("inf"))
    for turn in range(repeats + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if turn:  # the first turn warms up
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def sentence(generator: np.random.Generator, length: int) -> str:
    """Return a text of `length` words."""
    return " ".join(generator.choice(WORDS, length))


def main() -> None:
    """Measure, print and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["overhead", "saving", "order", "waiting"], help="measure only this")
    parser.add_argument("--print", action="store_true", help="do not write docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    processor = build_processor([" ".join(WORDS)])
    model = MetaEmbedModel.from_backbone(
        build_backbone(processor, arguments.hidden_size, arguments.layers), processor=processor
    )
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (160, 160, 3), dtype=np.uint8)) for _ in range(16)]
    inputs = {
        "texts of 16 words": [sentence(generator, 16) for _ in range(32)],
        "texts of 400 words": [sentence(generator, 400) for _ in range(16)],
        "pictures of 160 x 160": pictures,
    }
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    size_and_turns = arguments.batch_size, arguments.repeats
    measures: dict[str, Callable[[], list[str]]] = {
        "overhead": lambda: measure_overhead(model, inputs, *size_and_turns),
        "saving": lambda: measure_saving(model, inputs, *size_and_turns),
        "order": lambda: measure_order(model, generator, *size_and_turns),
        "waiting": lambda: measure_waiting(model, generator, *size_and_turns),
    }
    parts = [measure for name, measure in measures.items() if arguments.only in (None, name)]
    lines = [
        "## Encoding",
        "",
        f"{describe_machine()}.",
        f"Qwen2.5-VL with random weights, {size:.1f} million parameters, {arguments.threads} thread(s), batches of "
        f"{arguments.batch_size}, the fastest of {arguments.repeats} turns.",
        "",
        *(line for part in parts for line in [*part(), ""]),
        describe_load(),
    ]
    print("\n".join(lines))
    if not arguments.print and not arguments.only:
        write_report({"encode": "\n".join(lines)})


def measure_overhead(model: MetaEmbedModel, inputs: dict[str, list], batch_size: int, repeats: int) -> list[str]:
    """Measure the time of `encode_documents` and of the backbone alone, on the same batches of ids."""
    head = [
        "`encode_documents` with 64 Meta Tokens over the bare backbone's forward, given the same batches of the same",
        "tokens, and over the backbone's own processor and forward on the same inputs:",
        "",
    ]
    columns = [
        "inputs",
        "tokens",
        "forward",
        "processor and forward",
        "`encode_documents`",
        "over forward",
        "over both",
    ]
    rows = []
    for name, items in inputs.items():
        batches = [
            [items[i] for i in indices]
            for indices in plan(model.processor, model.processor.parse(items), model.policy, batch_size)
        ]
        features = [model.processor.process_documents(batch) for batch in batches]

        @torch.inference_mode()
        def forward(features=features):
            for each in features:
                model.backbone(**each, use_cache=False)

        @torch.inference_mode()
        def process_and_forward(batches=batches, features=features):
            """Run the backbone's own processor and forward, on prompts that give the same tokens."""
            for batch, expected in zip(batches, features, strict=True):
                prompts = prompts_of(model, batch)
                images = [[item] for item in batch] if isinstance(batch[0], Image.Image) else None
                each = model.processor.backbone_processor(
                    text=prompts, images=images, padding=True, padding_side="right", return_tensors="pt"
                )
                assert torch.equal(each["input_ids"], expected["input_ids"])
                model.backbone(**each, use_cache=False)

        def encode(items=items):
            model.encode_documents(items, batch_size=batch_size)

        seconds = fastest({"forward": forward, "bare": process_and_forward, "ours": encode}, repeats)
        tokens = sum(each["attention_mask"].sum().item() for each in features)
        times = [f"{seconds[each] * 1e3:,.0f} ms" for each in ("forward", "bare", "ours")]
        over = [f"{seconds['ours'] / seconds[each] - 1:+.1%}" for each in ("forward", "bare")]
        rows.append([name, f"{tokens:,}", *times, *over])
    return [*head, markdown_table(columns, rows)]


def prompts_of(model: MetaEmbedModel, batch: list) -> list[str]:
    """Return the prompts of a batch as a user of the bare backbone would write them, Meta Tokens included."""
    meta = "".join(f"<|meta_document_{i}|>" for i in range(model.config.num_document_tokens))
    template = model.processor.chat_template
    content = [[{"type": "text", "text": item}] if isinstance(item, str) else [{"type": "image"}] for item in batch]
    return [
        model.processor.backbone_processor.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, chat_template=template
        )
        + meta
        for parts in content
    ]


def measure_saving(model: MetaEmbedModel, inputs: dict[str, list], batch_size: int, repeats: int) -> list[str]:
    """Measure the time of encoding with fewer Meta Tokens."""
    counts = (64, 16, 4, 1)
    rows = []
    for name, items in inputs.items():
        seconds = fastest(
            {r: lambda r=r, items=items: model.encode_documents(items, r, batch_size=batch_size) for r in counts},
            repeats,
        )
        cells = [f"{seconds[r] * 1e3:,.0f} ms" for r in counts]
        rows.append([name, *cells, f"{seconds[64] / seconds[1]:.2f} times faster"])
    return [markdown_table(["`encode_documents`", *(f"num_meta={r}" for r in counts), "1 against 64"], rows)]


def measure_order(model: MetaEmbedModel, generator: np.random.Generator, batch_size: int, repeats: int) -> list[str]:
    """Measure padding and time of batches by estimated tokens, as `encode_documents` makes them, and of others."""

    def picture() -> Image.Image:
        height, width = generator.integers(32, 321, 2)
        return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))

    pictures = [picture() for _ in range(160)]
    inputs = {
        "160 pictures of 32 to 320 pixels a side": pictures,
        "the same, each with 0 to 100 words": [
            {"image": image, "text": sentence(generator, generator.integers(0, 101))} for image in pictures
        ],
    }
    rows = []
    for name, items in inputs.items():
        parsed = model.processor.parse(items)
        by_text = sorted(range(len(items)), key=lambda i: parsed[i].text_length, reverse=True)
        orders = {
            "by the length of the text": [by_text[i : i + batch_size] for i in range(0, len(items), batch_size)],
            "by estimated tokens": list(plan(model.processor, parsed, model.policy, batch_size)),
        }
        padding, embeddings = {}, {}

        def encode(batches: list[list[int]], items=items) -> torch.Tensor:
            out = torch.empty(len(items), model.config.num_document_tokens, model.config.hidden_size)
            for batch in batches:
                out[batch] = model.encode_documents([items[i] for i in batch], batch_size=batch_size)
            return out

        for order, batches in orders.items():
            masks = [model.processor.process_documents([items[i] for i in b])["attention_mask"] for b in batches]
            padding[order] = 1 - sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)
            embeddings[order] = encode(batches)
        first, second = embeddings.values()
        assert (first - second).abs().max() < 1e-4
        seconds = fastest({order: lambda b=batches: encode(b) for order, batches in orders.items()}, repeats)
        slowest = max(seconds.values())
        rows += [
            [name, order, f"{padding[order]:.1%}", f"{s * 1e3:,.0f} ms", f"{slowest / s:.2f} times"]
            for order, s in seconds.items()
        ]
    head = f"Inputs of mixed sizes in batches of {batch_size}; the embeddings of both orders are equal:"
    return [head, "", markdown_table(["inputs", "batches", "padding", "encoding", "faster"], rows)]


def measure_waiting(model: MetaEmbedModel, generator: np.random.Generator, batch_size: int, repeats: int) -> list[str]:
    """Measure the share of time in which the model waits for its next batch, with and without running ahead."""
    rows, turns = [], max(2, repeats // 4)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{i}.jpg") for i in range(64)]
        for file in files:
            height, width = (int(side) for side in generator.integers(300, 1601, 2))
            rough = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).save(file, quality=90)
        pixels = model.processor.image_processor.size
        for tokens in (64, 256):
            most = {"shortest_edge": 4 * 16 * 16, "longest_edge": tokens * 16 * 16}  # of a token of 16 x 16 pixels
            model.processor.image_processor.size = type(pixels)(**most)
            ways: dict[str, dict[str, Any]] = {
                "alternating (`workers=0`)": {"workers": 0, "batch_size": batch_size},
                "ahead": {"batch_size": batch_size},
                "ahead, `workers=2`": {"workers": 2, "batch_size": batch_size},
                "ahead, `batch_tokens`": {"batch_tokens": batch_size * (tokens + 80)},
            }
            clock = Clock(model)
            seconds, waits, embeddings = {}, {}, {}
            for _ in range(turns):
                for way, options in ways.items():
                    clock.computing, start = 0.0, time.perf_counter()
                    embeddings[way] = model.encode_documents(files, **options)
                    took = time.perf_counter() - start
                    if took < seconds.get(way, float("inf")):
                        seconds[way], waits[way] = took, 1 - clock.computing / took
            clock.stop()
            model.processor.image_processor.size = pixels
            first = embeddings["alternating (`workers=0`)"]
            assert all((found - first).abs().max() < 1e-4 for found in embeddings.values())
            slowest = seconds["alternating (`workers=0`)"]
            rows += [
                [f"{tokens}", way, f"{waits[way]:.1%}", f"{s * 1e3:,.0f} ms", f"{slowest / s:.2f} times"]
                for way, s in seconds.items()
            ]
    head = [
        "64 JPEG files of 300 to 1,600 pixels a side, each made into at most so many tokens by the processor, and",
        f"the share of the time in which the model waits for its next batch, in the fastest of {turns} turns.",
        "All ways give equal embeddings:",
    ]
    return [*head, "", markdown_table(["tokens", "reading and processing", "waiting", "encoding", "faster"], rows)]


class Clock:
    """Adds up the seconds that a model computes."""

    def __init__(self, model: MetaEmbedModel):
        self.computing = self.started = 0.0
        self.hooks = [model.register_forward_pre_hook(self.start), model.register_forward_hook(self.end)]

    def start(self, *_: Any) -> None:
        """Note when a forward pass begins."""
        self.started = time.perf_counter()

    def end(self, *_: Any) -> None:
        """Add the seconds since it began."""
        self.computing += time.perf_counter() - self.started

    def stop(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()


if __name__ == "__main__":
    main()
