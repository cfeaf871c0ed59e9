"""ViDoRe: train on the ColPali training set (118,195 pages with a query each), evaluate ViDoRe v1, v2 and v3.

    python examples/recipes/vidore.py --preset qwen2.5-vl-3b --output_dir outputs/vidore-3b             one GPU
    python examples/recipes/vidore.py --preset qwen2.5-vl-7b --output_dir outputs/vidore-7b --gpus 8    eight

Prepares, trains and evaluates; `--steps` runs some of it. See the README beside this file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import recipe
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset
from sentence_transformers import MultiVectorEncoder

from metaembed.evaluation.mteb import evaluate, public_tasks, table

TRAINING_SET = "vidore/colpali_train_set"
BENCHMARKS = ("ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)")
COLUMNS = Features({"query": Value("string"), "positive_image": Image()})


def prepare(data: DatasetDict, folder: Path, pixels: int) -> None:
    """Write each split as a file of `query` and `positive_image`, without rows that lack one; pages are shrunk.

    Args:
        data: Splits with the columns `query` and `image`; `image_filename` and others are not used.
        folder: Where `train.parquet`, `test.parquet`, ... go.
        pixels: Of a page at most.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in data.items():

        def pairs(rows: Dataset = rows) -> Iterator[dict[str, Any]]:
            for row in rows:
                if row["query"] and row["image"] is not None:
                    yield {"query": row["query"], "positive_image": recipe.shrink(row["image"], pixels)}

        shrunk = Dataset.from_generator(pairs, features=COLUMNS, cache_dir=str(folder.parent / "cache"))
        shrunk.to_parquet(folder / f"{split}.parquet")
        print(f"{len(shrunk)} of {len(rows)} rows of {split}")


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare, train and evaluate."""
    parser = recipe.parser(__doc__.splitlines()[0])
    parser.add_argument("--training_set", default=TRAINING_SET, help="Hub id, or a folder in the same format")
    parser.add_argument("--benchmarks", nargs="*", default=BENCHMARKS, help="of MTEB; their public tasks are run")
    arguments, more = parser.parse_known_args(argv)
    if "prepare" in arguments.steps:
        folder = arguments.output_dir / recipe.DATASET
        prepare(load_dataset(arguments.training_set), folder, recipe.pixels(arguments))
    if "train" in arguments.steps:
        recipe.run_training(arguments, ["--eval_split", "test", *more])
    if "evaluate" in arguments.steps:
        evaluate_final(arguments)


def evaluate_final(arguments: argparse.Namespace) -> None:
    """Evaluate the trained model on the benchmarks, at every budget. A task that fails does not stop the others."""
    final = str(arguments.output_dir / "final")
    dtype = torch.float32 if arguments.cpu else torch.bfloat16
    device = "cpu" if arguments.cpu else None
    encoder = MultiVectorEncoder(final, device=device, trust_remote_code=True, model_kwargs={"dtype": dtype})
    budgets = [tuple(budget) for budget in encoder[0].model.config.budgets]
    where = dict(output=arguments.output_dir / "mteb", batch_size=arguments.eval_batch_size)
    rows, failures = evaluate(encoder, public_tasks(arguments.benchmarks), budgets, final, **where)
    if rows:
        print(table(rows))
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
