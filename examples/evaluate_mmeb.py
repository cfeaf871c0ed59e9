"""Evaluate a model on MMEB (36 data sets of image and text, candidates given, precision@1) at every budget.

    python examples/evaluate_mmeb.py you/your-metaembed --image-dir MMEB/images
    python examples/evaluate_mmeb.py you/your-metaembed --image-dir MMEB/images --subsets DocVQA CIRR
    python examples/evaluate_mmeb.py saved --image-dir MMEB/images --write-results saved     for the pages of the Hub

Reads the format of https://huggingface.co/datasets/TIGER-Lab/MMEB-eval, whose images are a separate download
(`images.zip`): a row holds `qry_text`, `qry_img_path`, and the lists `tgt_text` and `tgt_img_path` of its candidates,
the right one first. Every query and every candidate is encoded once, for all budgets. Where a subset fails, the others
are still run and printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

from metaembed import MetaEmbedModel, maxsim
from metaembed.cards.card import write_eval_results

GROUPS = {
    "classification": [
        *("ImageNet-1K", "N24News", "HatefulMemes", "VOC2007", "SUN397"),
        *("Place365", "ImageNet-A", "ImageNet-R", "ObjectNet", "Country211"),
    ],
    "question answering": [
        *("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA"),
        *("Visual7W", "ScienceQA", "VizWiz", "GQA", "TextVQA"),
    ],
    "retrieval": [
        *("VisDial", "CIRR", "VisualNews_t2i", "VisualNews_i2t", "MSCOCO_t2i", "MSCOCO_i2t"),
        *("NIGHTS", "WebQA", "FashionIQ", "Wiki-SS-NQ", "OVEN", "EDIS"),
    ],
    "grounding": ["MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"],
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model")
    parser.add_argument("--dataset", default="TIGER-Lab/MMEB-eval", help="Hub id, or a folder with a folder a subset")
    parser.add_argument("--image-dir", type=Path, required=True, help="what the image paths are relative to")
    parser.add_argument("--subsets", nargs="*", default=[name for names in GROUPS.values() for name in names])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/mmeb"), help="a JSON file a subset; not run again"
    )
    parser.add_argument("--write-results", type=Path, help="folder of the saved model, to write the Hub's files into")
    return parser.parse_args()


def as_input(text: str, image_path: str, image_dir: Path) -> Any:
    """Turn a text and an image path, either of which may be empty, into an input of the model."""
    text = re.sub(r"<\|image_\d+\|>\s*", "", text).strip()  # marks where the image goes, in the data set's own words
    if not image_path:
        return text
    image = image_dir / image_path
    return {"text": text, "image": image} if text else image


def encode(encoder, inputs: Iterable[tuple[str, str]], image_dir: Path, batch_size: int) -> tuple[dict, torch.Tensor]:
    """Encode each different input once.

    Returns:
        Rows by input, and vectors [N, R, D].
    """
    rows = {key: row for row, key in enumerate(dict.fromkeys(inputs))}
    return rows, encoder([as_input(*key, image_dir) for key in rows], batch_size=batch_size)


def precision_at_1(model: MetaEmbedModel, rows: Iterable[dict], image_dir: Path, batch_size: int) -> dict[str, float]:
    """Measure how often the right candidate scores higher than every other one.

    Args:
        model: The model.
        rows: Of the data set.
        image_dir: What the image paths are relative to.
        batch_size: Inputs encoded at a time.

    Returns:
        Precision@1 by budget.
    """
    rows = [
        {
            "query": (row["qry_text"], row["qry_img_path"]),
            "candidates": list(zip(row["tgt_text"], row["tgt_img_path"], strict=True)),
        }
        for row in rows
    ]
    query_rows, queries = encode(model.encode_queries, (row["query"] for row in rows), image_dir, batch_size)
    every = (candidate for row in rows for candidate in row["candidates"])
    document_rows, documents = encode(model.encode_documents, every, image_dir, batch_size)
    hits = dict.fromkeys(map(tuple, model.config.budgets), 0)
    for row in rows:
        right, *others = dict.fromkeys(row["candidates"])  # some list a candidate twice
        query = queries[query_rows[row["query"]]][None]  # [1, R_q, D]
        candidates = documents[[document_rows[key] for key in (right, *others)]]  # [candidates, R_c, D]
        for budget in hits:
            scores = maxsim(query, candidates, budget=budget)[0]  # [candidates]
            hits[budget] += bool((scores[0] > scores[1:]).all())
    return {f"{r_q},{r_c}": count / len(rows) for (r_q, r_c), count in hits.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table: a line a subset, and the means of the groups that are complete, and of all."""
    budgets = list(next(iter(results.values())))
    lines = ["| subset | " + " | ".join(f"({b})" for b in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    groups = {name: names for name, names in GROUPS.items() if set(names) <= set(results)}
    for title, names in [*((name, [name]) for name in results), *groups.items(), ("mean", list(results))]:
        means = [sum(results[name][budget] for name in names) / len(names) for budget in budgets]
        lines.append(f"| {title} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |")
    return "\n".join(lines)


def write_results(folder: Path, dataset: str, results: dict[str, dict[str, float]]) -> list[Path]:
    """Write the Hub's `.eval_results` files of what was measured, one a subset and budget, into a saved model."""
    files = []
    for subset, values in results.items():
        quality = {tuple(map(int, budget.split(","))): {"precision@1": value} for budget, value in values.items()}
        files += write_eval_results(folder, dataset, subset, quality, "precision@1")
    return files


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
    commit = model.commit or "local"
    folder = arguments.output / f"{arguments.model.strip('/').replace('/', '__')}__{commit[:12]}"
    results, failures = {}, []
    for subset in arguments.subsets:
        path = folder / f"{subset}.json"
        if path.is_file() and commit != "local":  # a folder may have changed
            results[subset] = json.loads(path.read_text(encoding="utf-8"))
            continue
        try:
            rows = load_dataset(arguments.dataset, subset, split="test")
            results[subset] = precision_at_1(model, rows, arguments.image_dir, arguments.batch_size)
        except Exception as error:  # it would lose the other subsets' results
            traceback.print_exc()
            failures.append(f"{subset}: {error}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results[subset], indent=2) + "\n", encoding="utf-8")
    if results:
        print(table(results))
    if target:
        write_results(target, arguments.dataset, results)
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
