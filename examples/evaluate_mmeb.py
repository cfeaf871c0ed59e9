"""Evaluate a model on MMEB (36 data sets of image and text, candidates given, precision@1) at every budget.

    python examples/evaluate_mmeb.py you/your-metaembed --image-dir MMEB/images
    python examples/evaluate_mmeb.py you/your-metaembed --image-dir MMEB/images --subsets DocVQA CIRR
    python examples/evaluate_mmeb.py saved --image-dir MMEB/images --write-results saved     for the pages of the Hub

Reads the format of https://huggingface.co/datasets/TIGER-Lab/MMEB-eval, whose images are a separate download
(`images.zip`). Every query and every candidate is encoded once, for all budgets. If a subset fails, the others are
still evaluated and printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from datasets import load_dataset

from metaembed import MetaEmbedModel
from metaembed.cards.card import write_eval_results
from metaembed.evaluation.mmeb import GROUPS, evaluate, table


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model")
    parser.add_argument(
        "--dataset", default="TIGER-Lab/MMEB-eval", help="Hub id, or a folder with one folder per subset"
    )
    parser.add_argument("--image-dir", type=Path, required=True, help="folder that the image paths are relative to")
    parser.add_argument("--subsets", nargs="*", default=[name for names in GROUPS.values() for name in names])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("outputs/mmeb"), help="where results are kept")
    parser.add_argument("--write-results", type=Path, help="folder of the saved model, to write the Hub's files into")
    return parser.parse_args()


def main() -> None:
    """Evaluate what the command line names."""
    arguments = parse_arguments()
    if target := arguments.write_results:
        if not (target / "config.json").is_file():
            raise ValueError(f"--write-results must be the folder of a saved model, got {target}.")
        if Path(arguments.dataset).exists():
            raise ValueError("--write-results names the data set by its Hub id: --dataset must be one, not a folder.")
    model = MetaEmbedModel.from_pretrained(arguments.model, revision=arguments.revision)
    if torch.cuda.is_available():
        model.cuda()
    name = f"{arguments.model.strip('/').replace('/', '__')}__{(model.commit or 'local')[:12]}"
    results, failures = evaluate(
        model,
        lambda subset: load_dataset(arguments.dataset, subset, split="test"),
        arguments.subsets,
        arguments.image_dir,
        arguments.output / name,
        overwrite=model.commit is None,  # a folder may have changed
        batch_size=arguments.batch_size,
    )
    if results:
        print(table(results))
    for subset, values in results.items() if target else ():
        quality = {budget: {"precision@1": value} for budget, value in values.items()}
        write_eval_results(target, arguments.dataset, subset, quality, "precision@1")
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
