"""MTEB's retrieval tasks (text, image, both) at a chosen budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mteb.models import ModelMeta, MultiVectorWrapper
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder


class BudgetModel(MultiVectorWrapper):
    """An encoder for `mteb.evaluate`, at one budget; MTEB keeps the results of each budget apart.

    Args:
        encoder: The encoder.
        budget: `(r_q, r_c)`: vectors of a query and of a document.
        name: What MTEB files the results under; a Hub id.
        revision: The commit of the model, of which MTEB keeps the results apart too.
        **kwargs: For `mteb.models.MultiVectorWrapper`.

    Raises:
        ValueError: If the model has fewer vectors than the budget asks for.

    Example:
        >>> model = BudgetModel(encoder, (4, 8), name="you/your-metaembed", revision="main")
        >>> mteb.evaluate(model, mteb.get_benchmark("ViDoRe(v2)").tasks)
    """

    def __init__(
        self, encoder: MultiVectorEncoder, budget: tuple[int, int], name: str, revision: str = "local", **kwargs: Any
    ):
        super().__init__(encoder, **kwargs)
        processor = encoder[0].processor
        sides = zip((PromptType.query, PromptType.document), ("query", "document"), budget, strict=True)
        self.num_meta = {kind: processor.resolve_num_meta(side, size) for kind, side, size in sides}
        modalities = ["text"] if processor.image_processor is None else ["text", "image"]
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites=dict(
                name=name if "/" in name else f"local/{name}",
                revision=revision,
                loader=type(self),
                embed_dim=encoder.get_embedding_dimension(),
                similarity_fn_name=ScoringFunction.MAX_SIM,
                framework=["Sentence Transformers", "PyTorch"],
                model_type=["late-interaction"],
                modalities=modalities,
                experiment_kwargs={"query_vectors": budget[0], "document_vectors": budget[1]},
            )
        )

    def _encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **kwargs: Any) -> Any:
        """Encode with the budget's number of vectors of the side."""
        if prompt_type is None:
            raise ValueError("this task does not say which inputs are queries: only retrieval tasks can be run.")
        return super()._encode(inputs, prompt_type=prompt_type, num_meta=self.num_meta[prompt_type], **kwargs)
