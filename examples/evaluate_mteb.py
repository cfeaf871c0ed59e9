"""Evaluate a model on MTEB's retrieval tasks, at every budget or at chosen ones.

    python examples/evaluate_mteb.py you/your-metaembed                              ViDoRe v1, v2 and v3
    python examples/evaluate_mteb.py you/your-metaembed --tasks NFCorpus SciFact     any task of MTEB by name
    python examples/evaluate_mteb.py you/your-metaembed --budgets 1,1 16,64
    python examples/evaluate_mteb.py saved --write-results saved                     for the pages of the Hub

MTEB caches the results in `outputs/mteb`, separately for each budget and each commit of the model, and does not repeat
them. A model in a folder may have changed, so all its tasks are run again. Only tasks with public data are run (two of
ViDoRe v3 have none). If a task fails, the others are still run and printed, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mteb
from sentence_transformers import MultiVectorEncoder

from metaembed.cards.card import write_eval_results
from metaembed.evaluation.mteb import evaluate, public_tasks, table

BENCHMARKS = ("ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--benchmarks", nargs="*", default=BENCHMARKS, help="of MTEB; their public tasks are run")
    parser.add_argument("--tasks", nargs="*", help="MTEB's names of tasks, instead of benchmarks")
    parser.add_argument("--budgets", nargs="*", help='such as "1,1" "16,64"; default: those of the model')
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", default="outputs/mteb", help="where MTEB keeps its results")
    parser.add_argument("--write-results", type=Path, help="folder of the saved model, to write the Hub's files into")
    return parser.parse_args()


def main() -> None:
    """Evaluate what the command line names."""
    arguments = parse_arguments()
    target = arguments.write_results
    if target and not (target / "config.json").is_file():
        raise ValueError(f"--write-results must be the folder of a saved model, got {target}.")
    encoder = MultiVectorEncoder(arguments.model, revision=arguments.revision, trust_remote_code=True)
    model = encoder[0].model
    tasks = list(mteb.get_tasks(tasks=arguments.tasks)) if arguments.tasks else public_tasks(arguments.benchmarks)
    pairs = [pair.split(",") for pair in arguments.budgets] if arguments.budgets else model.config.budgets
    budgets = [(int(r_q), int(r_c)) for r_q, r_c in pairs]
    where = (arguments.model, model.commit or "local", arguments.output, arguments.batch_size)
    rows, failures = evaluate(encoder, tasks, budgets, *where)
    if rows:
        print(table(rows))
    for about in (task.metadata for task in tasks if target):
        quality = {budget: {about.main_score: score} for name, budget, score in rows if name == about.name}
        notes = f"measured by MTEB {mteb.__version__}"
        write_eval_results(target, about.dataset["path"], about.name, quality, about.main_score, notes)
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
