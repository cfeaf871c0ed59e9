"""Distil the quickstart's model: a student with fewer layers makes its query vectors, over the same document vectors.

    python examples/quickstart.py      first
    python examples/distill.py         then: trains the student, and prints quality and milliseconds at every budget

The documents stay as the quickstart encoded them. Writes the student to `outputs/distill`: a folder like any other
model's, whose `encode_queries` is the small one. Encode documents with the quickstart's model, not with the student.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from quickstart import TEST_SEED
from safetensors.torch import load_file
from scenes import make_task
from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments

from metaembed import MetaEmbedModel, search
from metaembed.evaluation.metrics import ndcg
from metaembed.evaluation.tables import markdown_table
from metaembed.training.distill import QueryDistillationLoss, query_dataset, shallow

QUERY_SEED = 555_000_000  # not the quickstart's


def milliseconds(model: MetaEmbedModel, queries: list[str]) -> float:
    """Return the median time to encode one query."""
    times = []
    for query in queries:
        start = time.perf_counter()
        model.encode_queries(query)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main(argv: list[str] | None = None) -> None:
    """Train the student and compare it with its teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=Path("outputs/quickstart"), help="its folder")
    parser.add_argument("--output", type=Path, default=Path("outputs/distill"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)

    teacher = MetaEmbedModel.from_pretrained(arguments.quickstart / "model")
    documents = load_file(arguments.quickstart / "documents.safetensors")["documents"]
    student = shallow(teacher, arguments.layers)

    # Text alone is enough to train on. The documents that the rankings are of are the index's own.
    texts = make_task(arguments.steps * arguments.batch_size, QUERY_SEED + arguments.seed)[2]
    data = query_dataset(teacher, texts, show_progress_bar=True, batch_size=256)
    encoder = student.to_sentence_transformers()
    sample = documents[random.Random(0).sample(range(len(documents)), min(1000, len(documents)))]
    settings = MultiVectorEncoderTrainingArguments(
        output_dir=str(arguments.output / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, arguments.steps // 10),
        logging_steps=max(1, arguments.steps // 5),
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )
    loss = QueryDistillationLoss(encoder, sample)
    MultiVectorEncoderTrainer(model=encoder, args=settings, train_dataset=data, loss=loss).train()
    student.save_pretrained(arguments.output / "model")

    scenes, wanted, texts = make_task(len(documents), TEST_SEED)
    relevant = torch.tensor([[query <= scene.pictograms for scene in scenes] for query in wanted])  # [Q, N]
    rows = []
    for name, model in (("teacher", teacher), ("student", student)):
        queries = model.encode_queries(texts)
        cells = []
        for budget in teacher.config.budgets:
            hits = relevant.gather(1, search(queries, documents, k=10, budget=tuple(budget)).indices)
            cells.append(f"{ndcg(hits, relevant.sum(dim=1), k=10).mean():.3f}")
        layers = model.config.backbone_config.get_text_config().num_hidden_layers
        rows.append([f"{name}, {layers} layers", f"{milliseconds(model, texts[:200]):.2f}", *cells])
    head = ["model", "ms a query", *(f"nDCG@10 ({q},{c})" for q, c in teacher.config.budgets)]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
