"""The two figures of the quickstart: quality against size, and a sheet of queries with the pictures they found."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from scenes import Scene
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

METRICS = {"recall@1": "o", "recall@5": "s", "nDCG@10": "^"}
RELEVANT, OTHER = "tab:green", "lightgrey"


def draw_curve(rows: Sequence[dict]) -> Figure:
    """Draw the quality of each budget against the size of a document.

    Args:
        rows: One per budget, with its name, its metrics and its `bytes/document`.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    sizes = [row["bytes/document"] for row in rows]
    for metric, marker in METRICS.items():
        axes.plot(sizes, [row[metric] for row in rows], marker=marker, label=metric)
    for row in rows:
        axes.annotate(row["budget"], (row["bytes/document"], row["recall@1"]), (0, -14), textcoords="offset points")
    axes.set(xscale="log", xlabel="bytes per document (float32)", ylabel="quality", title="One model, one index")
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def draw_sheet(texts: Sequence[str], found: Tensor, relevant: Tensor, scenes: Sequence[Scene]) -> Figure:
    """Draw queries and the pictures they found, relevant ones in a green frame.

    Args:
        texts: The queries.
        found: Indices of the scenes they found [Q, k], best first.
        relevant: Whether each of these is relevant, boolean [Q, k].
        scenes: The scenes, drawn larger here than the model saw them.
    """
    count, height = found.shape[1], 1.9 * len(texts)
    # Fixed places: a layout that makes room for the titles would push the columns apart.
    places = dict(left=0.01, right=0.99, bottom=0.05 / height, top=1 - 0.3 / height, wspace=0.05, hspace=0.2)
    figure, axes = plt.subplots(len(texts), count, figsize=(1.6 * count, height), squeeze=False, gridspec_kw=places)
    for row, text in enumerate(texts):
        for column in range(count):
            cell = axes[row, column]
            cell.imshow(scenes[found[row, column]].draw(48))
            cell.set(xticks=[], yticks=[])
            color, width = (RELEVANT, 4) if relevant[row, column] else (OTHER, 1)
            for spine in cell.spines.values():
                spine.set(color=color, linewidth=width)
        axes[row, 0].set_title(text, loc="left", fontsize=9)
    return figure
