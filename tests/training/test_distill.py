"""A student learns its teacher's query vectors over documents that stay as they are, and saves as any model."""

import copy

import pytest
import torch
from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments

from metaembed import MetaEmbedModel
from metaembed.training.distill import QueryDistillationLoss, query_dataset, shallow

QUERIES = ["a red apple", "a key", "a cat face on the table", "a guitar and a blue rocket"]


def test_a_shallow_student_has_the_first_layers_and_saves_whole(qwen, tmp_path):
    student = shallow(qwen, 1)
    whole, part = qwen.state_dict(), student.state_dict()
    assert len(student.backbone.language_model.layers) == 1
    assert len(qwen.backbone.language_model.layers) == 2
    assert all(torch.equal(whole[name], value) for name, value in part.items())
    assert torch.equal(shallow(qwen, 2).encode_queries(QUERIES), qwen.encode_queries(QUERIES))
    student.save_pretrained(tmp_path)
    reloaded = MetaEmbedModel.from_pretrained(tmp_path)
    assert torch.equal(reloaded.encode_queries(QUERIES), student.encode_queries(QUERIES))
    for layers in (0, 3):
        with pytest.raises(ValueError, match="layers"):
            shallow(qwen, layers)


def test_training_brings_the_student_to_its_teacher(qwen, tmp_path):
    documents = qwen.encode_documents(["a red apple", "a key on a table", "the moon"])
    student = shallow(qwen, 1)
    encoder = student.to_sentence_transformers(device="cpu")
    before = (student.encode_queries(QUERIES) * qwen.encode_queries(QUERIES)).sum(dim=-1).mean()
    settings = MultiVectorEncoderTrainingArguments(
        output_dir=str(tmp_path), max_steps=15, learning_rate=3e-3, report_to="none", save_strategy="no", use_cpu=True
    )
    loss = QueryDistillationLoss(encoder, documents)
    data = query_dataset(qwen, QUERIES * 4)
    MultiVectorEncoderTrainer(model=encoder, args=settings, train_dataset=data, loss=loss).train()
    after = (student.encode_queries(QUERIES) * qwen.encode_queries(QUERIES)).sum(dim=-1).mean()
    assert after > before + 0.05


def test_the_loss_of_the_teacher_itself_is_zero(qwen):
    encoder = copy.deepcopy(qwen).to_sentence_transformers(device="cpu")
    loss = QueryDistillationLoss(encoder, qwen.encode_documents(["a key", "the moon"]))
    features = encoder.preprocess(QUERIES, task="query")
    parts = loss([features], qwen.encode_queries(QUERIES).flatten(1))
    assert all(abs(part.item()) < 1e-4 for part in parts.values())
    assert set(parts) == {"loss_vectors", "loss_ranking"}
    assert set(QueryDistillationLoss(encoder)([features], qwen.encode_queries(QUERIES).flatten(1))) == {"loss_vectors"}


def test_vectors_that_do_not_fit_are_an_error(qwen):
    encoder = copy.deepcopy(qwen).to_sentence_transformers(device="cpu")
    with pytest.raises(ValueError, match=r"documents must be \[M, 64, 64\]"):
        QueryDistillationLoss(encoder, torch.zeros(2, 8, 64))
    with pytest.raises(ValueError, match="temperature"):
        QueryDistillationLoss(encoder, temperature=0)
    with pytest.raises(ValueError, match="num_query_tokens"):
        QueryDistillationLoss(encoder)([encoder.preprocess(QUERIES, task="query")], torch.zeros(4, 10))
