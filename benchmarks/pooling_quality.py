"""What pooling to fewer vectors costs a token-level model, next to MaxSim with all of its tokens.

    python benchmarks/pooling_quality.py            prints a table, in several minutes; [--steps 500]

Trains a tiny Qwen2.5-VL as ColPali is trained: the embeddings of a picture are those of its 36 tokens, those of a
query are those of its text, and the loss is the contrastive one of sentence-transformers over MaxSim of all of them.
The task is the quickstart's, so the test scenes were not trained on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
)
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import set_seed

from metaembed import MetaEmbedModel
from metaembed.evaluation.metrics import ndcg
from metaembed.evaluation.tables import markdown_table
from metaembed.retrieval.pooling import pool
from metaembed.sentence_metaembed import MetaEmbedTransformer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from quickstart import TEST_SEED
from scenes import make_task
from tiny_backbone import build_backbone, build_processor

METHODS = ("nested", "tree", "ward")
VECTORS = (1, 2, 4, 8, 16)
SCALE = 6.0  # of the scores: about 1 / 0.03, divided by the root of the number of a query's tokens


class TokenTransformer(MetaEmbedTransformer):
    """Embeds an input as the last hidden states of its picture's tokens, or of its text's."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return the features with `token_embeddings` `[N, L, D]` and their mask `[N, L]`."""
        config, ids = self.model.config, features["input_ids"]
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
        inputs = {name: features[name] for name in names if name in features}
        hidden = self.model.backbone(**inputs, use_cache=False).last_hidden_state
        picture = ids == config.backbone_config.image_token_id
        meta = torch.tensor([*config.query_token_ids, *config.document_token_ids])
        text = features["attention_mask"].bool() & ~torch.isin(ids, meta)
        features["token_embeddings"] = normalize(hidden.float(), dim=-1)
        features["attention_mask"] = torch.where(picture.any(dim=1, keepdim=True), picture, text)
        return features


def train(texts: list[str], pictures: list[Any], seed: int, batch_size: int, steps: int) -> MultiVectorEncoder:
    """Train a token-level model on pairs."""
    set_seed(seed)
    processor = build_processor(texts, patch_size=4, size={"shortest_edge": 16 * 16, "longest_edge": 1024 * 1024})
    model = MetaEmbedModel.from_backbone(build_backbone(processor, seed=seed), processor=processor)
    encoder = MultiVectorEncoder(modules=[TokenTransformer(model)], similarity_fn_name="maxsim")
    with tempfile.TemporaryDirectory() as folder:
        settings = MultiVectorEncoderTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=30,
            weight_decay=0.01,
            adam_beta2=0.98,
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        dataset = Dataset.from_dict({"query": texts, "positive": pictures})
        loss = MultiVectorMultipleNegativesRankingLoss(encoder, scale=SCALE)
        MultiVectorEncoderTrainer(model=encoder, args=settings, train_dataset=dataset, loss=loss).train()
    return encoder.eval()


def score(queries: list[Tensor], documents: Tensor) -> Tensor:
    """Return MaxSim `[Q, N]` of ragged queries and documents `[N, r, D]`."""
    padded = pad_sequence(queries, batch_first=True)  # zeros, which score 0
    parts = [torch.einsum("qid,njd->qnij", padded, part).amax(dim=3).sum(dim=2) for part in documents.split(100)]
    return torch.cat(parts, dim=1)


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    scenes, _, texts = make_task(arguments.steps * arguments.batch_size, arguments.seed)
    pictures = [scene.draw(16) for scene in scenes]
    encoder = train(texts, pictures, arguments.seed, arguments.batch_size, arguments.steps)
    trained = time.perf_counter() - started

    scenes, wanted, texts = make_task(arguments.scenes, TEST_SEED)
    count = min(arguments.queries, len(texts))
    documents = torch.stack([torch.as_tensor(d) for d in encoder.encode_document([s.draw(16) for s in scenes])])
    queries = [torch.as_tensor(q) for q in encoder.encode_query(texts[:count])]
    relevant = torch.tensor([[names <= scene.pictograms for scene in scenes] for names in wanted[:count]])

    def quality(kept: Tensor) -> list[str]:
        found = score(queries, kept).topk(10, dim=1).indices
        hits = relevant.gather(1, found)
        return [f"{hits[:, 0].float().mean():.3f}", f"{ndcg(hits, relevant.sum(dim=1), 10).mean():.3f}"]

    vectors = documents.shape[1]
    rows = [["all", str(vectors), *quality(documents)]]
    nested = {method: pool(documents, max(VECTORS), method) for method in METHODS if method != "ward"}
    for size in VECTORS:
        for method in METHODS:
            kept = pool(documents, size, method) if method == "ward" else nested[method][:, :size]
            rows.append([method, str(size), *quality(kept)])
    rows += [["first tokens", str(size), *quality(documents[:, :size])] for size in VECTORS]
    rows.sort(key=lambda row: -int(row[1]))
    print(
        f"\nToken-level model, {vectors} tokens a picture, {arguments.steps} steps of {arguments.batch_size}, seed "
        f"{arguments.seed}, trained in {trained:.0f} s; {len(scenes):,} unseen scenes, {count} queries, all tokens "
        "of a query.\n"
    )
    print(markdown_table(["pooling", "vectors", "recall@1", "nDCG@10"], rows))


if __name__ == "__main__":
    main()
