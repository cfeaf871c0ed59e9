"""The MMR loss equals the paper's formula written out, in value and in gradient."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments

from metaembed.sentence_metaembed import to_multi_vector_encoder
from metaembed.training.losses import MMRLoss

QUERIES = ["a red apple", "a blue rocket over the moon", "what is on the table?"]


@pytest.fixture
def encoder(qwen):
    return to_multi_vector_encoder(copy.deepcopy(qwen).double())


def columns(encoder, *documents):
    texts = [(QUERIES, "query"), *((column, "document") for column in documents)]
    return [encoder.preprocess(column, task=side) | {"task": side} for column, side in texts]


def written_out(queries, documents, budgets, weights, temperature, divide):
    """`L = sum_g w_g InfoNCE_g`, one loop per index. Documents are those of column 0 first, then column 1, ..."""
    total = 0.0
    for (r_q, r_c), weight in zip(budgets, weights, strict=True):
        for q, query in enumerate(queries):
            logits = []
            for document in documents:
                score = sum(max(query[i] @ document[j] for j in range(r_c)) for i in range(r_q))
                logits.append(score / divide(r_q) / temperature)
            total += weight * (torch.logsumexp(torch.stack(logits), 0) - logits[q]) / len(queries)
    return total


DIVISORS = {"sum": lambda r: 1, "mean": lambda r: r, "sqrt": math.sqrt}


@pytest.mark.parametrize("normalize", DIVISORS)
@pytest.mark.parametrize("hard_negatives", [0, 2])
def test_loss_and_gradients_equal_the_formula_written_out(encoder, pictures, normalize, hard_negatives):
    documents = [pictures, ["a rocket", "the moon", "a key"], [{"image": p, "text": "no"} for p in pictures]]
    features = columns(encoder, *documents[: 1 + hard_negatives])
    budgets, weights = [(1, 1), (2, 4), (3, 8)], [1.0, 0.5, 2.0]
    loss = MMRLoss(encoder, budgets, weights, temperature=0.05, normalize=normalize)
    parts = loss([dict(column) for column in features])
    assert list(parts) == ["loss_1x1", "loss_2x4", "loss_3x8"]
    actual = sum(parts.values())
    gradients = torch.autograd.grad(actual, list(encoder.parameters()), allow_unused=True)

    queries, *others = [encoder(dict(column))["token_embeddings"] for column in features]
    expected = written_out(queries, torch.cat(others), budgets, weights, 0.05, DIVISORS[normalize])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    reference = torch.autograd.grad(expected, list(encoder.parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in gradients)
    for ours, theirs in zip(gradients, reference, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_the_default_budgets_are_the_models(encoder):
    parts = MMRLoss(encoder)(columns(encoder, QUERIES))
    assert list(parts) == ["loss_1x1", "loss_2x4", "loss_4x8", "loss_8x16", "loss_16x64"]


def test_one_forward_pass_per_column_serves_all_budgets(encoder):
    calls = []
    encoder[0].register_forward_hook(lambda *_: calls.append(1))
    MMRLoss(encoder)(columns(encoder, QUERIES))
    assert len(calls) == 2


def test_one_step_of_the_trainer_logs_every_budget_and_trains_meta_tokens(encoder, pictures, tmp_path):
    encoder.float()
    ids = encoder[0].model.config.query_token_ids + encoder[0].model.config.document_token_ids
    before = encoder[0].model.get_input_embeddings().weight[ids].clone()
    settings = MultiVectorEncoderTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, logging_steps=1, report_to="none", save_strategy="no", learning_rate=0.1
    )
    dataset = Dataset.from_dict({"query": QUERIES, "positive": pictures, "negative": pictures[::-1]})
    trainer = MultiVectorEncoderTrainer(model=encoder, args=settings, train_dataset=dataset, loss=MMRLoss(encoder))
    trainer.train()
    logged = trainer.state.log_history[0]
    parts = [logged[f"loss_{q}x{d}"] for q, d in encoder[0].model.config.budgets]
    assert logged["loss"] == pytest.approx(sum(parts), rel=1e-3)
    after = encoder[0].model.get_input_embeddings().weight[ids]
    moved = (after - before).abs().amax(dim=1) > 0  # [80]; of the documents', those that were ever a maximum
    assert moved[:16].all() and moved[16:].sum() > 16


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budgets": [(2, 4), (1, 1)]}, ValueError, "not nested"),
        ({"budgets": [(17, 64)]}, ValueError, "between 1 and 16"),
        ({"budgets": []}, TypeError, "non-empty"),
        ({"budgets": [3]}, TypeError, "pair"),
        ({"weights": [1.0]}, ValueError, "weights must be 5"),
        ({"weights": [0.0] * 5}, ValueError, "not all 0"),
        ({"weights": [-1.0, 1, 1, 1, 1]}, ValueError, "weights"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"normalize": "max"}, ValueError, "normalize"),
    ],
)
def test_unusable_settings_are_errors(encoder, settings, error, message):
    with pytest.raises(error, match=message):
        MMRLoss(encoder, **settings)


def test_an_encoder_of_another_model_is_an_error():
    with pytest.raises(TypeError, match="MetaEmbed encoders"):
        MMRLoss([torch.nn.Linear(2, 2)])


def test_training_with_fewer_vectors_than_the_budgets_need_is_an_error(encoder):
    encoder[0].query_num_meta = 4
    with pytest.raises(ValueError, match="query_num_meta"):
        MMRLoss(encoder)(columns(encoder, QUERIES))
