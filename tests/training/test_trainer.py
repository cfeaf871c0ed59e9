"""The trainer shards the layers that all processes run, resumes complete checkpoints, and hides no failure."""

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from datasets import Dataset
from sentence_transformers import MultiVectorEncoderTrainingArguments
from tiny import build
from tiny_models import ROOT, needs_fsdp2, tiny_encoder

from metaembed import MetaEmbedModel
from metaembed.training.lora import lora_config
from metaembed.training.losses import MMRLoss
from metaembed.training.trainer import MetaEmbedTrainer, last_checkpoint, sharded_layers


def test_an_incomplete_checkpoint_is_not_resumed(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in ((4, '{"log_history": []}'), (10, '{"log_hist'), (12, ""), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_lost_best_checkpoint_is_an_error(tmp_path):
    encoder = tiny_encoder()
    rows = Dataset.from_dict({"query": ["a"], "positive": ["b"]})
    settings = MultiVectorEncoderTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = MetaEmbedTrainer(model=encoder, args=settings, train_dataset=rows, loss=MMRLoss(encoder))
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(Exception, match="checkpoint-2"):
        trainer._load_best_model()


@needs_fsdp2
def test_the_fsdp_config_shards_the_blocks_of_the_language_model(monkeypatch):
    """As accelerate reads it: without the vision tower, which some batches do not use."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    for name, value in yaml.safe_load((ROOT / "examples" / "fsdp.yaml").read_text())["fsdp_config"].items():
        monkeypatch.setenv(f"FSDP_{name.removeprefix('fsdp_').upper()}", str(value))
    adapted = tiny_encoder()
    adapted[0].model.add_adapter(lora_config(adapted[0].model))
    for encoder in (tiny_encoder(), adapted):
        plugin = FullyShardedDataParallelPlugin(transformer_cls_names_to_wrap=sharded_layers(encoder[0].model))
        assert plugin.fsdp_version == 2
        plugin.set_auto_wrap_policy(encoder)
        policy = fsdp2_prepare_auto_wrap_policy(plugin, encoder)
        sharded = [name for name, module in encoder.named_modules() if policy(module)]
        assert sharded == [f"0.model.backbone.language_model.layers.{i}" for i in range(2)]


def test_layers_that_only_images_use_are_not_sharded_separately():
    """Processes whose batches have no images would not take part in gathering them."""
    backbone, processor = build("mllama")
    model = MetaEmbedModel.from_backbone(backbone, processor=processor, num_query_tokens=4, num_document_tokens=8)
    assert "MllamaCrossAttentionDecoderLayer" in {type(module).__name__ for module in model.modules()}
    assert sharded_layers(model) == ["MllamaSelfAttentionDecoderLayer"]


def test_a_backbone_whose_layers_cannot_be_sharded_is_named(monkeypatch):
    model = tiny_encoder()[0].model
    for module in model.modules():
        if hasattr(module, "_no_split_modules"):
            monkeypatch.setattr(module, "_no_split_modules", None)
    with pytest.raises(ValueError, match="Qwen2_5_VLModel does not say which of its layers FSDP can shard"):
        sharded_layers(model)
