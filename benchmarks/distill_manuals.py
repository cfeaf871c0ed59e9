"""Distil MiniLM's queries: quality kept against milliseconds saved, at every budget, on real text.

    python benchmarks/distill_manuals.py

The teacher is trained first: MMR on the manuals, as `make reproduce` does. The students are its first layers. They
learn its query vectors from the headings and sentences of the training books, and search the vectors that the teacher
made of the documents of the held-out books. The table goes into docs/reproduction.md with
`make reproduce ARGS=--report`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from reproduction.execute import train
from reproduction.manuals import read_pairs, split
from reproduction.results import pack
from reproduction.runs import MMR, TASKS, Run
from reproduction.tasks import FILES, task_of
from reproduction.vectors import Encoder
from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments
from torch import Tensor

from metaembed import MetaEmbedModel, maxsim
from metaembed.evaluation.metrics import ndcg
from metaembed.training.distill import QueryDistillationLoss, query_dataset, shallow

HERE = Path(__file__).parent
STATE = HERE.parent / "outputs/reproduction/distill"
RESULT = HERE / "reproduction/results/distill.json"


def main(argv: list[str] | None = None) -> None:
    """Train the teacher and the students, and write what they reach."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 3, 1], help="of each student")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)

    run = Run("manuals", MMR, 0, TASKS["manuals"])
    teacher = train_teacher(run)
    data = task_of(run).task.test()
    documents = teacher.encode_documents(list(data.documents), max_length=run.settings.length)  # [N, R_c, D]
    texts = training_texts()
    labels = query_dataset(teacher, texts, batch_size=128)
    ranked = documents_to_rank(teacher, run)
    examined = [("teacher", teacher)]
    for layers in arguments.layers:
        student = distil(teacher, layers, labels, ranked, arguments.epochs)
        examined.append((f"student of {layers} layer{'s' * (layers > 1)}", student))
    rows = [measure(name, model, list(data.queries), documents, data.relevant) for name, model in examined]
    arguments.result.write_text(json.dumps({"texts": len(texts), "epochs": arguments.epochs, "rows": rows}, indent=1))
    for row in rows:
        print(row["model"], f"{row['milliseconds']:.1f} ms", row["ndcg@10"])


def train_teacher(run: Run) -> MetaEmbedModel:
    """Return MiniLM trained as in the reproduction; an interrupted training goes on, a finished one is loaded."""
    task = task_of(run)
    path = STATE / "teacher"
    if not path.is_dir():
        model = task.task.model(run.method)
        train(run, task, Encoder(model, run.method), STATE / f"{run.key}.safetensors", float("inf"))
        model.save_pretrained(path)
    return MetaEmbedModel.from_pretrained(path).eval()


def training_texts() -> list[str]:
    """Return the headings of the training books, and the first sentence of each section."""
    pairs = split(read_pairs(FILES))[0]
    return [text for title, section in pairs for text in (title, re.split(r"(?<=[.?!]) ", section)[0][:200])]


def documents_to_rank(teacher: MetaEmbedModel, run: Run) -> Tensor:
    """Return the teacher's vectors [500, R_c, D] of sections of the training books, to rank in the loss."""
    sections = [section for _, section in split(read_pairs(FILES))[0][:500]]
    return teacher.encode_documents(sections, max_length=run.settings.length)


def distil(teacher: MetaEmbedModel, layers: int, data, documents: Tensor, epochs: int) -> MetaEmbedModel:
    """Return a student of the first layers, trained on the teacher's query vectors."""
    student = shallow(teacher, layers)
    encoder = student.to_sentence_transformers()
    settings = MultiVectorEncoderTrainingArguments(
        output_dir=str(STATE / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    loss = QueryDistillationLoss(encoder, documents, sample=128)
    MultiVectorEncoderTrainer(model=encoder, args=settings, train_dataset=data, loss=loss).train()
    return student.eval()


def measure(name: str, model: MetaEmbedModel, queries: list[str], documents: Tensor, relevant: Tensor) -> dict:
    """Return the milliseconds of a query and the nDCG@10 at every budget, of each query too."""
    vectors = model.encode_queries(queries)
    row = {"model": name, "milliseconds": milliseconds(model.encode_queries, queries[:200]), "ndcg@10": {}, "each": {}}
    for r_q, r_c in map(tuple, model.config.budgets):
        ranked = relevant.gather(1, maxsim(vectors, documents, (r_q, r_c)).topk(10, dim=1).indices)
        quality = ndcg(ranked, relevant.sum(dim=1), k=10)
        row["ndcg@10"][f"({r_q},{r_c})"] = round(quality.mean().item(), 4)
        row["each"][f"({r_q},{r_c})"] = pack(quality)
    return row


def milliseconds(encode: Callable, queries: list[str]) -> float:
    """Return the median CPU time to encode one query, on one thread: other programs do not count."""
    times = []
    for query in queries:
        start = time.thread_time()
        encode(query)
        times.append(1000 * (time.thread_time() - start))
    return round(statistics.median(times), 2)


if __name__ == "__main__":
    main()
