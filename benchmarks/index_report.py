"""Tables and plots of what `index.py` measured."""

from __future__ import annotations

from typing import Any

import matplotlib
from engines import PEERS
from report import REPORT, describe_load, describe_machine, write_report

from metaembed.evaluation.tables import markdown_table

IMAGES = REPORT.parent / "images"
OURS, SCAN, READ = "#0b6e99", "#7a7a7a", "#b8b8b8"
COLORS = {
    "faiss_rescored": "#d1495b",
    "qdrant": "#8e44ad",
    "lance_db": "#e08e0b",
    "plaid": "#2e8b57",
    "warp": "#6b4f2a",
}
Cells = dict[str, dict[str, Any]]


def write(cells: Cells) -> None:
    """Print the tables, and write them and the plots to the document."""
    sizes = sorted(int(name.split("-")[1]) for name in cells if name.startswith("latency-"))
    text = "\n".join([*describe(cells, sizes), *compare(cells), *beside(cells)])
    print(text)
    write_report({"index": text})
    IMAGES.mkdir(exist_ok=True)
    plot_sizes(cells, sizes)
    plot_recall(cells)


def number(value: float) -> str:
    """Return three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(count: float) -> str:
    """Return bytes as text."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{number(count)} {unit}"
        count /= 1000
    raise AssertionError


def show(stages: list) -> str:
    """Return stages as text."""
    names = {"main": "", "first": " binary"}
    return ", ".join(f"({b[0]}, {b[1]}){names[role]} keeps {keep:,}" for b, role, keep in stages)


def describe(cells: Cells, sizes: list[int]) -> list[str]:
    """Return the table of sizes."""
    rows = []
    for n in sizes:
        it = cells[f"latency-{n}"]
        faster = f"{it['full scan'] / it['p50']:.0f}x"
        over = f"{it['p50'] / it['read']:.1f}x"
        times = [number(it[key]) for key in ("full scan", "p50", "p95")]
        recalls = [f"{it['recall']:.3f}"]
        auto = [number(it["auto"]), f"{it['auto recall']:.3f}"]
        rows.append([f"{n:,}", *times, *recalls, faster, over, show(it["stages"]), *auto])
    head = ["documents", "every document, ms", "search, ms", "95th percentile", "recall@10", "faster"]
    head += ["over reading", "stages before the final scores", "default stages, ms", "recall@10"]
    largest = cells[f"latency-{max(n for n in sizes if n <= 1_000_000)}"]
    lines = [
        "## Search",
        "",
        f"{describe_machine()}.",
        "One thread and one query at a time, in milliseconds of processor time. The documents are scenes of the",
        "quickstart, embedded by its model: 64 vectors of 64 dimensions, in int8. Recall@10 is the share of the ten",
        "best documents of an exact search in float32. `tune_cascade` proposes stages on half of 200 queries (from a",
        "million documents on, ten are tried instead); the table shows the fastest of those whose recall is 0.95 on",
        "both halves, with the figures of the other half.",
        "",
        describe_load(),
        "",
        markdown_table(head, rows),
        "",
        "*Faster* compares a search with scoring every document in full in int8, the fastest of our full scans, whose",
        f"recall is {largest['full scan recall']:.3f} at {max(n for n in sizes if n <= 1_000_000):,} documents.",
        "*Over reading* compares it with reading once, as one sum, as many bytes as its first stage reads.",
    ]
    if sizes[-1] > 1_000_000:
        real = f"{cells[f'latency-{sizes[-1]}']['scenes']:,}"
        lines += [
            "",
            f"The {sizes[-1]:,} documents have 16 vectors each. The first {real} are scenes as they are; each",
            f"further {real} are the same scenes, with noise of half its length added to each vector, normalized.",
            "Their first stage reads a binary copy of the first vector, and recall is against a full scan in int8.",
        ]
    return [
        *lines,
        "",
        "![Milliseconds of a search by the number of documents](images/search-sizes.png)",
        "",
        "![Recall by milliseconds of a search](images/search-recall.png)",
        "",
    ]


def compare(cells: Cells) -> list[str]:
    """Return what batches, filters, adds and many small adds cost, as ratios measured side by side."""
    kinds: dict[str, dict[int, str]] = {}
    for name, it in cells.items():
        kind, _, n = name.rpartition("-")
        if not n.isdigit():
            continue
        if kind == "batch":
            for threads, clock in ((1, "processor"), (2, "clock")):
                what = (
                    f"a query in a batch of 64, {threads} thread{'s' * (threads > 1)}, against one alone on one thread"
                )
                ratio = it[f"batch, {threads}, {clock}"] / it[f"one, 1, {clock}"]
                kinds.setdefault(what, {})[int(n)] = f"{ratio:.2f}"
        elif kind == "filtered":
            for what, ms in it.items():
                if what.startswith("no filter"):
                    base = ms
                else:
                    kinds.setdefault(f"filter of {what}, against none", {})[int(n)] = f"{ms / base:.2f}"
        elif kind == "small-adds":
            ratio = it["1,000 adds"] / it["compacted"]
            kinds.setdefault("a search after 1,000 adds, before `compact`, against one after it", {})[int(n)] = (
                f"{ratio:.2f}"
            )
        elif kind == "build" and it["write"] and int(n) >= 100_000:
            rates = [f"{int(n) / it[key]:,.0f}" for key in ("add", "add, processor")]
            rate = f"{it['write'] / it['add']:.2f} ({rates[0]} documents a second, {rates[1]} of processor time)"
            kinds.setdefault("speed of adding, against writing the same bytes to disk", {})[int(n)] = rate
    counts = sorted({n for row in kinds.values() for n in row})
    rows = [[what, *(row.get(n, "") for n in counts)] for what, row in kinds.items()]
    return [
        "### Batches, filters and adds",
        "",
        "Ratios of times, measured in turns: of processor time for searches on one thread, else of the clock. Adds",
        "are of 10,000 documents. They and the writes that they are compared with wait until the disk has the bytes.",
        "",
        markdown_table(["", *(f"{n:,} documents" for n in counts)], rows),
        "",
    ]


def beside(cells: Cells) -> list[str]:
    """Return the tables of other engines."""
    lines = [
        "### Beside other engines",
        "",
        "The same embeddings and queries on one core, each engine in an environment of its own. Of several settings",
        "of each, the table shows the fastest with a recall of 0.95 on half of the queries, or else the one with the",
        "highest recall; times and recall are those of the other half. All times are processor time. An engine has 20",
        "minutes to build its index.",
        "",
    ]
    for n in sorted({int(name.rpartition("-")[2]) for name in cells if name.startswith("peer-")}):
        ours, built = cells[f"latency-{n}"], cells[f"build-{n}"]
        figures = [f"{ours['recall']:.3f}", number(ours["p50"]), number(ours["p95"])]
        build = f"{built['add, processor']:,.0f} s"
        rows = [["metaembed, int8", *figures, size(built["bytes"]), build, show(ours["stages"])]]
        for module, peer in PEERS.items():
            it = cells.get(f"peer-{module}-{n}")
            if it is None:
                continue
            title = f"{peer.title} ({', '.join(p for p in peer.pins if p.startswith(peer.package))})"
            built = [size(it["bytes"]), f"{it['seconds']:,.0f} s"] if "seconds" in it else ["", it["failed"]]
            if "recall" in it:
                figures = [f"{it['recall']:.3f}", number(it["p50"]), number(it["p95"])]
                setting = ", ".join(f"{name} {value}" for name, value in it["setting"].items())
            else:
                figures, setting = ["", "", ""], it["failed"] if "seconds" in it else ""
            rows.append([title, *figures, *built, setting])
        head = ["engine", "recall@10", "median, ms", "95th percentile", "on disk", "build", "setting"]
        lines += [f"{n:,} documents:", "", markdown_table(head, rows), ""]
    return lines


# Plots


def figure(columns: int = 1) -> Any:
    """Return a figure and its axes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    )
    return pyplot.subplots(
        1, columns, figsize=(6.4 if columns == 1 else 8.6, 3.8), layout="constrained", squeeze=False
    )


def save(drawing: Any, name: str) -> None:
    """Save a figure as a small PNG."""
    drawing.savefig(IMAGES / name, dpi=110, pil_kwargs={"optimize": True})


def plot_sizes(cells: Cells, sizes: list[int]) -> None:
    """Draw milliseconds by the number of documents."""
    drawing, ((axes,),) = figure()
    for key, label, style in (
        ("full scan", "metaembed, every document", {"color": SCAN, "marker": "o"}),
        ("p50", "metaembed, recall 0.95", {"color": OURS, "marker": "o", "linewidth": 2.2}),
        ("read", "reading what the first stage reads", {"color": READ, "linestyle": "--"}),
    ):
        real = [n for n in sizes if n <= 1_000_000]
        axes.plot(real, [cells[f"latency-{n}"][key] for n in real], label=label, markersize=4, **style)
        style = {**style, "marker": "D", "linestyle": "none" if key != "read" else "--", "markerfacecolor": "white"}
        large = [n for n in sizes if n > 1_000_000]
        axes.plot(large, [cells[f"latency-{n}"][key] for n in large], markersize=5, **style)
    for module, peer in PEERS.items():
        found = {int(c.rpartition("-")[2]): it for c, it in cells.items() if c.startswith(f"peer-{module}-")}
        points = sorted((n, it["p50"]) for n, it in found.items() if "p50" in it)
        if points:
            least = min(it.get("recall", 1) for it in found.values())
            title = peer.title if least >= 0.945 else f"{peer.title} (recall {least:.2f})"
            axes.plot(
                *zip(*points, strict=True),
                label=title,
                color=COLORS[module],
                marker="s",
                markersize=4,
                linewidth=1,
            )
    axes.set(xscale="log", yscale="log", xlabel="documents", ylabel="milliseconds a query, one core")
    if sizes[-1] > 1_000_000:
        axes.annotate(
            "16 vectors\na document",
            (sizes[-1], cells[f"latency-{sizes[-1]}"]["p50"]),
            xytext=(-4, 14),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axes.grid(alpha=0.25, which="major")
    drawing.legend(loc="outside right upper", fontsize=8)
    save(drawing, "search-sizes.png")


def plot_recall(cells: Cells) -> None:
    """Draw recall by milliseconds, for each size at which other engines were measured."""
    counts = sorted({int(c.rpartition("-")[2]) for c in cells if c.startswith("peer-")})
    if not counts:
        return
    drawing, (row,) = figure(len(counts))
    labels: dict[str, Any] = {}
    for axes, n in zip(row, counts, strict=True):
        curves = {"metaembed": (OURS, [(one["p50"], one["verified"]) for one in cells[f"latency-{n}"]["curve"]])}
        for module, peer in PEERS.items():
            it = cells.get(f"peer-{module}-{n}", {})
            if "curve" in it:
                curves[peer.title] = (COLORS[module], [(one["p50"], one["recall"]) for one in it["curve"]])
        for title, (color, points) in curves.items():
            points = sorted(points)
            best = [p for i, p in enumerate(points) if all(p[1] > before[1] for before in points[:i])]
            wide = 2.2 if title == "metaembed" else 1.2
            (labels[title],) = axes.plot(
                *zip(*best, strict=True), color=color, marker="o", markersize=3, linewidth=wide
            )
        axes.set(xscale="log", xlabel="milliseconds a query, one core", ylabel="recall@10", ylim=(0.6, 1.01))
        axes.set_title(f"{n:,} documents", fontsize=9)
        axes.grid(alpha=0.25)
    drawing.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize=8)
    save(drawing, "search-recall.png")
