"""MTEB's retrieval tasks (text, images, videos, and mixtures) at chosen budgets."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mteb
from mteb.models import ModelMeta, MultiVectorWrapper
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from .tables import markdown_table

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

Budget = tuple[int, int]
Row = tuple[str, Budget, float]  # task, budget, main score


class BudgetModel(MultiVectorWrapper):
    """An encoder for `mteb.evaluate`, at one budget. MTEB keeps the results of each budget apart.

    Args:
        encoder: The encoder.
        budget: `(r_q, r_c)`: vectors of a query and of a document.
        name: The name that MTEB keeps the results under: a Hub id.
        revision: The commit of the model. MTEB keeps the results of each apart too.
        **kwargs: For `mteb.models.MultiVectorWrapper` (`num_frames` or `fps` of videos, ...).

    Raises:
        ValueError: If the model has fewer vectors than the budget asks for.

    Example:
        >>> model = BudgetModel(encoder, (4, 8), name="you/your-metaembed", revision="main")
        >>> mteb.evaluate(model, mteb.get_benchmark("ViDoRe(v2)").tasks)
    """

    def __init__(self, encoder: MultiVectorEncoder, budget: Budget, name: str, revision: str = "local", **kwargs: Any):
        super().__init__(encoder, **kwargs)
        processor = encoder[0].processor
        sides = zip((PromptType.query, PromptType.document), ("query", "document"), budget, strict=True)
        self.num_meta = {kind: processor.resolve_num_meta(side, size) for kind, side, size in sides}
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites=dict(
                name=name if "/" in name else f"local/{name}",
                revision=revision,
                loader=type(self),
                embed_dim=encoder.get_embedding_dimension(),
                similarity_fn_name=ScoringFunction.MAX_SIM,
                framework=["Sentence Transformers", "PyTorch"],
                model_type=["late-interaction"],
                modalities=[kind for kind in encoder[0].modalities if kind in ("text", "image", "video")],
                experiment_kwargs={"query_vectors": budget[0], "document_vectors": budget[1]},
            )
        )

    def _encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **kwargs: Any) -> Any:
        """Encode with the budget's number of vectors of the side."""
        if prompt_type is None:
            raise ValueError("this task does not say which inputs are queries: only retrieval tasks can be run.")
        num_meta = self.num_meta[prompt_type]
        return super()._encode(FramesLast(inputs), prompt_type=prompt_type, num_meta=num_meta, **kwargs)


class FramesLast:
    """A data loader of MTEB with videos as [frames, height, width, 3], which models take; MTEB's have channels first.

    MTEB sets `collate_fn`, which decodes the videos, on the loader just before it reads it.
    """

    def __init__(self, loader: Any):
        self.loader = loader
        self.dataset = loader.dataset
        self.collate_fn = loader.collate_fn

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.loader.collate_fn = self.collate_fn
        for batch in self.loader:
            if "video" in batch:
                frames = [None if video is None else video.permute(0, 2, 3, 1) for video in batch["video"]]
                batch = {**batch, "video": frames}
            yield batch


def public_tasks(benchmarks: Iterable[str]) -> list[mteb.AbsTask]:
    """Return the tasks of benchmarks with public data, and print the names of the others."""
    tasks = [task for name in benchmarks for task in mteb.get_benchmark(name).tasks]
    if private := [task.metadata.name for task in tasks if not task.metadata.is_public]:
        print(f"left out, since their data are not public: {', '.join(private)}", file=sys.stderr)
    return [task for task in tasks if task.metadata.is_public]


def evaluate(
    encoder: MultiVectorEncoder,
    tasks: Sequence[mteb.AbsTask],
    budgets: Iterable[Budget],
    name: str,
    revision: str = "local",
    output: str | Path = "outputs/mteb",
    batch_size: int = 8,
) -> tuple[list[Row], list[str]]:
    """Run tasks at each of several budgets. A task that fails does not stop the others.

    Args:
        encoder: The encoder.
        tasks: Retrieval tasks.
        budgets: `(r_q, r_c)` pairs.
        name: The name that MTEB keeps the results under: a Hub id or a folder.
        revision: The commit of the model. "local": cached tasks are run again, since a folder may have changed.
        output: Folder of MTEB's result cache.
        batch_size: Inputs encoded at a time.

    Returns:
        Task, budget and main score of each that ran; and of each that failed, its name and the error.
    """
    rows: list[Row] = []
    failures = []
    for budget in budgets:
        results = mteb.evaluate(
            BudgetModel(encoder, budget, name, revision),
            tasks,
            cache=mteb.ResultCache(output),
            overwrite_strategy="always" if revision == "local" else "only-missing",
            encode_kwargs={"batch_size": batch_size},
            co2_tracker=False,
            raise_error=False,  # it would lose the other tasks' results
        )
        rows += [(result.task_name, budget, float(result.get_score())) for result in results]
        failures += [f"{error.task_name} at {budget}: {error.exception}" for error in results.exceptions or ()]
    return rows, failures


def table(rows: Iterable[Row]) -> str:
    """Return a Markdown table: a row per task, a column per budget, and means of tasks that ran at every budget."""
    scores: dict[str, dict[Budget, float]] = {}
    for task, budget, score in rows:
        scores.setdefault(task, {})[budget] = score
    budgets = list(dict.fromkeys(budget for found in scores.values() for budget in found))
    lines = [
        [task, *(f"{found[budget]:.4f}" if budget in found else "failed" for budget in budgets)]
        for task, found in scores.items()
    ]
    if whole := [found for found in scores.values() if len(found) == len(budgets)]:
        means = (sum(found[budget] for found in whole) / len(whole) for budget in budgets)
        lines.append(["mean", *(f"{mean:.4f}" for mean in means)])
    return markdown_table(["task", *(f"({r_q}, {r_c})" for r_q, r_c in budgets)], lines)
