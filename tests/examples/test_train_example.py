"""examples/train.py runs end to end on the tiny checkpoint, and a killed run goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import accelerate
import pytest
import sentence_transformers
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from datasets import Dataset
from huggingface_hub import parse_eval_result_entries
from packaging.version import Version
from tiny import build
from tiny_models import ROOT, WORDS, picture, save_tiny_backbone, tiny_encoder
from torch.distributed.fsdp import FSDPModule
from transformers import HfArgumentParser

from metaembed import MetaEmbedModel
from metaembed.evaluation.budgets import BudgetEvaluator, budget_table
from metaembed.sentence_metaembed import to_multi_vector_encoder
from metaembed.training.lora import lora_config
from metaembed.training.losses import MMRLoss


def test_a_row_may_be_text_or_images_from_any_kind_of_file(tmp_path):
    """jsonl with paths, parquet with pictures, an image folder: the same inputs."""
    from train import Arguments, find_columns, load_rows, prepare

    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [{"query": "a", "positive": "b", "positive_image": "0.png", "negative_image": ["0.png", "1.png"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = [{**rows[0], "positive_image": picture(0), "negative_image": [picture(0), picture(1)]}]
    Dataset.from_list(pictures).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "folder" / "train").mkdir(parents=True)
    picture(0).save(tmp_path / "folder" / "train" / "0.png")
    (tmp_path / "folder" / "train" / "metadata.jsonl").write_text('{"file_name": "0.png", "query": "a"}\n')
    found = {}
    for name, positive in (("rows.jsonl", "positive"), ("rows.parquet", "positive"), ("folder", "image")):
        arguments = Arguments(backbone="", dataset=str(tmp_path / name), positive_column=positive)
        data, _ = load_rows(arguments)
        found[name] = prepare(data, find_columns(data, arguments), tmp_path)[0]
    assert list(found["rows.jsonl"]) == ["query", "positive", "negative"]
    assert found["rows.jsonl"]["positive"] == {"text": "b", "image": tmp_path / "0.png"}
    assert found["rows.jsonl"]["negative"] == [tmp_path / "0.png", tmp_path / "1.png"]
    assert found["rows.parquet"]["positive"]["image"].tobytes() == picture(0).tobytes()
    assert [image.tobytes() for image in found["rows.parquet"]["negative"]] == [picture(i).tobytes() for i in range(2)]
    assert found["folder"]["image"].tobytes() == picture(0).tobytes() and list(found["folder"]) == ["query", "image"]
    with pytest.raises(ValueError, match="no column 'answer'"):
        find_columns(data, Arguments(backbone="", dataset="", positive_column="answer"))


def test_a_list_of_negatives_is_as_many_hard_negatives(tmp_path):
    from train import Arguments, find_columns, load_rows, prepare

    picture(0).save(tmp_path / "0.png")
    row = {"query": "a", "positive": "b", "negative": "c"}
    rows = [
        {**row, "negatives": ["d", "e"], "negatives_image": [None, ["0.png"]]},
        {**row, "negatives": ["f", None], "negatives_image": [["0.png"], ["0.png", "0.png"]]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = Arguments(backbone="", dataset=str(tmp_path / "rows.jsonl"))
    data, _ = load_rows(arguments)
    columns = find_columns(data, arguments)
    assert columns == ["query", "positive", "negative", "negatives_1", "negatives_2"]
    image = tmp_path / "0.png"
    assert prepare(data, columns, tmp_path)[1] == {
        **{"query": "a", "positive": "b", "negative": "c"},
        **{"negatives_1": {"text": "f", "image": [image]}, "negatives_2": [image, image]},
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"negatives": [["a"], ["b", "c"]]}, r"all as long; the lengths are \[1, 2\]"),
        ({"negatives": [["a"], None]}, r"a list in each row.*\[1, None\]"),
        ({"negatives": [["a"]], "negatives_image": [["0.png", "1.png"]]}, r"the lengths are \[1, 2\]"),
        ({"negatives": ["a"]}, "'negatives' must hold a list in each row"),
        ({"negative_hard": ["a"]}, "'negative_hard' would not be used"),
        ({"negatives_1": ["a"]}, "'negatives_1' would not be used"),
    ],
)
def test_negatives_that_would_be_lost_are_named(columns, message):
    from train import Arguments, find_columns

    count = len(next(iter(columns.values())))
    rows = Dataset.from_dict({"query": ["a"] * count, "positive": ["b"] * count, **columns})
    with pytest.raises(ValueError, match=message):
        find_columns(rows, Arguments(backbone="", dataset=""))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    save_tiny_backbone(folder / "backbone")
    rows = range(72)
    names = [f"{WORDS[i % 16]} {WORDS[(5 * i + i // 16) % 16]}" for i in rows]
    columns = {
        "query": names,
        "positive": [name.split()[1] for name in names],
        "positive_image": [picture(i, 16 + 16 * (i % 3), 32) for i in rows],
        "negative": [WORDS[(3 * i) % 16] for i in rows],
    }
    Dataset.from_dict(columns).to_parquet(folder / "pairs.parquet")
    images = [image if i % 3 else None for i, image in enumerate(columns["positive_image"])]
    Dataset.from_dict({**columns, "positive_image": images}).to_parquet(folder / "mixed.parquet")
    return folder


def common(data, output, backbone="backbone"):
    return [
        *("--backbone", data / backbone, "--dataset", data / "pairs.parquet", "--output_dir", output),
        *("--per_device_train_batch_size", 8, "--learning_rate", 1e-3, "--eval_size", 8, "--save_steps", 2),
        *("--logging_steps", 1, "--report_to", "none", "--dataloader_pin_memory", False),
    ]


SIZES = ["--num_query_tokens", 4, "--num_document_tokens", 8]


def parse(*options):
    from train import Arguments, TrainingArguments

    parser = HfArgumentParser((Arguments, TrainingArguments))
    return parser.parse_args_into_dataclasses([*map(str, options), "--use_cpu"])


def run(*options):
    """Run the script in this process."""
    import train

    train.main(*parse(*options))


@pytest.mark.parametrize("lora", [True, False])
def test_own_learning_rates_reach_the_optimizer(data, tmp_path, lora):
    from train import Trainer, learning_rates, make_model

    options = ["--meta_token_learning_rate", 1e-2, "--projection_learning_rate", 5e-3, "--embedding_dim", 24]
    arguments, training = parse(*common(data, tmp_path), *SIZES, *options, *([] if lora else ["--no_lora"]))
    model = make_model(arguments, training)
    encoder = to_multi_vector_encoder(model, device="cpu")
    training.learning_rate_mapping = learning_rates(arguments, model)
    rows = Dataset.from_dict({"query": ["a"], "positive": ["b"]})
    trainer = Trainer(model=encoder, args=training, train_dataset=rows, loss=MMRLoss(encoder))
    groups = trainer.create_optimizer().param_groups
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    embedding = {name: rate for name, rate in rates.items() if "embed_tokens" in name}
    projection = {name: rate for name, rate in rates.items() if "projection" in name}
    assert len(embedding) == 1 and set(embedding.values()) == {1e-2}
    assert len(projection) == 2 and set(projection.values()) == {5e-3}
    assert {rates[name] for name in rates.keys() - embedding.keys() - projection.keys()} == {1e-3}


def test_a_model_that_returns_fewer_vectors_by_default_trains_them_all(data, tmp_path):
    model = MetaEmbedModel.from_backbone(data / "backbone", num_query_tokens=4, num_document_tokens=8)
    model.config.query_num_meta, model.config.document_num_meta = 2, 3
    model.save_pretrained(data / "fewer")
    run(*common(data, tmp_path, "fewer"), "--no_lora", "--max_steps", 1, "--eval_size", 0)
    saved = MetaEmbedModel.from_pretrained(tmp_path / "final")
    assert saved.encode_queries("cat").shape == (2, 32) and saved.encode_documents("cat").shape == (3, 32)
    assert not torch.equal(saved.encode_queries("cat", num_meta=4), model.encode_queries("cat", num_meta=4))


@pytest.mark.parametrize("options", [["--merge"], ["--no_lora"], []])
def test_what_is_reported_is_the_quality_of_what_is_saved(data, tmp_path, capsys, options):
    from train import find_columns, load_rows, make_evaluator, prepare

    rest = ["--bf16", "--learning_rate", 3e-2, "--max_steps", 4, "--eval_size", 16]
    every = [*common(data, tmp_path), *SIZES, *options, *rest]
    run(*every)
    printed = capsys.readouterr().out
    arguments, _ = parse(*every)
    _, rows = load_rows(arguments)
    columns = find_columns(rows, arguments)
    # An adapter is of no dtype: it was trained, and measured, on the backbone in bfloat16.
    model = MetaEmbedModel.from_pretrained(tmp_path / "final", **({} if options else {"dtype": torch.bfloat16}))
    evaluator = make_evaluator(prepare(rows, columns, data), columns, model, batch_size=8)
    results = evaluator(to_multi_vector_encoder(model, device="cpu"))
    expected = budget_table(evaluator.budget_metrics(results), ["ndcg@10", "recall@1", "recall@5", "mrr@10"])
    assert expected in printed


class Worsening(BudgetEvaluator):
    """Finds every checkpoint worse than the one before."""

    found = 1.0

    def __call__(self, *args, **kwargs):
        results = super().__call__(*args, **kwargs)
        self.found /= 2
        return {**results, self.primary_metric: self.found}


def test_the_best_checkpoint_is_what_is_saved(data, tmp_path, monkeypatch):
    import train

    monkeypatch.setattr(train, "BudgetEvaluator", Worsening)
    run(*common(data, tmp_path), *SIZES, "--max_steps", 4)
    saved, best, last = (
        MetaEmbedModel.from_pretrained(tmp_path / name).encode_queries("cat")
        for name in ("final", "checkpoint-2", "checkpoint-4")
    )
    assert torch.equal(saved, best) and not torch.equal(saved, last)


def test_a_lost_best_checkpoint_is_no_secret(data, tmp_path):
    from train import Trainer

    _, training = parse(*common(data, tmp_path))
    encoder = to_multi_vector_encoder(MetaEmbedModel.from_backbone(data / "backbone"), device="cpu")
    rows = Dataset.from_dict({"query": ["a"], "positive": ["b"]})
    trainer = Trainer(model=encoder, args=training, train_dataset=rows, loss=MMRLoss(encoder))
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(Exception, match="checkpoint-2"):
        trainer._load_best_model()


def test_results_on_a_dataset_of_the_hub_are_written_for_its_page(data, tmp_path, monkeypatch):
    import train

    rows = train.load_rows(parse(*common(data, tmp_path))[0])
    monkeypatch.setattr(train, "load_rows", lambda arguments: rows)
    run(*common(data, tmp_path), *SIZES, "--max_steps", 2, "--dataset", "lab/pairs")
    files = sorted((tmp_path / "final" / ".eval_results").iterdir())
    assert [path.name for path in files] == [f"lab-pairs-default-train-{b}.yaml" for b in ("1x1", "2x4", "4x8")]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[2].read_text()))
    assert (entry.dataset_id, entry.task_id) == ("lab/pairs", "default train")
    assert entry.notes == "ndcg@10 x 100, with 4 query and 8 document vectors, on 8 rows held out of the split"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--embedding_dim", 8], "--embedding_dim 8 cannot be had: .* has 24"),
        (["--num_query_tokens", 2], "--num_query_tokens 2 cannot be had"),
        (["--query_instruction", "Find"], "--query_instruction Find cannot be had"),
        (["--lora_r", 8], "--lora_r 8 cannot be had: .* has 4"),
        (["--no_lora", "--lora_r", 4], "--no_lora trains every weight: it has no use for --lora_r"),
    ],
)
def test_options_that_a_trained_model_cannot_have_are_named(data, tmp_path, options, message):
    from train import make_model

    if not (data / "adapter").exists():
        make_model(*parse(*common(data, ""), *SIZES, "--embedding_dim", 24, "--lora_r", 4)).save_pretrained(
            data / "adapter"
        )
    with pytest.raises(ValueError, match=message):
        make_model(*parse(*common(data, tmp_path, "adapter"), *options))
    make_model(*parse(*common(data, tmp_path, "adapter"), *SIZES, "--embedding_dim", 24, "--lora_r", 4))


@pytest.mark.parametrize("name", ["final", "checkpoint-2"])
def test_a_folder_of_another_kind_of_run_is_refused_at_the_start(data, tmp_path, name):
    model = MetaEmbedModel.from_backbone(data / "backbone", num_query_tokens=4, num_document_tokens=8)
    model.save_pretrained(tmp_path / "whole" / name)
    with pytest.raises(ValueError, match=f"this run saves an adapter, and .*{name} holds a whole model"):
        run(*common(data, tmp_path / "whole"))
    model.add_adapter(lora_config(model))
    model.save_pretrained(tmp_path / "adapter" / name)
    with pytest.raises(ValueError, match=f"this run saves a whole model, and .*{name} holds an adapter"):
        run(*common(data, tmp_path / "adapter"), "--no_lora")
    if name == "final":
        with pytest.raises(ValueError, match=r"saves a whole model, and .*final holds an adapter"):
            run(*common(data, tmp_path / "adapter"), "--merge")


@pytest.mark.parametrize("option", [["--save_strategy", "best"], ["--eval_strategy", "epoch"]])
def test_evaluations_apart_from_checkpoints_are_refused(data, tmp_path, option):
    best = ["--metric_for_best_model", "loss"]
    with pytest.raises(ValueError, match="every checkpoint is evaluated, and the best is kept"):
        run(*common(data, tmp_path), *option, *best)


def start(data, output, *options, launcher=()):
    command = [
        *(sys.executable, *launcher, ROOT / "examples" / "train.py"),
        *(*common(data, output), *SIZES, *options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    return output


def history(folder):
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def table(output):
    return [line for line in output.splitlines() if line.startswith("| (")]


def test_a_checkpoint_that_a_kill_cut_short_is_not_resumed(tmp_path):
    from train import last_checkpoint

    assert last_checkpoint(tmp_path) is None
    for step, state in ((4, '{"log_history": []}'), (10, '{"log_hist'), (12, ""), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


@pytest.mark.slow
def test_a_killed_run_ends_where_an_unbroken_one_does(data, tmp_path):
    options = ["--mini_batch_size", 4, "--embedding_dim", 24, "--lora_r", 4, "--num_train_epochs", 2]
    options += ["--meta_token_learning_rate", 1e-2, "--projection_learning_rate", 5e-3]
    unbroken = finish(start(data, tmp_path / "unbroken", *options))
    killed = start(data, tmp_path / "killed", *options)
    while not (tmp_path / "killed" / "checkpoint-6" / "trainer_state.json").exists():
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "final").exists(), "the run was over before it was killed"
    resumed = finish(start(data, tmp_path / "killed", *options, "--resume"))
    expected, actual = history(tmp_path / "unbroken"), history(tmp_path / "killed")
    assert len(expected) == 16 and actual == expected
    assert table(resumed) == table(unbroken) and len(table(resumed)) == 3
    queries = ["red apple"]
    first, second = (MetaEmbedModel.from_pretrained(tmp_path / run / "final") for run in ("unbroken", "killed"))
    assert torch.equal(first.encode_queries(queries), second.encode_queries(queries))


@pytest.mark.slow
@pytest.mark.skipif(
    Version(sentence_transformers.__version__) < Version("6.2"),
    reason="sentence-transformers before 6.2 has no gradient checkpointing with the trainer of transformers 5.20",
)
def test_full_finetuning_in_bfloat16_with_gradient_checkpointing(data, tmp_path):
    finish(
        start(
            data,
            tmp_path,
            *("--no_lora", "--bf16", "--use_cpu", "--gradient_checkpointing", "--num_train_epochs", 1),
            *("--meta_token_learning_rate", 1e-2),
        )
    )
    assert (tmp_path / "final" / "model.safetensors").exists()
    losses = history(tmp_path)
    assert losses[max(losses)] < losses[1]
    assert MetaEmbedModel.from_pretrained(tmp_path / "final").encode_queries("red apple").shape == (4, 32)


@pytest.mark.slow
def test_two_ranks_with_gathering(data, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--use_cpu", "--gather_across_devices", "--mini_batch_size", 4, "--num_train_epochs", 1, "--merge"]
    output = finish(start(data, tmp_path, *options, "--dataloader_drop_last", launcher=launcher))
    assert len(table(output)) == 3
    assert (tmp_path / "final" / "model.safetensors").exists()
    MetaEmbedModel.from_pretrained(tmp_path / "final").encode_documents(picture(0))


needs_fsdp2 = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.14") or not hasattr(FSDPModule, "set_reduce_scatter_unused_params"),
    reason="needs accelerate and torch with all of FSDP2",
)


@needs_fsdp2
def test_the_fsdp_config_shards_the_blocks_of_the_language_model(monkeypatch):
    """By accelerate's own reading of it: not the vision tower, which some batches do without."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from train import sharded_layers

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


def test_layers_that_only_images_run_through_are_not_sharded_apart():
    """Processes whose batches have none would not take part in gathering them."""
    from train import sharded_layers

    backbone, processor = build("mllama")
    model = MetaEmbedModel.from_backbone(backbone, processor=processor, num_query_tokens=4, num_document_tokens=8)
    assert "MllamaCrossAttentionDecoderLayer" in {type(module).__name__ for module in model.modules()}
    assert sharded_layers(model) == ["MllamaSelfAttentionDecoderLayer"]


def test_a_backbone_whose_layers_cannot_be_sharded_is_named(monkeypatch):
    from train import sharded_layers

    model = tiny_encoder()[0].model
    for module in model.modules():
        if hasattr(module, "_no_split_modules"):
            monkeypatch.setattr(module, "_no_split_modules", None)
    with pytest.raises(ValueError, match="Qwen2_5_VLModel does not say which of its layers FSDP can shard"):
        sharded_layers(model)


# accelerate shards on GPUs only: this lets it do the same on the CPU.
FSDP_ON_CPU = """
import runpy, sys
from accelerate.state import AcceleratorState, DistributedType

plain = AcceleratorState.__init__
def sharded(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
AcceleratorState.__init__ = sharded
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@needs_fsdp2
@pytest.mark.parametrize("options", [["--lora_dropout", 0], ["--no_lora", "--mini_batch_size", 2]])
def test_a_sharded_run_saves_what_an_unsharded_one_does(data, tmp_path, options):
    """Two processes with the shipped configuration: losses, checkpoints, the best one, what is saved, and a resume."""
    config = yaml.safe_load((ROOT / "examples" / "fsdp.yaml").read_text())
    config.update(num_processes=2, mixed_precision="no", use_cpu=True)
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "fsdp_on_cpu.py").write_text(FSDP_ON_CPU)
    options = [
        "--dataset",
        data / "mixed.parquet",
        "--per_device_train_batch_size",
        4,
        "--embedding_dim",
        24,
        *options,
    ]
    options += ["--max_steps", 4, "--lr_scheduler_type", "constant", "--use_cpu"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    unsharded = finish(start(data, tmp_path / "unsharded", *options, launcher=ranks))
    ranks = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "fsdp.yaml", tmp_path / "fsdp_on_cpu.py"]
    folder = tmp_path / "sharded"
    sharded = finish(start(data, folder, *options, launcher=ranks))
    assert history(folder) == pytest.approx(history(tmp_path / "unsharded"), rel=1e-3)
    assert table(sharded) == table(unsharded) and len(table(sharded)) == 3

    def embedding(folder):
        return MetaEmbedModel.from_pretrained(folder).encode_documents({"text": "cat", "image": picture(1)})

    for name in ("checkpoint-2", "final"):
        torch.testing.assert_close(
            embedding(folder / name), embedding(tmp_path / "unsharded" / name), atol=1e-4, rtol=0
        )
    if "--no_lora" in options:
        return  # resumed once: it takes its time
    expected = history(folder), embedding(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-4")
    finish(start(data, folder, *options, "--resume", launcher=ranks))
    assert history(folder) == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(embedding(folder / "checkpoint-4"), expected[1], atol=1e-6, rtol=0)
