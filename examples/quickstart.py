"""Make a model, train it on pictures, evaluate it at every budget, save it, reload it, and search: in a few minutes.

    python examples/quickstart.py                                    train, evaluate, save, reload
    python examples/quickstart.py --query "cat face, red apple"      query the model that the run saved
    python examples/quickstart.py --budgets 16,64                    train one budget only, to see what MMR is for
    python examples/quickstart.py --backbone Qwen/Qwen2.5-VL-3B-Instruct    the same with a real backbone (on a GPU)

A document is a picture of six pictograms, a query names four to six of them. The test scenes have a seed of their own:
their compositions were not in the training data, their pictograms were. Writes to `outputs/quickstart`, or to a folder
beside it named after the backbone and the budgets: the model folder, the table, the curve of quality against size, and
a sheet of queries with the pictures they found.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from figures import draw_curve, draw_sheet
from safetensors.torch import load_file, save_file
from scenes import Scene, is_relevant, make_task, name_query
from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments
from tiny_backbone import build_backbone, build_processor
from torch import Tensor
from transformers import AutoModel, set_seed

from metaembed import MetaEmbedModel, maxsim, search
from metaembed.evaluation.metrics import ndcg
from metaembed.evaluation.tables import markdown_table
from metaembed.sentence_metaembed import to_multi_vector_encoder
from metaembed.training.budgets import check_budgets
from metaembed.training.losses import MMRLoss

TEST_SEED = 987_654_321  # no training seed, and not the one that the settings were chosen on


def run(arguments: argparse.Namespace) -> None:
    """Train, save, evaluate, reload."""
    started = time.perf_counter()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    set_seed(arguments.seed)

    # 1. Make the pictures and queries, and an untrained model.
    scenes, _, texts = make_task(arguments.steps * arguments.batch_size, arguments.seed)
    model = make_model(arguments, texts)
    print(f"{model.num_parameters():,} parameters, {len(scenes):,} training scenes")

    # 2. Train.
    train(model, texts, scenes, arguments)
    print(f"trained, {time.perf_counter() - started:.0f} s after the start")

    # 3. Save: the folder is a complete Hub repository.
    model.save_pretrained(output / "model")

    # 4. Evaluate at every budget: encode once, score five times.
    scenes, wanted, texts = make_task(arguments.test_scenes, TEST_SEED)
    documents = model.encode_documents([scene.draw(arguments.cell) for scene in scenes], show_progress_bar=True)
    queries = model.encode_queries(texts, show_progress_bar=True)
    save_file({"documents": documents}, output / "documents.safetensors")
    relevant = torch.tensor([[query <= scene.pictograms for scene in scenes] for query in wanted])  # [Q, N]
    rows = evaluate(model, queries, documents, relevant)
    table = format_table(rows)
    print(f"\n{table}\n")
    (output / "table.md").write_text(table + "\n")
    (output / "results.json").write_text(json.dumps({"seed": arguments.seed, "rows": rows}, indent=2) + "\n")
    draw_curve(rows).savefig(output / "curve.png", dpi=150)
    found = search(queries[:8], documents, k=5).indices
    draw_sheet(texts[:8], found, relevant[:8].gather(1, found), scenes).savefig(output / "sheet.png", dpi=110)

    # 5. Reload it in a fresh process, as somebody without this package would.
    check_reload(model, texts[:8], scenes[:8], arguments)
    print(f"everything is in {output}/ after {time.perf_counter() - started:.0f} s")


def make_model(arguments: argparse.Namespace, texts: list[str]) -> MetaEmbedModel:
    """Return an untrained MetaEmbed model of the backbone asked for."""
    if arguments.backbone:  # in float32: training all weights in bfloat16 would hardly change them
        return MetaEmbedModel.from_backbone(arguments.backbone, dtype=torch.float32, seed=arguments.seed)
    processor = build_processor(texts, size={"shortest_edge": 16 * 16, "longest_edge": 1024 * 1024})
    return MetaEmbedModel.from_backbone(build_backbone(processor, seed=arguments.seed), processor=processor)


def train(model: MetaEmbedModel, texts: list[str], scenes: list[Scene], arguments: argparse.Namespace) -> None:
    """Train `model` on (query, picture) pairs with sentence-transformers' trainer. One epoch: every scene is new."""
    encoder = to_multi_vector_encoder(model)
    dataset = Dataset.from_dict({"query": texts, "positive": [scene.draw(arguments.cell) for scene in scenes]})
    # The paper's "sum" suits a pretrained backbone. A tiny one with random weights learns better from "sqrt", whose
    # logits at 16 query vectors are 4 times as large as at one, and not 16 times.
    loss = MMRLoss(encoder, budgets=arguments.budgets, normalize=arguments.normalize)
    settings = MultiVectorEncoderTrainingArguments(
        output_dir=str(arguments.output / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        weight_decay=0.01,
        adam_beta2=0.98,
        bf16=bool(arguments.backbone) and torch.cuda.is_available(),
        dataloader_num_workers=1,  # prepares pictures while the model computes
        logging_steps=max(1, arguments.steps // 6),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=arguments.seed,
    )
    MultiVectorEncoderTrainer(model=encoder, args=settings, train_dataset=dataset, loss=loss).train()


def evaluate(model: MetaEmbedModel, queries: Tensor, documents: Tensor, relevant: Tensor) -> list[dict]:
    """Measure retrieval at every budget.

    Args:
        model: The model, for its budgets.
        queries: [Q, R_q, D].
        documents: [N, R_c, D].
        relevant: Whether a scene has all pictograms that a query names, boolean [Q, N]. Any such scene is relevant.

    Returns:
        A row per budget: recall@1 and recall@5 (whether a relevant scene is among the first), nDCG@10, the bytes of a
        document's vectors in float32, and the milliseconds of one query against all documents.
    """
    rows = []
    for r_q, r_c in model.config.budgets:
        indices = search(queries, documents, k=10, budget=(r_q, r_c)).indices  # [Q, 10]
        hits = relevant.gather(1, indices)  # [Q, 10]
        rows.append(
            {
                "budget": f"({r_q},{r_c})",
                "recall@1": hits[:, 0].float().mean().item(),
                "recall@5": hits[:, :5].any(dim=1).float().mean().item(),
                "nDCG@10": ndcg(hits, relevant.sum(dim=1), k=10).mean().item(),
                "bytes/document": r_c * documents.shape[-1] * 4,
                "ms/query": median_milliseconds(queries[:50], documents, (r_q, r_c)),
            }
        )
    return rows


def median_milliseconds(queries: Tensor, documents: Tensor, budget: tuple[int, int]) -> float:
    """Return the median time to score one query against all documents."""
    times = []
    for query in queries:
        start = time.perf_counter()
        maxsim(query[None], documents, budget=budget)
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def format_table(rows: list[dict]) -> str:
    """Return the rows of an evaluation as a Markdown table."""
    cells = [[f"{value:.3f}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    return markdown_table(list(rows[0]), cells)


def check_reload(model: MetaEmbedModel, texts: list[str], scenes: list[Scene], arguments: argparse.Namespace) -> None:
    """Load the saved folder in a fresh process, without this package, with each library, and compare embeddings."""
    folder = arguments.output / "reload"
    folder.mkdir(exist_ok=True)
    pictures = [scene.draw(arguments.cell) for scene in scenes]
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index}.png")
    (folder / "queries.json").write_text(json.dumps(texts))
    script = Path(__file__).with_name("reload.py")
    subprocess.run([sys.executable, str(script), str(arguments.output / "model"), str(folder)], check=True)
    expected = {"queries": model.encode_queries(texts), "documents": model.encode_documents(pictures)}
    for name in ("AutoModel", "MultiVectorEncoder"):
        embeddings = load_file(folder / f"{name}.safetensors")
        gap = max((embeddings[side] - expected[side]).abs().max().item() for side in expected)
        print(f"reloaded in a fresh process with {name}: largest difference {gap:.1e}")
        if gap > 1e-5:
            raise SystemExit(f"{name} gives other embeddings after reloading")


def answer(query: str, arguments: argparse.Namespace) -> None:
    """Answer a typed query with the saved model."""
    model = AutoModel.from_pretrained(arguments.output / "model", trust_remote_code=True)
    documents = load_file(arguments.output / "documents.safetensors")["documents"]
    scenes, _, _ = make_task(len(documents), TEST_SEED)
    result = search(model.encode_queries([query]), documents, k=5)
    relevant = torch.tensor([[is_relevant(query, scenes[i]) for i in result.indices[0].tolist()]])  # [1, 5]
    path = arguments.output / "answer.png"
    draw_sheet([query], result.indices, relevant, scenes).savefig(path, dpi=110)
    print(f'"{query}":')
    for rank, (score, index) in enumerate(zip(result.scores[0], result.indices[0], strict=True), 1):
        names = name_query(scenes[index].pictograms, random.Random(0))
        print(f"{rank}. {score:6.2f}  {'yes' if relevant[0, rank - 1] else 'no ':3}  {names}")
    print(f"pictures: {path}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", help="Hub id or folder of a real backbone; default: a tiny one made here")
    parser.add_argument("--budgets", type=read_budgets, help='what to train, as "1,1 4,8 16,64"; default: all five')
    parser.add_argument("--normalize", default="sqrt", choices=["sum", "mean", "sqrt"], help="see MMRLoss")
    parser.add_argument("--steps", type=read_count, default=960)
    parser.add_argument("--batch-size", type=read_count, default=32)
    parser.add_argument("--learning-rate", type=float, help="default: 3e-3 for the tiny backbone, 1e-5 for a real one")
    parser.add_argument(
        "--cell", type=read_count, help="pixels per cell; default: 16 for the tiny backbone, 56 for a real one"
    )
    parser.add_argument("--test-scenes", type=read_count, default=2000, help="at least 10, for nDCG@10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--query", help='answer this query, e.g. "cat face, red apple", with the saved model if any')
    parser.add_argument("--output", type=Path, help="default: outputs/quickstart, and the backbone and budgets if any")
    arguments = parser.parse_args(argv)
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


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    arguments = parse_arguments(argv)
    if not arguments.backbone:
        torch.set_num_threads(1)  # a model this small gains nothing from more, and loses where cores are busy
    if not (arguments.query and (arguments.output / "documents.safetensors").is_file()):
        run(arguments)
    if arguments.query:
        answer(arguments.query, arguments)


if __name__ == "__main__":
    main()
