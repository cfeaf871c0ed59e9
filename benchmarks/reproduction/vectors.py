"""From inputs to vectors: Meta Tokens, the input's own tokens, one vector, and tokens pooled with gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .runs import Method


@dataclass
class Vectors:
    """What is made of a batch, each vector of length 1.

    Args:
        meta: Of the Meta Tokens [N, r, D].
        tokens: Of the input's own tokens [N, L, D]; zeros where there is none.
        mask: Where there is a token [N, L].
        one: One vector of each input [N, D]: the mean or the last token, not of length 1.
        saliency: How much the Meta Tokens attend to each token [N, L]; sums to 1.
    """

    meta: Tensor
    tokens: Tensor
    mask: Tensor
    one: Tensor | None = None
    saliency: Tensor | None = None


class Encoder(nn.Module):
    """A model whose last hidden states become the vectors of a method.

    Args:
        model: A MetaEmbed model.
        method: Says which vectors.
    """

    def __init__(self, model: Any, method: Method):
        super().__init__()
        self.model, self.method = model, method
        config = model.config
        self.meta_ids = {"query": config.query_token_ids, "document": config.document_token_ids}
        self.special = torch.tensor(sorted(model.processor.tokenizer.all_special_ids))
        self.image = getattr(model.backbone.config, "image_token_id", None)
        if method.kind == "agc":
            model.backbone.set_attn_implementation("eager")  # which alone returns its attention

    def forward(self, features: dict[str, Tensor], side: str) -> Vectors:
        """Return the vectors of a batch of model inputs of one side."""
        method, model = self.method, self.model
        count = method.meta_tokens[0 if side == "query" else 1]
        features, is_meta = keep_meta(features, self.meta_ids, side, count)
        options = {"output_attentions": True} if method.kind == "agc" and side == "document" else {}
        output = model.backbone(**features, **options, **({"use_cache": False} if model._takes_use_cache else {}))
        hidden = output.last_hidden_state  # [N, L, hidden]
        ids, seen = features["input_ids"], features["attention_mask"].bool()
        own = (
            ids == self.image
            if self.image is not None and (ids == self.image).any()
            else ~torch.isin(ids, self.special)
        )
        own &= seen & ~is_meta
        meta = hidden[is_meta].view(len(ids), -1, hidden.shape[-1]) if count else hidden[:, :0]
        if model.projection is not None:
            meta, tokens = model.projection(meta), model.projection(hidden)
        else:
            tokens = hidden if model.token_projection is None else model.token_projection(hidden)
        one, saliency = None, None
        if method.kind == "mean":
            one = ((hidden * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)).float()
        elif method.kind == "last":
            last = seen.shape[1] - 1 - seen.flip(1).int().argmax(dim=1)
            one = hidden[torch.arange(len(ids)), last].float()
        if options:
            paid = output.attentions[-1].float().mean(dim=1)  # [N, L, L]
            paid = (paid * is_meta[..., None]).sum(dim=1) * own
            saliency = paid / paid.sum(dim=1, keepdim=True)
        tokens = normalize(tokens.float(), dim=-1) * own[..., None]
        return Vectors(normalize(meta.float(), dim=-1), tokens, own, one, saliency)


def keep_meta(
    features: dict[str, Tensor], meta_ids: dict[str, list[int]], side: str, count: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs with only the first `count` Meta Tokens of their side, and where these are [N, L].

    Those of the other side, which a document may hold before its own, stay if any of its own do.
    """
    ids, first = features["input_ids"], meta_ids[side][0]
    dropped = (ids >= first + count) & (ids <= meta_ids[side][-1])
    if not count:
        dropped |= (ids >= min(map(min, meta_ids.values()))) & (ids <= max(map(max, meta_ids.values())))
    kept = features["attention_mask"].bool() & ~dropped
    order = kept.int().argsort(dim=1, descending=True, stable=True)[:, : int(kept.sum(dim=1).max())]
    tensors = {name: value for name, value in features.items() if isinstance(value, Tensor)}
    rows = {name: value.gather(1, order) if value.shape == ids.shape else value for name, value in tensors.items()}
    rows["attention_mask"] = kept.gather(1, order).to(features["attention_mask"].dtype)
    ids = rows["input_ids"]
    return rows, (ids >= first) & (ids < first + count) & rows["attention_mask"].bool()


def pool_ward(vectors: Vectors, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Return the means of Ward's clusters at each size: vectors [N, k, D] and whether there is one [N, k]."""
    from scipy.cluster.hierarchy import fcluster, ward

    tokens, lengths = vectors.tokens, vectors.mask.sum(dim=1).tolist()
    members = [torch.zeros(len(tokens), size, tokens.shape[1]) for size in sizes]
    for i, length in enumerate(lengths):
        places = vectors.mask[i].nonzero().squeeze(1)
        tree = ward(tokens[i, places].detach().double().numpy()) if length > 1 else None
        for size, member in zip(sizes, members, strict=True):
            clusters = fcluster(tree, size, "maxclust") - 1 if length > size else range(length)
            member[i, torch.as_tensor(list(clusters)), places] = 1
    return [(normalize(member @ tokens, dim=-1), member.any(dim=2)) for member in members]


def pool_agc(vectors: Vectors, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Return attention-guided clusters (arXiv 2602.21202) at each size: vectors [N, k, D] and whether there is one.

    The `k` most salient tokens are the centres, every token joins its most similar centre, and a cluster is the mean
    of its tokens weighted by saliency.
    """
    tokens, saliency = vectors.tokens, vectors.saliency
    pooled = []
    for size in sizes:
        best, centres = saliency.topk(min(size, tokens.shape[1]), dim=1)  # [N, k]
        similar = tokens @ tokens.gather(1, centres[..., None].expand(-1, -1, tokens.shape[2])).transpose(1, 2)
        similar = similar.masked_fill(best[:, None] <= 0, -torch.inf)  # fewer tokens than centres
        joined = nn.functional.one_hot(similar.argmax(dim=2), similar.shape[2])  # [N, L, k]
        member = joined.transpose(1, 2) * saliency[:, None]  # zero where there is no token
        pooled.append((normalize(member @ tokens, dim=-1), member.sum(dim=2) > 0))
    return pooled
