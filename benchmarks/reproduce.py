"""Reproduce the paper's claims and meet its rivals at equal bytes: writes docs/reproduction.md.

    python benchmarks/reproduce.py                     the quick form: one seed, under 20 minutes
    python benchmarks/reproduce.py --full              six seeds, hours
    python benchmarks/reproduce.py --full --minutes 30   a piece of it: the next call goes on where this one stopped
    python benchmarks/reproduce.py --list --full       what is done and what is left
    python benchmarks/reproduce.py --report            only write the tables and plots again

Every finished run is kept by its settings in benchmarks/reproduction/results/ and never repeated; an interrupted one
resumes from outputs/reproduction/. The page is written from the kept results.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from pathlib import Path

import torch
import transformers
from reproduction.results import Results
from reproduction.runs import TASKS, plan
from tqdm import tqdm

HERE = Path(__file__).parent
RESULTS = HERE / "reproduction/results"
STATE = HERE.parent / "outputs/reproduction/state"


def main(argv: list[str] | None = None) -> None:
    """Run what is left, then write the page."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    results = Results(arguments.results)
    runs = [run for run in plan("full" if arguments.full else "quick") if chosen(run, arguments)]
    if arguments.list:
        for run in runs:
            print("done" if results.has(run) else "left", run.key, run.method.label, sep="\t")
        return
    if not arguments.report:
        complete = execute_all(runs, results, arguments)
        print("all runs are done" if complete else "stopped in time: the same command goes on from here")
    from reproduction.report import write_report

    write_report(results, arguments.docs)
    print(f"wrote {arguments.docs / 'reproduction.md'}")


def chosen(run, arguments: argparse.Namespace) -> bool:
    """Return whether the command line asks for a run."""
    asked = arguments.task in (None, run.task) and (not arguments.method or run.method.name in arguments.method)
    return asked and (not arguments.seeds or run.seed in arguments.seeds)


def execute_all(runs: list, results: Results, arguments: argparse.Namespace) -> bool:
    """Do the runs that are left, in order, until the time is over; return whether all are done."""
    from reproduction.execute import OutOfTimeError, execute

    deadline = time.monotonic() + 60 * arguments.minutes
    left = [run for run in runs if not results.has(run)]
    progress = tqdm(left, desc="runs", initial=len(runs) - len(left), total=len(runs))
    for run in progress:
        progress.set_postfix_str(run.key)
        try:
            result = execute(run, arguments.state, deadline)
        except OutOfTimeError:
            return False
        results.write(run, {**result, "versions": versions()})
        (arguments.state / f"{run.key}.safetensors").unlink(missing_ok=True)
    return True


def versions() -> dict[str, str]:
    """Return what a result depends on besides its settings."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="six seeds and all methods; default: the quick form")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the next call goes on")
    parser.add_argument("--task", choices=list(TASKS), help="only this task")
    parser.add_argument("--method", action="append", help="only this method, by name; may be given several times")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, and end")
    parser.add_argument("--report", action="store_true", help="only write the page from the kept results")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the kept results")
    parser.add_argument("--state", type=Path, default=STATE, help="folder of the interrupted runs")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="folder of the page and its images")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
