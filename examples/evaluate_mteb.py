"""Evaluate a model on MTEB's retrieval tasks, at every budget or at chosen ones.

    python examples/evaluate_mteb.py you/your-metaembed                              ViDoRe v1, v2 and v3
    python examples/evaluate_mteb.py you/your-metaembed --tasks NFCorpus SciFact     any task of MTEB by name
    python examples/evaluate_mteb.py you/your-metaembed --budgets 1,1 16,64
    python examples/evaluate_mteb.py saved --write-results saved                     for the pages of the Hub

Results are kept by MTEB in `outputs/mteb`, of each budget and each commit of the model apart: what is there is not run
again. Of a model in a folder, which may have changed, everything is run again. Of a benchmark, the tasks are run whose
data are public (ViDoRe v3 has two others). Where a task fails, the others are still run and printed, and the exit code
is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mteb
from sentence_transformers import MultiVectorEncoder

from metaembed.cards.card import write_eval_results
from metaembed.evaluation.mteb import BudgetModel

BENCHMARKS = ("ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument(
        "--benchmarks", nargs="*", default=BENCHMARKS, help="of MTEB, of which the public tasks are run"
    )
    parser.add_argument("--tasks", nargs="*", help="MTEB's names of tasks, instead of benchmarks")
    parser.add_argument("--budgets", nargs="*", help='such as "1,1" "16,64"; default: those of the model')
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", default="outputs/mteb", help="where MTEB keeps its results")
    parser.add_argument("--write-results", type=Path, help="folder of the saved model, to write the Hub's files into")
    return parser.parse_args()


def find_tasks(benchmarks: list[str]) -> list:
    """Return the tasks of benchmarks whose data everybody can load, and say which are left out."""
    tasks = [task for name in benchmarks for task in mteb.get_benchmark(name).tasks]
    if private := [task.metadata.name for task in tasks if not task.metadata.is_public]:
        print(f"left out, since their data are not public: {', '.join(private)}", file=sys.stderr)
    return [task for task in tasks if task.metadata.is_public]


def evaluate(
    encoder: MultiVectorEncoder,
    tasks: list,
    budgets: list[tuple[int, int]],
    name: str,
    revision: str = "local",
    output: str = "outputs/mteb",
    batch_size: int = 8,
) -> tuple[list[tuple[str, tuple[int, int], float]], list[str]]:
    """Run `tasks` at each of `budgets`.

    Returns:
        Task, budget and main score, of each; and what failed, and why.
    """
    rows, failures = [], []
    for budget in budgets:
        results = mteb.evaluate(
            BudgetModel(encoder, budget, name, revision),
            tasks,
            cache=mteb.ResultCache(output),
            overwrite_strategy="always" if revision == "local" else "only-missing",
            encode_kwargs={"batch_size": batch_size},
            co2_tracker=False,
            raise_error=False,  # it would lose the other tasks' results
        )
        rows += [(result.task_name, budget, float(result.get_score())) for result in results]
        failures += [f"{error.task_name} at {budget}: {error.exception}" for error in results.exceptions or ()]
    return rows, failures


def table(rows: list[tuple[str, tuple[int, int], float]]) -> str:
    """Return a Markdown table: a line a task, a column a budget, and the mean of what ran at every budget."""
    budgets = list(dict.fromkeys(budget for _, budget, _ in rows))
    scores = {(task, budget): score for task, budget, score in rows}
    names = list(dict.fromkeys(task for task, _, _ in rows))
    lines = ["| task | " + " | ".join(f"({q}, {d})" for q, d in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    for name in names:
        cells = [f"{scores[name, b]:.4f}" if (name, b) in scores else "failed" for b in budgets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    whole = [name for name in names if all((name, budget) in scores for budget in budgets)]
    means = [sum(scores[name, budget] for name in whole) / len(whole) for budget in budgets] if whole else []
    return "\n".join([*lines, "| mean | " + " | ".join(f"{mean:.4f}" for mean in means) + " |"] if whole else lines)


def write_results(folder: Path, tasks: list, rows: list[tuple[str, tuple[int, int], float]]) -> list[Path]:
    """Write the Hub's `.eval_results` files of what was measured, one a task and budget, into a saved model."""
    files = []
    for task in tasks:
        about = task.metadata
        quality = {budget: {about.main_score: score} for name, budget, score in rows if name == about.name}
        notes = f"measured by MTEB {mteb.__version__}"
        files += write_eval_results(folder, about.dataset["path"], about.name, quality, about.main_score, notes)
    return files


def main() -> None:
    """Evaluate what the command line names."""
    arguments = parse_arguments()
    if arguments.write_results and not (arguments.write_results / "config.json").is_file():
        raise ValueError(f"--write-results must be the folder of a saved model, got {arguments.write_results}.")
    encoder = MultiVectorEncoder(arguments.model, revision=arguments.revision, trust_remote_code=True)
    tasks = list(mteb.get_tasks(tasks=arguments.tasks)) if arguments.tasks else find_tasks(arguments.benchmarks)
    if arguments.budgets:
        budgets = [tuple(map(int, pair.split(","))) for pair in arguments.budgets]
    else:
        budgets = [tuple(budget) for budget in encoder[0].model.config.budgets]
    revision = encoder[0].model.commit or "local"
    where = (arguments.model, revision, arguments.output, arguments.batch_size)
    rows, failures = evaluate(encoder, tasks, budgets, *where)
    if rows:
        print(table(rows))
    if arguments.write_results:
        write_results(arguments.write_results, tasks, rows)
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
