"""Every saved folder has a complete card, which reports only measured results."""

import re

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, parse_eval_result_entries
from sentence_transformers import MultiVectorEncoder, MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments
from sentence_transformers.multi_vector_encoder.model_card import MultiVectorEncoderModelCardData
from tiny_models import WORDS, picture, save_tiny_backbone, tiny_encoder, tiny_model

from metaembed import MetaEmbedModel
from metaembed.cards import adopt_card
from metaembed.cards.card import MARK, TEMPLATE, fingerprint, hub_id, sample_of, write_eval_results
from metaembed.evaluation.budgets import BudgetEvaluator
from metaembed.training.lora import lora_config
from metaembed.training.losses import CachedMMRLoss


def check(folder):
    """Load the card of `folder` and check the parts that every card must have."""
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "visual-document-retrieval"
    assert {"metaembed", "multi-vector", "late-interaction", "sentence-transformers"} <= set(card.data.tags)
    for text in ("MultiVectorEncoder(", "AutoModel.from_pretrained(", "trust_remote_code=True", "@inproceedings{xiao"):
        assert text in card.text
    assert not re.search(r"{{|{%|\bNone\b", card.text), card.text
    assert "| 4 | 8 | 1,024 |" in card.text
    return card


def check_examples_run(card, folder):
    """Run both examples of a card, unchanged, on the folder."""
    examples = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(re.sub(r'"[^"\n]*", trust_remote_code', f'r"{folder}", trust_remote_code', example), {})


def pets(encoder):
    corpus = {"a": "cat", "b": "dog"}
    return BudgetEvaluator({"q": "cat"}, corpus, {"q": {"a"}}, encoder[0].model.config.budgets, name="pets")


def train(encoder, folder):
    pairs = Dataset.from_dict({"query": WORDS, "positive": [picture(i) for i in range(16)]})
    settings = MultiVectorEncoderTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        report_to="none",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        dataloader_pin_memory=False,
    )
    MultiVectorEncoderTrainer(
        model=encoder, args=settings, train_dataset=pairs, loss=CachedMMRLoss(encoder), evaluator=pets(encoder)
    ).train()
    return folder / "checkpoint-2"


def test_the_card_of_a_saved_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "saved")
    card = check(tmp_path / "saved")
    assert "not measured" in card.text and "Training" not in card.text and card.data.base_model is None
    check_examples_run(card, tmp_path / "saved")


@pytest.mark.parametrize("again", [False, True])
def test_the_card_that_the_trainer_writes(tmp_path, again):
    encoder = tiny_encoder()
    if again:  # trained after sentence-transformers itself has loaded it
        encoder.save_pretrained(str(tmp_path / "first"))
        encoder = MultiVectorEncoder(str(tmp_path / "first"), trust_remote_code=True, device="cpu")
    encoder.model_card_data.license = "apache-2.0"
    folder = train(encoder, tmp_path / "run")
    card = check(folder)
    assert card.data.license == "apache-2.0"
    assert "- `learning_rate`: 0.0003" in card.text and "CachedMMRLoss" in card.text
    row = next(line for line in card.text.splitlines() if line.startswith("| 4 | 8 | 1,024 |"))
    header = next(line for line in card.text.splitlines() if line.startswith("| query vectors"))
    assert len(row.split("|")) == len(header.split("|")) and "ndcg@10" in header
    assert f"torch {torch.__version__}." in card.text
    assert "pets: 1 queries and 2 documents" in card.text and "not measured" not in card.text
    assert not (folder / "assets").exists(), "the repository contains pictures of the training data"
    check_examples_run(card, folder)


def test_training_pictures_stay_out_of_the_repository_however_often_it_is_saved(tmp_path):
    encoder = tiny_encoder()
    encoder.model_card_data.generate_widget_examples = True
    train(encoder, tmp_path / "run")
    for name in ("once", "twice"):
        encoder.save_pretrained(str(tmp_path / name))
        assert "CachedMMRLoss" in (tmp_path / name / "README.md").read_text()
    assert not list(tmp_path.rglob("assets"))


def test_a_card_is_of_the_model_that_was_saved_last(tmp_path):
    tiny_model(embedding_dim=24).save_pretrained(tmp_path)
    tiny_model(embedding_dim=8, num_query_tokens=2, num_document_tokens=4).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "of 8 dimensions" in text and "as 1 to 2 vectors" in text and "1 to 4," in text


def test_a_card_that_a_person_wrote_is_kept(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace(MARK, "I have changed this."))
    tiny_model(embedding_dim=8).save_pretrained(tmp_path)
    assert "I have changed this." in path.read_text() and "of 32 dimensions" in path.read_text()
    encoder = MultiVectorEncoder(str(tmp_path), trust_remote_code=True, device="cpu")
    encoder.save_pretrained(str(tmp_path / "again"))
    assert "I have changed this." in (tmp_path / "again" / "README.md").read_text()


def test_the_card_of_a_model_that_was_evaluated_after_loading(tmp_path):
    tiny_model().save_pretrained(tmp_path / "saved")
    given = MultiVectorEncoderModelCardData(language="en", tags=["pictograms"])
    encoder = MultiVectorEncoder(str(tmp_path / "saved"), trust_remote_code=True, device="cpu", model_card_data=given)
    pets(encoder)(encoder)
    encoder.save_pretrained(str(tmp_path / "evaluated"))
    card = check(tmp_path / "evaluated")
    assert "pets: 1 queries and 2 documents" in card.text and "not measured" not in card.text
    assert card.data.language == ["en"] and "pictograms" in card.data.tags


def test_the_card_names_its_repository(tmp_path):
    tiny_model().save_pretrained(tmp_path / "first")
    encoder = MultiVectorEncoder(str(tmp_path / "first"), trust_remote_code=True, device="cpu")
    encoder.model_card_data.set_model_id("you/second")  # as push_to_hub does
    encoder.save_pretrained(str(tmp_path / "second"))
    text = (tmp_path / "second" / "README.md").read_text()
    assert text.count('("you/second"') == 2 and "first" not in text


@pytest.mark.parametrize("entry_point", ["AutoModel", "MultiVectorEncoder"])
def test_results_are_kept_as_long_as_the_weights_are_the_same(tmp_path, entry_point):
    encoder = tiny_encoder()
    encoder.model_card_data.license = "mit"
    first = train(encoder, tmp_path / "run")

    def save(name, change=lambda model: None):
        if entry_point == "AutoModel":
            model = MetaEmbedModel.from_pretrained(first)
            change(model)
            model.save_pretrained(tmp_path / name)
        else:
            again = MultiVectorEncoder(str(first), trust_remote_code=True, device="cpu")
            change(again[0].model)
            again.save_pretrained(str(tmp_path / name))
        return check(tmp_path / name)

    def sections(card):
        return re.findall(r"## (?:Budgets|Training).*?(?=\n## )", card.content, re.DOTALL)

    same, other = save("same"), save("other", lambda model: torch.nn.init.normal_(model.get_input_embeddings().weight))
    instructed = save("instructed", lambda model: setattr(model.config, "query_instruction", "Find it."))
    measured = sections(ModelCard.load(first / "README.md"))
    assert len(measured) == 2 and "pets: 1 queries" in measured[0] and "learning_rate" in measured[1]
    assert sections(same) == measured and same.data.license == "mit" and "(mit)" in same.text
    assert set(same.data.tags) == set(ModelCard.load(first / "README.md").data.tags)
    assert '("same"' in same.text and "checkpoint-2" not in same.text
    for card in (other, instructed):
        assert "not measured" in card.text and card.data.license is None and "learning_rate" not in card.text


def test_results_from_before_more_training_are_dropped(tmp_path):
    encoder = tiny_encoder()
    tokens = encoder[0].model.get_input_embeddings().weight
    measured = tokens.detach().clone()
    pets(encoder)(encoder)
    with torch.no_grad():
        tokens[-1, -1] += 0.01
    encoder.save_pretrained(str(tmp_path / "trained"))
    assert "not measured" in check(tmp_path / "trained").text
    tokens.data = measured  # as the trainer does at the end, to keep the best checkpoint
    encoder.save_pretrained(str(tmp_path / "best"))
    assert "pets: 1 queries" in check(tmp_path / "best").text


@pytest.mark.parametrize(
    "shape", [(700, 300), (300, 700), (512, 512), (9, 100, 90), (70_000,), (1, 70_000), (640, 14)]
)
def test_a_change_of_any_row_changes_the_fingerprint(shape):
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    row = torch.arange(layer.weight.numel()).view(shape) // shape[-1]
    assert len(sample_of(row).unique()) == row.max() + 1
    before = fingerprint(layer, [None, None])
    assert fingerprint(layer, [None, None]) == before != fingerprint(layer, ["Find it.", None])
    with torch.no_grad():
        layer.weight[len(layer.weight) // 2] += 1
    assert fingerprint(layer, [None, None]) != before


def test_a_fingerprint_reads_a_thousandth_of_a_large_weight():
    table = torch.empty(152_064, 3584, device="meta")
    assert sample_of(table).numel() < table.numel() / 1000


def test_no_results_are_reported_for_weights_that_cannot_be_read():
    assert fingerprint(torch.nn.Linear(2, 2, device="meta"), [None, None]) is None
    assert fingerprint(torch.nn.Module(), [None, None]) is None


def test_an_encoder_adopts_the_card_once_whichever_version_did_it_first():
    encoder = tiny_encoder()
    ours = encoder.model_card_data
    assert ours.template_path == TEMPLATE
    encoder._model_card_text = MARK
    adopt_card(encoder)
    assert encoder.model_card_data is ours and encoder._model_card_text is None
    other = type("MetaEmbedCardData", (MultiVectorEncoderModelCardData,), {})()  # from another version's module
    encoder.model_card_data = other
    adopt_card(encoder)
    assert encoder.model_card_data is other


def test_the_card_of_an_adapter_says_so(tmp_path):
    model = tiny_model()
    model.config.base_model = "lab/backbone"
    model.adapter_base = ("lab/finetuned", None)
    model.add_adapter(lora_config(model))
    model.save_pretrained(tmp_path / "adapter")
    card = check(tmp_path / "adapter")
    assert card.data.base_model == "lab/finetuned" and card.data["base_model_relation"] == "adapter"
    assert "snapshot_download" in card.text and "an adapter" in card.text and "lab/backbone" not in card.text


def test_no_folder_of_this_machine_is_published_as_the_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_backbone("runs/backbone")
    MetaEmbedModel.from_backbone("runs/backbone", num_query_tokens=4, num_document_tokens=8).save_pretrained("saved")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")  # as on another machine
    MetaEmbedModel.from_pretrained("saved").save_pretrained("again")
    for name in ("saved", "again"):
        card = check(tmp_path / name)
        assert card.data.base_model is None and "backbone" not in card.content
    assert [hub_id(name) for name in ("lab/model", "../model", "/tmp", "~/model", "a b/c", "elsewhere/backbone")] == [
        "lab/model",
        *[None] * 5,
    ]


def test_eval_results_are_what_the_hub_reads(tmp_path):
    quality = {(1, 1): {"ndcg@10": 0.5}, (4, 8): {"ndcg@10": 0.61234}}
    files = write_eval_results(tmp_path, "lab/pairs", "test", quality, "ndcg@10")
    assert [path.name for path in files] == ["lab-pairs-test-1x1.yaml", "lab-pairs-test-4x8.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[1].read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("lab/pairs", "test", 61.23)
    assert "4 query and 8 document vectors" in entry.notes
