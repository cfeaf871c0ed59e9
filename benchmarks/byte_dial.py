"""What vectors, dimensions and bits should share the bytes of a document, on the quickstart's embeddings.

python examples/quickstart.py            first, once: trains the model and embeds 2,000 scenes
python benchmarks/byte_dial.py           prints the tables; [--queries 400]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel

from metaembed.evaluation.tables import markdown_table
from metaembed.retrieval.fit_budget import BudgetSetting, FittedBudget, fit_budget

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from quickstart import TEST_SEED  # noqa: E402
from scenes import make_task  # noqa: E402

QUICKSTART = ROOT / "outputs/quickstart"


def best_of(fitted: FittedBudget, size: int, **wanted: object) -> BudgetSetting:
    """Return the best setting of at most `size` bytes whose attributes are as wanted."""
    fit = (s for s in fitted.tried if s.bytes_per_document <= size)
    fit = (s for s in fit if all(getattr(s, name) == value for name, value in wanted.items()))
    return max(fit, key=lambda s: s.quality)


def show(setting: BudgetSetting) -> str:
    """Return a setting as text."""
    return f"{setting.quality:.3f} ({setting.vectors} x {setting.dim} {setting.quantization})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if not (QUICKSTART / "documents.safetensors").exists():
        raise SystemExit(f"{QUICKSTART}/documents.safetensors is not there: run `make quickstart` first")
    torch.set_num_threads(arguments.threads)
    documents = load_file(QUICKSTART / "documents.safetensors")["documents"]
    scenes, wanted, texts = make_task(len(documents), TEST_SEED)
    count = arguments.queries
    model = AutoModel.from_pretrained(QUICKSTART / "model", trust_remote_code=True)
    queries = model.encode_queries(texts[:count])
    relevant = torch.tensor([[names <= scene.pictograms for scene in scenes] for names in wanted[:count]])
    for title, options in (
        ("Recall@10 of the exact search in float32 with all vectors", {}),
        ("nDCG@10 on the task", {"relevant": relevant}),
    ):
        started = time.perf_counter()
        fitted = fit_budget(documents, queries, **options)
        rows = []
        for size, best in fitted.curve.items():
            full = {"dim": documents.shape[2]}
            all_int8 = {**full, "quantization": "int8"}
            rows.append(
                [f"{size:,}", f"{show(best)}, r_q = {best.query_vectors}"]
                + [
                    show(best_of(fitted, size, **only))
                    for only in (full, all_int8, {**full, "quantization": "float32"})
                ]
            )
        vectors, dim = documents.shape[1:]
        head = [
            "bytes",
            "chosen",
            f"best of {dim} dimensions",
            f"int8, {dim} dimensions",
            f"float32, {dim} dimensions",
        ]
        print(f"\n{title}: {len(documents):,} documents of {vectors} vectors of {dim} dimensions, {count} queries.")
        print(f"{len(fitted.tried)} settings in {time.perf_counter() - started:.0f} s, one thread.\n")
        print(markdown_table(head, rows))
        dims = sorted({setting.dim for setting in fitted.tried})
        rows = [
            [f"{size:,}", *(show(best_of(fitted, size, dim=dim, quantization="int8")) for dim in dims)]
            for size in fitted.curve
        ]
        print("\nMore vectors of fewer dimensions, all in int8:\n")
        print(markdown_table(["bytes", *(f"{dim} dimensions" for dim in dims)], rows))


if __name__ == "__main__":
    main()
