"""One run: train, resuming where it was interrupted, then measure retrieval at every size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from metaembed.evaluation.metrics import ndcg
from metaembed.retrieval.pca import fit_pca
from metaembed.retrieval.pooling import pool
from metaembed.retrieval.quantization import bytes_per_vector, decode, encode
from metaembed.scoring_metaembed import maxsim

from .objectives import objective
from .results import pack
from .runs import MMR, POOLED, TOKENS, Run
from .tasks import Batches, task_of
from .vectors import Encoder, Vectors, pool_agc

SAVE_EVERY = 60  # seconds
ENCODED_AT_ONCE = 32
DIMENSIONS = {"pictures": (16, 32, 64), "manuals": (64, 128, 384)}  # of the byte dial
BITS = ("float32", "int8", "int4", "binary")
LARGEST = 16 * 1024  # bytes of a document that the byte dial is asked for


class OutOfTimeError(Exception):
    """The time that was given is over; what was done is saved."""


def execute(run: Run, folder: Path, deadline: float = math.inf) -> dict:
    """Train and measure.

    Args:
        run: What to do.
        folder: Where an interrupted run's state is kept.
        deadline: `time.monotonic()` at which to stop.

    Returns:
        The result, to be written as JSON.

    Raises:
        OutOfTimeError: If the deadline came first.
    """
    cpu = time.process_time()
    task = task_of(run)
    model = task.task.model(run.method)
    encoder = Encoder(model, run.method)
    loss, spent = None, 0.0
    if run.method.trained:
        loss, spent = train(run, task, encoder, folder / f"{run.key}.safetensors", deadline)
    data = task.task.test()
    queries = encode_all(run, encoder, list(data.queries), "query")
    documents = encode_all(run, encoder, list(data.documents), "document")
    views = list(measure(run, queries, documents, data.relevant, task.task.storage))
    seconds = time.process_time() - cpu + spent
    return {**run.described, "label": run.method.label, "loss": loss, "cpu_seconds": round(seconds), "views": views}


def train(run: Run, task: Batches, encoder: Encoder, path: Path, deadline: float) -> tuple[float, float]:
    """Train in place; return the mean loss of the last tenth of the steps, and the CPU seconds of earlier pieces."""
    settings = run.settings
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    first, losses, spent = restore(path, encoder, optimizer)
    saved, cpu = time.monotonic(), time.process_time()
    encoder.train()
    progress = tqdm(range(first, settings.steps), desc=run.key, initial=first, total=settings.steps, leave=False)
    for step in progress:
        torch.manual_seed(1_000_003 * run.seed + step)  # of the dropout, whenever the run is resumed
        features = task.get(step, encoder.model.processor, run.method.hard_negatives, run.method.sees_query_tokens)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, settings.warmup, settings.steps)
        with torch.autocast("cpu", task.task.dtype, enabled=task.task.dtype != torch.float32):
            queries, documents = encoder(features[0], "query"), encoder(features[1], "document")
        loss = objective(run.method, queries, documents, step / settings.steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.2f}")
        late = time.monotonic() > deadline
        if late or time.monotonic() - saved > SAVE_EVERY:
            keep(path, encoder, optimizer, losses, spent + time.process_time() - cpu)
            saved = time.monotonic()
        if late:
            raise OutOfTimeError
    encoder.eval()
    last = losses[-max(1, settings.steps // 10) :]
    return round(sum(last) / len(last), 4), spent


def schedule(step: int, warmup: int, steps: int) -> float:
    """Return the share of the largest learning rate: a linear warm-up, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def keep(path: Path, encoder: Encoder, optimizer: torch.optim.Optimizer, losses: list[float], cpu: float) -> None:
    """Write the state of an unfinished training."""
    tensors = {f"weights {name}": value for name, value in encoder.named_parameters()}
    for name, parameter in encoder.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                tensors[f"{moment} {name}"] = optimizer.state[parameter][moment]
    tensors["losses"] = torch.tensor(losses)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, part, {"cpu": str(cpu)})
    part.replace(path)


def restore(path: Path, encoder: Encoder, optimizer: torch.optim.Optimizer) -> tuple[int, list[float], float]:
    """Load the state of an unfinished training, if there is one: its steps, losses and CPU seconds."""
    if not path.is_file():
        return 0, [], 0.0
    with safe_open(path, "pt") as file, torch.no_grad():
        losses = file.get_tensor("losses").tolist()
        present = set(file.keys())
        for name, parameter in encoder.named_parameters():
            parameter.copy_(file.get_tensor(f"weights {name}"))
            if f"exp_avg {name}" in present:
                moments = {moment: file.get_tensor(f"{moment} {name}") for moment in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(len(losses))), **moments}
        return len(losses), losses, float(file.metadata()["cpu"])


@torch.no_grad()
def encode_all(run: Run, encoder: Encoder, inputs: list, side: str) -> Vectors:
    """Encode inputs of any number, in order."""
    processor, task = encoder.model.processor, task_of(run).task
    process = processor.process_queries if side == "query" else processor.process_documents
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]) if isinstance(inputs[i], str) else 0)
    rows: dict[int, tuple] = {}
    encoder.eval()
    for start in range(0, len(order), ENCODED_AT_ONCE):
        chosen = order[start : start + ENCODED_AT_ONCE]
        features = process([inputs[i] for i in chosen], max_length=run.settings.length)
        with torch.autocast("cpu", task.dtype, enabled=task.dtype != torch.float32):
            made = encoder(dict(features), side)
        for place, i in enumerate(chosen):
            own = made.mask[place]
            rows[i] = (
                made.meta[place],
                made.tokens[place, own],
                None if made.one is None else made.one[place],
                None if made.saliency is None else made.saliency[place, own],
            )
    meta, tokens, one, saliency = zip(*(rows[i] for i in range(len(inputs))), strict=True)
    mask = pad_sequence([torch.ones(len(each), dtype=torch.bool) for each in tokens], batch_first=True)
    return Vectors(
        torch.stack(meta),
        pad_sequence(tokens, batch_first=True),
        mask,
        None if one[0] is None else torch.stack(one),
        None if saliency[0] is None else pad_sequence(saliency, batch_first=True),
    )


def measure(run: Run, queries: Vectors, documents: Vectors, relevant: Tensor, storage: str) -> Iterator[dict]:
    """Yield a view for every size that the method's documents can have, each measured as it is stored.

    Args:
        run: Says what the vectors are.
        queries: Of the test set.
        documents: Of the test set.
        relevant: Which document is relevant for which query [Q, N].
        storage: Quantization of the documents.
    """
    method = run.method
    own = relevant.int().argmax(dim=1)  # a relevant document of each query
    dialled = method in (MMR, TOKENS) or method.kind == "dial"  # also measured in fewer dimensions and bits

    def view(name: str, q: Tensor, d: Tensor, stored: str = "", vectors: float | None = None) -> dict:
        """Return the quality of query vectors [Q, i, D] with document vectors [N, j, D]."""
        winners = {} if stored else {"winners": round(distinct_winners(q, d, own), 4)}
        stored = stored or storage
        kept = decode(*encode(d, stored), stored, d.shape[-1])
        scores = score(q, kept)  # [Q, N]
        ranked = relevant.gather(1, scores.topk(10, dim=1).indices)
        size = (d.shape[1] if vectors is None else vectors) * bytes_per_vector(stored, d.shape[-1])
        quality = ndcg(ranked, relevant.sum(dim=1), k=10)
        return {
            "view": name,
            "bytes": round(size),
            "vectors": [q.shape[1], d.shape[1] if vectors is None else round(vectors, 1)],
            "ndcg@10": round(quality.mean().item(), 4),
            "recall@1": round(ranked[:, 0].float().mean().item(), 4),
            **winners,
            "per_query": {"ndcg@10": pack(quality), "recall@1": pack(ranked[:, 0])},
        }

    if method.kind in ("mean", "last"):
        for dim in (*method.dims, queries.one.shape[1]):
            cut = [torch.nn.functional.normalize(side.one[:, None, :dim], dim=-1) for side in (queries, documents)]
            yield view(f"one vector, {dim} dimensions", *cut)
        return
    if method.kind in ("meta", "dial"):
        most_q, most_c = method.meta_tokens
        for r_q, r_c in ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64)):
            if r_q <= most_q and r_c <= most_c:
                pair = (queries.meta[:, :r_q], documents.meta[:, :r_c])
                yield view(f"({r_q},{r_c})", *pair)
                if dialled:
                    yield from byte_dial(run, f"({r_q},{r_c})", *pair, view)
    if method.kind in ("tokens", "agc", "dial"):
        every = [tokens[own] for tokens, own in zip(documents.tokens, documents.mask, strict=True)]
        longest = max(map(len, every))
        average = sum(map(len, every)) / len(every)
        for size in (*POOLED, longest):
            if size >= average and size != longest:
                continue
            if method.kind == "agc" and size != longest:
                made, present = pool_agc(documents, (size,))[0]
                made = torch.where(present[..., None], made, made[:, :1])  # a vector twice changes no score
            else:
                made = pool(every, size, "ward")
            name = f"all {average:.0f} tokens" if size == longest else f"pooled to {size}"
            vectors = sum(min(len(one), size) for one in every) / len(every)
            yield view(name, queries.tokens, made, vectors=vectors)
            if dialled:
                yield from byte_dial(run, name, queries.tokens, made, view, vectors)


def distinct_winners(queries: Tensor, documents: Tensor, own: Tensor) -> float:
    """Return the share of distinct winners: 1.0 if each query vector has its best product with a vector of its own.

    Args:
        queries: Query vectors [Q, i, D]; rows of zeros fill up.
        documents: Document vectors [N, j, D]; rows of zeros fill up.
        own: A relevant document of each query [Q].

    Returns:
        The mean, over the queries and their documents, of the number of document vectors that are the best for some
        query vector, divided by the number of query vectors or of document vectors, whichever is smaller.
    """
    shares = []
    for query, document in zip(queries, documents[own], strict=True):
        query, document = query[query.any(dim=1)], document[document.any(dim=1)]
        won = (query @ document.T).argmax(dim=1).unique()
        shares.append(len(won) / min(len(query), len(document)))
    return sum(shares) / len(shares)


def score(queries: Tensor, documents: Tensor, at_once: int = 64) -> Tensor:
    """Return MaxSim scores [Q, N], without the products of the rows of zeros that fill up short queries."""
    counts = queries.any(dim=2).sum(dim=1)
    scores = queries.new_empty(len(queries), len(documents))
    for part in counts.argsort().split(at_once):
        scores[part] = maxsim(queries[part, : int(counts[part].max())].contiguous(), documents)
    return scores


def byte_dial(
    run: Run, name: str, queries: Tensor, documents: Tensor, view: Callable, vectors: float | None = None
) -> Iterator[dict]:
    """Yield a view of vectors in fewer dimensions (PCA) and bits, for each combination that is not too large."""
    for dim in DIMENSIONS[run.task]:
        rotation = fit_pca(documents, dim)
        for stored in BITS:
            if (vectors or documents.shape[1]) * bytes_per_vector(stored, dim) > LARGEST:
                continue
            if run.method != MMR and (stored == "float32" or dim == DIMENSIONS[run.task][0]):
                continue  # never the best
            cut = (queries @ rotation, documents @ rotation)
            yield {**view(f"{name} {dim} dimensions {stored}", *cut, stored=stored, vectors=vectors), "dial": True}
