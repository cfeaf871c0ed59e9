"""Evaluate a model on MTEB's retrieval tasks, at every budget or at chosen ones.

    python examples/evaluate_mteb.py you/your-metaembed                              ViDoRe v1, v2 and v3
    python examples/evaluate_mteb.py you/your-metaembed --tasks NFCorpus SciFact     any task of MTEB by name
    python examples/evaluate_mteb.py you/your-metaembed --budgets 1,1 16,64

Results are kept by MTEB in `outputs/mteb`, of each budget and each commit of the model apart: what is there is not run
again. Of a model in a folder, which may have changed, everything is run again.
"""

from __future__ import annotations

import argparse

import mteb
from sentence_transformers import MultiVectorEncoder

from metaembed.mteb_metaembed import BudgetModel

BENCHMARKS = ("ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--benchmarks", nargs="*", default=BENCHMARKS, help="MTEB's names of benchmarks")
    parser.add_argument("--tasks", nargs="*", help="MTEB's names of tasks, instead of benchmarks")
    parser.add_argument("--budgets", nargs="*", help='such as "1,1" "16,64"; default: those of the model')
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", default="outputs/mteb", help="where MTEB keeps its results")
    return parser.parse_args()


def evaluate(
    encoder: MultiVectorEncoder,
    tasks: list,
    budgets: list[tuple[int, int]],
    name: str,
    revision: str = "local",
    output: str = "outputs/mteb",
    batch_size: int = 8,
) -> list[tuple[str, tuple[int, int], float]]:
    """Run `tasks` at each of `budgets`.

    Returns:
        Task, budget and main score, of each.
    """
    rows = []
    for budget in budgets:
        results = mteb.evaluate(
            BudgetModel(encoder, budget, name, revision),
            tasks,
            cache=mteb.ResultCache(output),
            overwrite_strategy="always" if revision == "local" else "only-missing",
            encode_kwargs={"batch_size": batch_size},
            co2_tracker=False,
        )
        rows += [(result.task_name, budget, result.get_score()) for result in results]
    return rows


def table(rows: list[tuple[str, tuple[int, int], float]]) -> str:
    """Return a Markdown table: a line a task, a column a budget, and the mean."""
    budgets = list(dict.fromkeys(budget for _, budget, _ in rows))
    scores = {(task, budget): score for task, budget, score in rows}
    names = list(dict.fromkeys(task for task, _, _ in rows))
    lines = ["| task | " + " | ".join(f"({q}, {d})" for q, d in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{scores[name, b]:.4f}" for b in budgets) + " |" for name in names]
    means = [sum(scores[name, budget] for name in names) / len(names) for budget in budgets]
    return "\n".join([*lines, "| mean | " + " | ".join(f"{mean:.4f}" for mean in means) + " |"])


def main() -> None:
    """Evaluate what the command line names."""
    arguments = parse_arguments()
    encoder = MultiVectorEncoder(arguments.model, revision=arguments.revision, trust_remote_code=True)
    if arguments.tasks:
        tasks = list(mteb.get_tasks(tasks=arguments.tasks))
    else:
        tasks = [task for name in arguments.benchmarks for task in mteb.get_benchmark(name).tasks]
    if arguments.budgets:
        budgets = [tuple(map(int, pair.split(","))) for pair in arguments.budgets]
    else:
        budgets = [tuple(budget) for budget in encoder[0].model.config.budgets]
    revision = encoder[0].model.commit or "local"
    print(table(evaluate(encoder, tasks, budgets, arguments.model, revision, arguments.output, arguments.batch_size)))


if __name__ == "__main__":
    main()
