"""One face for the models that an index can be made with: MetaEmbed's, and any `MultiVectorEncoder`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..inputs_metaembed import InputPolicy, Item, is_single, naming, parse_all, read_image
from ..loading_metaembed import find_file, read_json
from ..modeling_metaembed import MetaEmbedModel, check_finite, execution_device
from ..processing_metaembed import default_device_cpu
from ..retrieval.pooling import pool

__all__ = ["Encoder", "load_encoder"]

_QUERY_VECTORS, _DOCUMENT_VECTORS = 32, 64  # of other models, whose own numbers depend on the input


class Encoder(ABC):
    """Encodes queries and documents for an index. Several threads may share one.

    Inputs are those of `MetaEmbedModel.encode_queries`, for every kind of model: a string is always text, whatever
    it looks like, and what may be read or fetched for an input is the `policy`.

    Attributes:
        name: What the model was loaded from.
        dim: D, the dimensions of every vector.
        query_vectors: The most vectors of a query, R_q.
        document_vectors: The vectors of a document, R_c.
        budgets: `(r_q, r_c)` pairs to offer, the smallest first and `(R_q, R_c)` last.
        ordered: Whether prefixes are trained, as those of Meta Tokens are. Otherwise they are ordered summaries of
            a document's vectors, made by the index's pooling `"nested"`.
        policy: What may be read and fetched for an input. Set it before the encoder meets inputs of strangers.
    """

    name: str
    dim: int
    query_vectors: int
    document_vectors: int
    budgets: list[tuple[int, int]]
    ordered: bool
    policy: InputPolicy

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model computes."""

    @property
    @abstractmethod
    def takes_images(self) -> bool:
        """Whether inputs may hold pictures."""

    @abstractmethod
    def prepare(self, side: str, inputs: list[Any], num_meta: int | None = None) -> Any:
        """Read and process inputs of `side` ("query" or "document") for `encode_prepared`, perhaps in another thread.

        Raises:
            TypeError: if an input is of a wrong type.
            ValueError: if an input is empty or cannot be read.
        """

    @abstractmethod
    def encode_prepared(self, prepared: Any) -> Tensor:
        """Run the model on what `prepare` returned: `[N, r, D]`, float32, on the CPU, in the inputs' order."""

    def encode_queries(self, inputs: Any, num_meta: int | None = None, *, batch_size: int = 32) -> Tensor:
        """Encode queries as `num_meta` vectors each, `R_q` by default.

        Where the encoder is not `ordered`, a query of at most `num_meta` tokens keeps them all, followed by zeros,
        which add nothing to a score; a longer one is pooled to `num_meta` summaries. So encode with the `r_q` that
        you will search with: the first rows of a longer encoding are other vectors.

        Args:
            inputs: One query or a list of them.
            num_meta: r, 1..R_q.
            batch_size: Number of inputs in a forward pass.

        Returns:
            Unit vectors `[N, r, D]`, float32, on the CPU; `[r, D]` for one query.

        Raises:
            TypeError: if an input is of a wrong type.
            ValueError: if a number is out of range, or an input is empty or cannot be read.
        """
        return self._encode("query", inputs, num_meta, batch_size)

    def encode_documents(self, inputs: Any, num_meta: int | None = None, *, batch_size: int = 32) -> Tensor:
        """Encode documents as `num_meta` vectors each, `R_c` by default; every prefix is an embedding too."""
        return self._encode("document", inputs, num_meta, batch_size)

    def _encode(self, side: str, inputs: Any, num_meta: int | None, batch_size: int) -> Tensor:
        most = self.query_vectors if side == "query" else self.document_vectors
        if num_meta is not None and (isinstance(num_meta, bool) or not 1 <= num_meta <= most):
            raise ValueError(f"num_meta of a {side} must be a whole number from 1 to {most}, not {num_meta!r}")
        items = iter(parse_all(inputs))
        found = [torch.empty(0, num_meta or most, self.dim)]
        while batch := list(islice(items, batch_size)):
            found.append(self.encode_prepared(self.prepare(side, batch, num_meta)))
        embeddings = torch.cat(found)
        return embeddings[0] if is_single(inputs) else embeddings

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, dim={self.dim}, budgets={self.budgets}, ordered={self.ordered})"


class _MetaEmbed(Encoder):
    ordered = True

    def __init__(self, model: MetaEmbedModel, name: str):
        config = model.config
        self.model, self.name = model.eval(), name
        self.dim = config.embedding_dim or config.hidden_size
        self.query_vectors, self.document_vectors = config.num_query_tokens, config.num_document_tokens
        self.budgets = [(r_q, r_c) for r_q, r_c in config.budgets]

    @property
    def policy(self) -> InputPolicy:
        return self.model.policy

    @policy.setter
    def policy(self, policy: InputPolicy) -> None:
        self.model.policy = policy

    @property
    def device(self) -> torch.device:
        return execution_device(self.model)

    @property
    def takes_images(self) -> bool:
        return self.model.processor.image_processor is not None

    def prepare(self, side: str, inputs: list[Any], num_meta: int | None = None) -> Any:
        processor = self.model.processor
        items = processor.parse(inputs)
        num_meta = num_meta or getattr(self, f"{side}_vectors")  # not the checkpoint's default, which may be fewer
        return [
            (rows, processor.process([items[i] for i in rows], side, num_meta, indices=rows))
            for rows in processor.group(items)
        ]

    @torch.no_grad()
    def encode_prepared(self, prepared: Any) -> Tensor:
        rows = [i for group, _ in prepared for i in group]
        found = []
        with default_device_cpu():
            for group, features in prepared:
                embeddings = self.model(**features.to(self.device)).embeddings
                found.append(check_finite(embeddings.to("cpu", torch.float32), group))
        return torch.cat(found)[torch.tensor(rows).argsort()]


class _MultiVector(Encoder):
    """A `MultiVectorEncoder`, whose inputs we read: it would take a text that looks like a URL for a picture."""

    ordered = False

    def __init__(self, model: Any, name: str):
        self.model, self.name, self.policy = model.eval(), name, InputPolicy()
        self.dim = model.get_embedding_dimension()
        self.query_vectors, self.document_vectors = _QUERY_VECTORS, _DOCUMENT_VECTORS
        self.budgets = [(self.query_vectors, r_c) for r_c in (1, 4, 8, 16, self.document_vectors)]

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def takes_images(self) -> bool:
        return "image" in self.model.modalities

    def prepare(self, side: str, inputs: list[Any], num_meta: int | None = None) -> Any:
        plain = []
        for index, item in enumerate(parse_all(inputs)):
            with naming(index):
                plain.append(self._plain(item))
        kinds = [frozenset(one) for one in plain]  # its processors take one kind a batch
        groups = [[i for i, kind in enumerate(kinds) if kind == one] for one in dict.fromkeys(kinds)]
        prompt = (self.model.prompts or {}).get(side)
        features = [self.model.preprocess([plain[i] for i in rows], prompt=prompt, task=side) for rows in groups]
        return side, num_meta or getattr(self, f"{side}_vectors"), list(zip(groups, features, strict=True))

    def _plain(self, item: Item) -> dict[str, Any]:
        """Return a dict of one text and/or one picture, read: what every such model takes."""
        if item.videos or item.audios or item.num_images > 1:
            raise ValueError(f"{self.name} takes one text and one picture at most, and no video or recording")
        parts = [part["text"] for message in item.messages for part in message["content"] if part["type"] == "text"]
        found = {"image": read_image(item.images[0], self.policy)} if item.images else {}
        return found | ({"text": "\n".join(parts)} if parts else {})

    @torch.inference_mode()
    def encode_prepared(self, prepared: Any) -> Tensor:
        side, vectors, groups = prepared
        found: dict[int, Tensor] = {}
        for rows, features in groups:
            on_device = {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in features.items()}
            output = self.model(on_device, task=side)
            masks = output["attention_mask"].bool()
            for i, tokens, mask in zip(rows, output["token_embeddings"], masks, strict=True):
                found[i] = tokens[mask].to("cpu", torch.float32)
        tokens_of = [found[i] for i in sorted(found)]
        for index, tokens in enumerate(tokens_of):
            check_finite(tokens[None], [index])
        if side == "document":
            return pool(tokens_of, vectors, "nested")
        return torch.stack([_at_most(tokens, vectors) for tokens in tokens_of])


def _at_most(tokens: Tensor, vectors: int) -> Tensor:
    """Return the tokens `[n, D]` of a query as `[vectors, D]`: pooled if they are more, else with zeros after them."""
    if len(tokens) > vectors:
        return pool([tokens], vectors, "nested")[0]
    return pad(tokens, (0, 0, 0, vectors - len(tokens)))


def load_encoder(
    model: Any,
    *,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype | None = None,
    policy: InputPolicy | None = None,
) -> Encoder:
    """Load the model of an index.

    Args:
        model: A folder or Hub id of a MetaEmbed checkpoint, or of any multi-vector model that sentence-transformers
            loads, such as a ColQwen or a ColPali; or a loaded `MetaEmbedModel` or `MultiVectorEncoder`.
        device: Where to compute. None: a GPU if there is one.
        revision: Branch, tag or commit of the Hub repository.
        trust_remote_code: Whether code of the repository may run. MetaEmbed checkpoints need none.
        dtype: Of the weights. None: that of the checkpoint.
        policy: What may be read and fetched for an input. None: `InputPolicy()`.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is incomplete, or not a multi-vector model.
    """
    where: dict[str, Any] = {} if revision is None else {"revision": revision}
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoder: Encoder
    if isinstance(model, MetaEmbedModel):
        encoder = _MetaEmbed(model, model.name_or_path)
    elif not isinstance(model, (str, Path)):
        encoder = _MultiVector(model, getattr(model.model_card_data, "base_model", None) or type(model).__name__)
    elif _config(model, **where).get("model_type") == "metaembed":
        loaded = MetaEmbedModel.from_pretrained(model, trust_remote_code=trust_remote_code, **where, **options)
        encoder = _MetaEmbed(loaded.to(device), str(model))
    else:
        from sentence_transformers import MultiVectorEncoder

        _check_multi_vector(model, **where)
        loaded = MultiVectorEncoder(
            str(model), device=str(device), trust_remote_code=trust_remote_code, model_kwargs=options, **where
        )
        encoder = _MultiVector(loaded, str(model))
    if policy is not None:
        encoder.policy = policy
    return encoder


def _config(model: str | Path, name: str = "config.json", **where: Any) -> dict[str, Any]:
    path = find_file(model, name, **where)
    return {} if path is None else read_json(path)


def _check_multi_vector(model: str | Path, **where: Any) -> None:
    """Raise unless all weights of a multi-vector model are there: sentence-transformers would add random ones."""
    kind = _config(model, "config_sentence_transformers.json", **where).get("model_type")
    architectures = _config(model, **where).get("architectures") or []
    native = any(name == "HF_ColBERT" or name.endswith("ForRetrieval") for name in architectures)
    if kind not in ("MultiVectorEncoder", "ColBERT") and not native:
        raise ValueError(
            f"{model} is neither a MetaEmbed checkpoint nor a multi-vector model of sentence-transformers; "
            "make a model of a backbone with MetaEmbedModel.from_backbone, and train it"
        )
