"""The whole path once: make a model, train it on pictures, save it, load it back through both doors, and search.

    python examples/quickstart.py                                    train, evaluate, save, reload (a few minutes)
    python examples/quickstart.py --query "cat face, red apple"      ask the model that the run saved
    python examples/quickstart.py --budgets 16,64                    train one budget only, to see what MMR is for
    python examples/quickstart.py --backbone Qwen/Qwen2.5-VL-3B-Instruct    the same with a real backbone (a GPU)

A document is a picture of six pictograms, a query names four to six of them. Test scenes come from a seed of their
own: compositions never seen in training, of pictograms all seen. Writes to `outputs/quickstart`, or to a folder beside
it named after the backbone and the budgets: the model folder, the table, the curve of quality against budget, and a
sheet of queries with what they found.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from scenes import Scene, make_query, make_scene, name_query
from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments
from tiny_backbone import build_backbone, build_processor
from torch import Tensor
from transformers import AutoModel, set_seed

from metaembed import MetaEmbedModel, maxsim, search
from metaembed.configuration_metaembed import check_budgets
from metaembed.sentence_metaembed import to_multi_vector_encoder
from metaembed.training.losses import MMRLoss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TEST_SEED = 987_654_321  # no training seed, and not the one that settings were chosen on


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", help="Hub id or folder of a real backbone; default: a tiny one made here")
    parser.add_argument("--budgets", type=read_budgets, help='what to train, as "1,1 4,8 16,64"; default: all five')
    parser.add_argument("--normalize", default="sqrt", choices=["sum", "mean", "sqrt"], help="see MMRLoss")
    parser.add_argument("--steps", type=read_count, default=960)
    parser.add_argument("--batch-size", type=read_count, default=32)
    parser.add_argument("--learning-rate", type=float, help="default: 3e-3 for the tiny backbone, 1e-5 for a real one")
    parser.add_argument(
        "--cell", type=read_count, help="pixels a cell; default: 16 for the tiny backbone, 56 for a real one"
    )
    parser.add_argument("--test-scenes", type=read_count, default=2000, help="at least 10, for nDCG@10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--query", help='answer this query, e.g. "cat face, red apple", with the saved model if any')
    parser.add_argument("--output", type=Path, help="default: outputs/quickstart, and the backbone and budgets if any")
    arguments = parser.parse_args()
    if arguments.test_scenes < 10:
        parser.error(f"argument --test-scenes: must be at least 10, for nDCG@10, got {arguments.test_scenes}")
    if arguments.query is not None and not arguments.query.strip():
        parser.error('argument --query: names no pictogram: expected names such as "cat face, red apple"')
    if arguments.output is None:
        backbone = [arguments.backbone.strip("/").replace("/", "--")] if arguments.backbone else []
        budgets = [f"{q}x{d}" for q, d in arguments.budgets or []]
        arguments.output = Path("outputs") / "-".join(["quickstart", *backbone, *budgets])
    arguments.cell = arguments.cell or (56 if arguments.backbone else 16)
    arguments.learning_rate = arguments.learning_rate or (1e-5 if arguments.backbone else 3e-3)
    return arguments


def read_count(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def read_budgets(text: str) -> list[tuple[int, int]]:
    """Read budgets such as "1,1 16,64"."""
    try:
        pairs = [tuple(map(int, pair.split(","))) for pair in text.split()]
        check_budgets(pairs, 16, 64, complete=False)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f'expected pairs such as "1,1 4,8 16,64", got {text!r}: {error}') from error
    return pairs


def make_task(count: int, seed: int) -> tuple[list[Scene], list[frozenset[str]], list[str]]:
    """Make `count` scenes, the pictograms that each one's query names, and the query as text."""
    rng = random.Random(seed)
    scenes = [make_scene(rng) for _ in range(count)]
    wanted = [make_query(scene, rng) for scene in scenes]
    return scenes, wanted, [name_query(pictograms, rng) for pictograms in wanted]


def make_model(arguments: argparse.Namespace, texts: list[str]) -> MetaEmbedModel:
    """Make an untrained MetaEmbed model of the backbone asked for."""
    if arguments.backbone:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return MetaEmbedModel.from_backbone(arguments.backbone, dtype=dtype, seed=arguments.seed)
    processor = build_processor(texts, size={"shortest_edge": 16 * 16, "longest_edge": 1024 * 1024})
    return MetaEmbedModel.from_backbone(build_backbone(processor, seed=arguments.seed), processor=processor)


def train(model: MetaEmbedModel, texts: list[str], scenes: list[Scene], arguments: argparse.Namespace) -> None:
    """Train `model` on (query, picture) pairs with sentence-transformers' trainer. One pass: every scene is new."""
    encoder = to_multi_vector_encoder(model)
    dataset = Dataset.from_dict({"query": texts, "positive": [scene.draw(arguments.cell) for scene in scenes]})
    settings = MultiVectorEncoderTrainingArguments(
        output_dir=str(arguments.output / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        weight_decay=0.01,
        adam_beta2=0.98,
        dataloader_num_workers=1,  # pictures are prepared while the model computes
        logging_steps=max(1, arguments.steps // 6),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=arguments.seed,
    )
    loss = MMRLoss(encoder, budgets=arguments.budgets, normalize=arguments.normalize)
    MultiVectorEncoderTrainer(model=encoder, args=settings, train_dataset=dataset, loss=loss).train()


def evaluate(model: MetaEmbedModel, queries: Tensor, documents: Tensor, relevant: Tensor) -> list[dict]:
    """Measure retrieval at every budget.

    Args:
        model: Tells the budgets.
        queries: [Q, R_q, D].
        documents: [N, R_c, D].
        relevant: Whether a scene holds all that a query names, boolean [Q, N]: its own, and others by chance.

    Returns:
        A row a budget: recall@1 and recall@5 (whether a right scene is among the first), nDCG@10, the bytes of a
        document's vectors in float32, and the milliseconds of one query against all documents.
    """
    discounts = 1 / torch.arange(2, 12).float().log2()  # [10]
    best = torch.stack([discounts[:count].sum() for count in relevant.sum(dim=1).clamp(max=10).tolist()])  # [Q]
    rows = []
    for r_q, r_c in model.config.budgets:
        indices = search(queries, documents, k=10, budget=(r_q, r_c)).indices  # [Q, 10]
        hits = relevant.gather(1, indices)  # [Q, 10]
        times = []
        for query in queries[:50]:
            start = time.perf_counter()
            maxsim(query[None], documents, budget=(r_q, r_c))
            times.append(time.perf_counter() - start)
        rows.append(
            {
                "budget": f"({r_q},{r_c})",
                "recall@1": hits[:, 0].float().mean().item(),
                "recall@5": hits[:, :5].any(dim=1).float().mean().item(),
                "nDCG@10": ((hits * discounts).sum(dim=1) / best).mean().item(),
                "bytes/document": r_c * documents.shape[-1] * 4,
                "ms/query": 1000 * sorted(times)[len(times) // 2],
            }
        )
    return rows


def format_table(rows: list[dict]) -> str:
    """Write the rows of an evaluation as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_curve(rows: list[dict], path: Path) -> None:
    """Draw quality against the size of a document."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    sizes = [row["bytes/document"] for row in rows]
    for metric, marker in (("recall@1", "o"), ("recall@5", "s"), ("nDCG@10", "^")):
        axes.plot(sizes, [row[metric] for row in rows], marker=marker, label=metric)
    for row in rows:
        axes.annotate(row["budget"], (row["bytes/document"], row["recall@1"]), (0, -14), textcoords="offset points")
    axes.set(xscale="log", xlabel="bytes a document (float32)", title="One model, one index")
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_sheet(texts: list[str], found: Tensor, right: Tensor, scenes: list[Scene], path: Path) -> None:
    """Draw queries and the pictures they found, right ones framed.

    Args:
        texts: The queries.
        found: Indices of the scenes they found [Q, k], best first.
        right: Whether each is right, boolean [Q, k].
        scenes: The scenes, drawn larger here than the model saw them.
        path: File to write.
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
            is_right = bool(right[row, column])
            for spine in cell.spines.values():
                spine.set(color="tab:green" if is_right else "lightgrey", linewidth=4 if is_right else 1)
        axes[row, 0].set_title(text, loc="left", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def check_reload(model: MetaEmbedModel, texts: list[str], scenes: list[Scene], arguments: argparse.Namespace) -> None:
    """Load the saved folder in a fresh process, without this package, through both doors, and compare embeddings."""
    pictures = arguments.output / "reload"
    pictures.mkdir(exist_ok=True)
    for index, scene in enumerate(scenes):
        scene.draw(arguments.cell).save(pictures / f"{index}.png")
    (pictures / "queries.json").write_text(json.dumps(texts))
    script = Path(__file__).with_name("reload.py")
    subprocess.run([sys.executable, str(script), str(arguments.output / "model"), str(pictures)], check=True)
    expected = {
        "queries": model.encode_queries(texts),
        "documents": model.encode_documents([scene.draw(arguments.cell) for scene in scenes]),
    }
    for door, embeddings in (
        (door, load_file(pictures / f"{door}.safetensors")) for door in ("AutoModel", "MultiVectorEncoder")
    ):
        gap = max((embeddings[side] - expected[side]).abs().max().item() for side in expected)
        print(f"reloaded in a fresh process with {door}: largest difference {gap:.1e}")
        if gap > 1e-5:
            raise SystemExit(f"{door} gives other embeddings after reloading")


def answer(query: str, arguments: argparse.Namespace) -> None:
    """Answer a typed query with the saved model."""
    model = AutoModel.from_pretrained(arguments.output / "model", trust_remote_code=True)
    documents = load_file(arguments.output / "documents.safetensors")["documents"]
    scenes, _, _ = make_task(len(documents), TEST_SEED)
    result = search(model.encode_queries([query]), documents, k=5)
    named = {name.strip().lower() for name in query.split(",")}
    right = torch.tensor([[is_match(named, scenes[i]) for i in result.indices[0].tolist()]])  # [1, 5]
    path = arguments.output / "answer.png"
    draw_sheet([query], result.indices, right, scenes, path)
    print(f'"{query}":')
    for rank, (score, index) in enumerate(zip(result.scores[0], result.indices[0], strict=True), 1):
        names = name_query(scenes[index].pictograms, random.Random(0))
        print(f"{rank}. {score:6.2f}  {'yes' if right[0, rank - 1] else 'no ':3}  {names}")
    print(f"pictures: {path}")


def is_match(named: set[str], scene: Scene) -> bool:
    """Whether a scene holds every pictogram named."""
    return named <= set(name_query(scene.pictograms, random.Random(0)).split(", "))


def run(arguments: argparse.Namespace) -> None:
    """Train, save, evaluate, reload."""
    started = time.perf_counter()
    arguments.output.mkdir(parents=True, exist_ok=True)
    set_seed(arguments.seed)

    # 1. Make the pictures and queries, and an untrained model
    scenes, _, texts = make_task(arguments.steps * arguments.batch_size, arguments.seed)
    model = make_model(arguments, texts)
    print(f"{model.num_parameters():,} parameters, {len(scenes):,} training scenes")

    # 2. Train
    train(model, texts, scenes, arguments)
    print(f"trained {time.perf_counter() - started:.0f} s after the start, data and all")

    # 3. Save: the folder is a complete Hub repository
    model.save_pretrained(arguments.output / "model")

    # 4. Evaluate at every budget: encoded once, scored five times
    scenes, wanted, texts = make_task(arguments.test_scenes, TEST_SEED)
    documents = model.encode_documents([scene.draw(arguments.cell) for scene in scenes], show_progress_bar=True)
    queries = model.encode_queries(texts, show_progress_bar=True)
    save_file({"documents": documents}, arguments.output / "documents.safetensors")
    relevant = torch.tensor([[query <= scene.pictograms for scene in scenes] for query in wanted])  # [Q, N]
    rows = evaluate(model, queries, documents, relevant)
    print(f"\n{format_table(rows)}\n")
    (arguments.output / "table.md").write_text(format_table(rows) + "\n")
    (arguments.output / "results.json").write_text(json.dumps({"seed": arguments.seed, "rows": rows}, indent=2) + "\n")
    plot_curve(rows, arguments.output / "curve.png")
    found = search(queries[:8], documents, k=5).indices
    draw_sheet(texts[:8], found, relevant[:8].gather(1, found), scenes, arguments.output / "sheet.png")

    # 5. Load it back as a stranger would
    check_reload(model, texts[:8], scenes[:8], arguments)
    print(f"everything is in {arguments.output}/ after {time.perf_counter() - started:.0f} s")


def main() -> None:
    """Run what the command line asks for."""
    arguments = parse_arguments()
    if not arguments.backbone:
        torch.set_num_threads(1)  # a model this small gains nothing from more, and loses where cores are busy
    if not (arguments.query and (arguments.output / "documents.safetensors").is_file()):
        run(arguments)
    if arguments.query:
        answer(arguments.query, arguments)


if __name__ == "__main__":
    main()
