"""MMEB: train on the 20 subsets of MMEB-train and the ColPali pages, evaluate the 36 of MMEB-eval.

    python examples/recipes/mmeb.py --preset qwen2.5-vl-7b --output_dir outputs/mmeb-7b --gpus 8
        --train_images MMEB-train --eval_images MMEB-eval

`--train_images` and `--eval_images` are the folders in which the images of the two are unpacked, and that the paths in
their rows are relative to. Prepares, trains and evaluates; `--steps` runs some of it. See the README beside this file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import recipe
import torch
from datasets import Dataset, load_dataset

from metaembed import MetaEmbedModel
from metaembed.evaluation.mmeb import GROUPS, evaluate, table

SUBSETS = [
    *("ImageNet_1K", "N24News", "HatefulMemes", "VOC2007", "SUN397", "OK-VQA", "A-OKVQA", "DocVQA"),
    *("InfographicsVQA", "ChartQA", "Visual7W", "VisDial", "CIRR", "VisualNews_t2i", "VisualNews_i2t"),
    *("MSCOCO_t2i", "MSCOCO_i2t", "NIGHTS", "WebQA", "MSCOCO"),
]
COLUMNS = ("query", "query_image", "positive", "positive_image")


def side(text: str | None, path: str | None, images: Path, name: str) -> dict[str, Any]:
    """Return the columns of one side of a row: text without the image's placeholder, and the path of the image."""
    text = re.sub(r"<\|image_\d+\|>\s*", "", text or "").strip() or None
    return {name: text, f"{name}_image": str((images / path).resolve()) if path else None}


def subset_pairs(arguments: argparse.Namespace, subset: str) -> Iterator[dict[str, Any]]:
    """Return so many rows of a subset of MMEB-train as rows of `examples/train.py`."""
    rows = load_dataset(arguments.training_set, subset, split="original")
    for row in rows.shuffle(seed=0).select(range(min(arguments.rows, len(rows)))):
        query = side(row["qry"], row["qry_image_path"], arguments.train_images, "query")
        yield query | side(row["pos_text"], row["pos_image_path"], arguments.train_images, "positive")


def page_pairs(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Save pages of the ColPali training set as files, and return their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(load_dataset(arguments.pages, split="train", streaming=True)):
        if number == arguments.page_rows:
            break
        if row["query"] and row["image"] is not None:
            recipe.shrink(row["image"], recipe.pixels(arguments)).save(folder / f"{number}.jpg", quality=92)
            yield side(row["query"], None, folder, "query") | side(None, f"{number}.jpg", folder, "positive")


def prepare(arguments: argparse.Namespace) -> None:
    """Write `pairs.parquet`: rows of each subset, and pages. A row that lacks a side is left out."""
    folder = arguments.output_dir / recipe.DATASET
    folder.mkdir(parents=True, exist_ok=True)
    sources = {subset: subset_pairs(arguments, subset) for subset in arguments.subsets}
    if arguments.page_rows:
        sources["pages"] = page_pairs(arguments, folder / "pages")
    schema = pyarrow.schema([(name, pyarrow.string()) for name in COLUMNS])
    with pyarrow.parquet.ParquetWriter(folder / "pairs.parquet", schema) as file:
        for name, rows in sources.items():
            kept = [row for row in rows if all(row[key] or row[f"{key}_image"] for key in ("query", "positive"))]
            file.write_table(pyarrow.Table.from_pylist(kept, schema))
            print(f"{len(kept)} rows of {name}")


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare, train and evaluate."""
    parser = recipe.parser(__doc__.splitlines()[0])
    parser.add_argument("--training_set", default="TIGER-Lab/MMEB-train", help="Hub id, or a folder like it")
    parser.add_argument("--train_images", type=Path, default=Path(), help="folder of its images")
    parser.add_argument("--subsets", nargs="+", default=SUBSETS, help="of the training set")
    parser.add_argument("--rows", type=int, default=50_000, help="of a subset at most")
    parser.add_argument("--pages", default="vidore/colpali_train_set", help="Hub id, or a folder like it")
    parser.add_argument("--page_rows", type=int, default=120_000, help="of the pages at most; 0: none")
    parser.add_argument("--evaluation_set", default="TIGER-Lab/MMEB-eval", help="Hub id, or a folder like it")
    parser.add_argument("--eval_images", type=Path, default=Path(), help="folder of its images")
    parser.add_argument("--eval_subsets", nargs="+", default=[name for names in GROUPS.values() for name in names])
    arguments, more = parser.parse_known_args(argv)
    if "prepare" in arguments.steps:
        prepare(arguments)
    if "train" in arguments.steps:
        recipe.run_training(arguments, ["--eval_size", "500", *more])
    if "evaluate" in arguments.steps:
        evaluate_final(arguments)


def evaluate_final(arguments: argparse.Namespace) -> None:
    """Evaluate the trained model at every budget. A subset that fails does not stop the others."""
    dtype, device = (torch.float32, "cpu") if arguments.cpu else (torch.bfloat16, "cuda")
    model = MetaEmbedModel.from_pretrained(arguments.output_dir / "final", dtype=dtype).to(device).eval()

    def load(subset: str) -> Dataset:
        return load_dataset(arguments.evaluation_set, subset, split="test")

    where = arguments.eval_images, arguments.output_dir / "mmeb"
    results, failures = evaluate(model, load, arguments.eval_subsets, *where, True, arguments.eval_batch_size)
    if results:
        print(table(results))
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
