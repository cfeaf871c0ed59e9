"""examples/train.py runs end to end on the tiny checkpoint, and a killed run continues as if nothing had happened.

Tests that need no fresh process run in this one. Two runs use two processes each: one with a whole model on each, and
one sharded.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import sentence_transformers
import torch
import train
import yaml
from datasets import Dataset
from huggingface_hub import parse_eval_result_entries
from packaging.version import Version
from tiny_models import ROOT, WORDS, needs_fsdp2, picture, save_tiny_backbone

from metaembed import MetaEmbedModel
from metaembed.evaluation.budgets import BudgetEvaluator, budget_table
from metaembed.sentence_metaembed import to_multi_vector_encoder
from metaembed.training import data as training_data
from metaembed.training.arguments import GROUPS, parse_arguments
from metaembed.training.data import load_pairs
from metaembed.training.losses import MMRLoss
from metaembed.training.run import check_run, learning_rates, make_loss, make_model
from metaembed.training.trainer import MetaEmbedTrainer

SIZES = ["--num_query_tokens", 4, "--num_document_tokens", 8]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread, like the launched processes, so that floats are added in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A backbone, and 40 pairs, of which all or two thirds have a picture."""
    folder = tmp_path_factory.mktemp("train")
    save_tiny_backbone(folder / "backbone")
    rows = range(40)
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


def options(data, output, *more, backbone="backbone", rows="pairs.parquet"):
    """The command line of a run that saves every second step."""
    every = [
        *("--backbone", data / backbone, "--dataset", data / rows, "--output_dir", output),
        *("--per_device_train_batch_size", 8, "--learning_rate", 1e-3, "--eval_size", 8, "--save_steps", 2),
        *("--logging_steps", 1, "--report_to", "none", "--dataloader_pin_memory", False, "--use_cpu", *more),
    ]
    return list(map(str, every))


def arguments(*args, **kwargs):
    return parse_arguments(options(*args, **kwargs))


def start(*command):
    """Start a process with the same settings as this one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
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


def embedding(folder):
    return MetaEmbedModel.from_pretrained(folder).encode_documents({"text": "cat", "image": picture(1)})


def test_help_starts_with_the_ten_options_that_matter_and_lists_every_one_once(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    shown = re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE)
    first, *_ = GROUPS.values()
    assert shown[:10] == first.split() and len(first.split()) == 10
    names = {name for name in shown if not name.startswith("no_")}
    assert {name for group in GROUPS.values() for name in group.split()} < names and "adam_beta2" in names
    assert len(shown) == len(set(shown)) > 80
    assert re.findall(r"^(\S.*):$", text, re.MULTILINE)[: len(GROUPS)] == list(GROUPS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--dataset", "nowhere/pairs.jsonl"], "there is no file or folder 'nowhere/pairs.jsonl'"),
        (["--positive_column", "answer"], "the dataset has no column 'answer'"),
        (["--backbone", "./nowhere"], "nowhere"),
        (["--no_lora", "--lora_r", 4], "--no_lora trains every weight and does not use --lora_r"),
        (["--max_pixels", 1], "--max_pixels 1 is below the 3136 that an image is enlarged to"),
        (["--normalize", "max"], 'normalize must be "sum", "mean" or "sqrt"'),
        (["--save_strategy", "best", "--metric_for_best_model", "loss"], "every checkpoint is evaluated"),
        (["--eval_strategy", "epoch"], "every checkpoint is evaluated, and the best is kept"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(data, tmp_path, capsys, monkeypatch, wrong, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        train.main(options(data, tmp_path, *SIZES, *wrong))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert end.value.code == 2 and message in line
    assert not list(tmp_path.iterdir())


def test_lora_that_installed_versions_prevent_is_one_line(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "peft.tuners", None)
    with pytest.raises(SystemExit) as end:
        train.main(options(data, tmp_path, *SIZES))
    assert end.value.code == 2 and "peft" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("lora", [True, False])
def test_own_learning_rates_reach_the_optimizer(data, tmp_path, lora):
    rates = ["--meta_token_learning_rate", 1e-2, "--projection_learning_rate", 5e-3, "--embedding_dim", 24]
    asked, training = arguments(data, tmp_path, *SIZES, *rates, *([] if lora else ["--no_lora"]))
    model = make_model(asked, training)
    encoder = to_multi_vector_encoder(model, device="cpu")
    training.learning_rate_mapping = learning_rates(asked, model)
    rows = Dataset.from_dict({"query": ["a"], "positive": ["b"]})
    trainer = MetaEmbedTrainer(model=encoder, args=training, train_dataset=rows, loss=MMRLoss(encoder))
    groups = trainer.create_optimizer().param_groups
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    rows_of_tokens = {name: rate for name, rate in rates.items() if "embed_tokens" in name}
    projection = {name: rate for name, rate in rates.items() if "projection" in name}
    assert len(rows_of_tokens) == 1 and set(rows_of_tokens.values()) == {1e-2}
    assert len(projection) == 2 and set(projection.values()) == {5e-3}
    assert {rates[name] for name in rates.keys() - rows_of_tokens.keys() - projection.keys()} == {1e-3}


def test_a_model_that_returns_fewer_vectors_by_default_trains_them_all(data, tmp_path):
    model = MetaEmbedModel.from_backbone(data / "backbone", num_query_tokens=4, num_document_tokens=8)
    model.config.query_num_meta, model.config.document_num_meta = 2, 3
    model.save_pretrained(data / "fewer")
    train.main(options(data, tmp_path, "--no_lora", "--max_steps", 1, "--eval_size", 0, backbone="fewer"))
    saved = MetaEmbedModel.from_pretrained(tmp_path / "final")
    assert saved.encode_queries("cat").shape == (2, 32) and saved.encode_documents("cat").shape == (3, 32)
    assert not torch.equal(saved.encode_queries("cat", num_meta=4), model.encode_queries("cat", num_meta=4))


@pytest.mark.parametrize("kind", [["--merge"], ["--no_lora"], []])
def test_the_reported_quality_is_that_of_the_saved_model(data, tmp_path, capsys, kind):
    steps = ["--max_steps", 2, "--save_steps", 2, "--eval_size", 16]
    train.main(options(data, tmp_path, *SIZES, *kind, "--bf16", "--learning_rate", 3e-2, *steps))
    printed = capsys.readouterr().out
    _, held_out = load_pairs(str(data / "pairs.parquet"), eval_size=16)
    # An adapter has no dtype: it was trained, and measured, on the backbone in bfloat16.
    model = MetaEmbedModel.from_pretrained(tmp_path / "final", **({} if kind else {"dtype": torch.bfloat16}))
    evaluator = held_out.evaluator(model, batch_size=8)
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


def test_the_best_checkpoint_is_saved(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "BudgetEvaluator", Worsening)
    train.main(options(data, tmp_path, *SIZES, "--max_steps", 2, "--save_steps", 1))
    saved, best, last = (embedding(tmp_path / name) for name in ("final", "checkpoint-1", "checkpoint-2"))
    assert torch.equal(saved, best) and not torch.equal(saved, last)


def test_results_on_a_dataset_of_the_hub_are_written_for_its_page(data, tmp_path, monkeypatch):
    pairs = load_pairs(str(data / "pairs.parquet"), eval_size=8)
    monkeypatch.setattr(train, "load_pairs", lambda *args: pairs)
    train.main(options(data, tmp_path, *SIZES, "--max_steps", 1, "--dataset", "lab/pairs"))
    files = sorted((tmp_path / "final" / ".eval_results").iterdir())
    assert [path.name for path in files] == [f"lab-pairs-default-train-{b}.yaml" for b in ("1x1", "2x4", "4x8")]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[2].read_text()))
    assert (entry.dataset_id, entry.task_id) == ("lab/pairs", "default train")
    assert entry.notes == "ndcg@10 x 100, with 4 query and 8 document vectors, on 8 rows held out of the split"


@pytest.fixture(scope="module")
def adapter(data):
    """An adapter repository to train on, with a projection and LoRA of rank 4."""
    asked, training = arguments(data, "", *SIZES, "--embedding_dim", 24, "--lora_r", 4)
    make_model(asked, training).save_pretrained(data / "adapter")
    return "adapter"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--embedding_dim", 8], "--embedding_dim 8 does not fit .*, which was trained with 24"),
        (["--num_query_tokens", 2], "--num_query_tokens 2 does not fit"),
        (["--query_instruction", "Find"], "--query_instruction Find does not fit"),
        (["--lora_r", 8], "--lora_r 8 does not fit .*, which was trained with 4"),
    ],
)
def test_options_that_do_not_fit_a_trained_model_are_named(data, tmp_path, adapter, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_model(*arguments(data, tmp_path, *wrong, backbone=adapter))


def test_options_equal_to_those_of_a_trained_model_are_accepted(data, tmp_path, adapter):
    make_model(*arguments(data, tmp_path, *SIZES, "--embedding_dim", 24, "--lora_r", 4, backbone=adapter))


@pytest.mark.parametrize("name", ["final", "checkpoint-2"])
def test_an_output_folder_of_another_kind_of_run_is_refused_at_the_start(data, tmp_path, name):
    for kind, files in (("whole", ["config.json"]), ("adapter", ["config.json", "adapter_config.json"])):
        (tmp_path / kind / name).mkdir(parents=True)
        for file in files:
            (tmp_path / kind / name / file).write_text("{}")
    with pytest.raises(ValueError, match=f"this run saves an adapter, and .*{name} holds a whole model"):
        check_run(*arguments(data, tmp_path / "whole"))
    with pytest.raises(ValueError, match=f"this run saves a whole model, and .*{name} holds an adapter"):
        check_run(*arguments(data, tmp_path / "adapter", "--no_lora"))
    check_run(*arguments(data, tmp_path / "adapter"))
    if name == "final":
        with pytest.raises(ValueError, match=r"saves a whole model, and .*final holds an adapter"):
            check_run(*arguments(data, tmp_path / "adapter", "--merge"))


def test_merging_what_fsdp_shards_is_refused_at_the_start(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--merge needs whole weights"):
        check_run(*arguments(data, tmp_path, "--merge"))


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(data, tmp_path, capsys):
    rates = ["--meta_token_learning_rate", 1e-2, "--projection_learning_rate", 5e-3]
    run = [*SIZES, "--mini_batch_size", 4, "--embedding_dim", 24, "--lora_r", 4, "--num_train_epochs", 2, *rates]
    killed = start(ROOT / "examples" / "train.py", *options(data, tmp_path / "killed", *run))
    while not (tmp_path / "killed" / "checkpoint-2" / "trainer_state.json").exists():
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "final").exists(), "the run was over before it was killed"
    train.main(options(data, tmp_path / "unbroken", *run))
    unbroken = capsys.readouterr().out
    train.main(options(data, tmp_path / "killed", *run, "--resume"))
    resumed = capsys.readouterr().out
    expected, actual = history(tmp_path / "unbroken"), history(tmp_path / "killed")
    assert len(expected) == 8 and actual == expected
    assert table(resumed) == table(unbroken) and len(table(resumed)) == 3
    assert torch.equal(embedding(tmp_path / "unbroken" / "final"), embedding(tmp_path / "killed" / "final"))


@pytest.mark.slow
@pytest.mark.skipif(
    Version(sentence_transformers.__version__) < Version("6.2"),
    reason="sentence-transformers before 6.2 has no gradient checkpointing with the trainer of transformers 5.20",
)
def test_full_finetuning_in_bfloat16_with_gradient_checkpointing(data, tmp_path):
    more = ["--gradient_checkpointing", "--num_train_epochs", 1, "--meta_token_learning_rate", 1e-2]
    train.main(options(data, tmp_path, *SIZES, "--no_lora", "--bf16", *more))
    assert (tmp_path / "final" / "model.safetensors").exists()
    losses = history(tmp_path)
    assert losses[max(losses)] < losses[1]
    assert embedding(tmp_path / "final").shape == (8, 32)


@pytest.mark.parametrize("more", [["--no_lora", "--dtype", "bfloat16"], ["--no_lora"], ["--dtype", "bfloat16"]])
def test_training_every_weight_in_bfloat16_is_warned_of_in_one_line(data, tmp_path, caplog, recwarn, more):
    options, training = arguments(data, tmp_path, *SIZES, *more)
    make_loss(to_multi_vector_encoder(make_model(options, training)), options)
    told = [record.getMessage() for record in caplog.records if "hardly changes" in record.getMessage()]
    assert len(told) == (len(more) == 3)
    assert not told or "Leave --dtype out" in told[0]
    assert not [warning for warning in recwarn if "weights to train" in str(warning.message)]


# The run of one process, which those of two processes with half the batch must equal: all documents are negatives.
SAME = [*SIZES, "--embedding_dim", 24, "--max_steps", 4, "--lr_scheduler_type", "constant"]
NO_DROPOUT = ["--lora_dropout", 0]
HALF = ["--per_device_train_batch_size", 4, "--gather_across_devices"]


def assert_equal_runs(actual, expected, checkpoints):
    assert history(actual) == pytest.approx(history(expected), rel=1e-3)
    for name in checkpoints:
        torch.testing.assert_close(embedding(actual / name), embedding(expected / name), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_two_processes_with_gathering_equal_one(data, tmp_path, capsys):
    run = [*SAME, *NO_DROPOUT, "--mini_batch_size", 2, "--merge"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = start(
        *launcher,
        ROOT / "examples" / "train.py",
        *options(data, tmp_path / "two", *run, *HALF, "--dataloader_drop_last"),
    )
    train.main(options(data, tmp_path / "one", *run))
    one = table(capsys.readouterr().out)
    assert table(finish(two)) == one and len(one) == 3
    assert (tmp_path / "two" / "final" / "model.safetensors").exists()
    assert_equal_runs(tmp_path / "two", tmp_path / "one", ["checkpoint-2", "final"])


# accelerate shards on GPUs only: this lets it do the same on the CPU. Three runs in the same two processes.
FSDP_ON_CPU = """
import json, os, shutil, sys
import torch.distributed
from accelerate.state import AcceleratorState, DistributedType

plain = AcceleratorState.__init__
def sharded(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
AcceleratorState.__init__ = sharded

sys.path.insert(0, sys.argv[1])
import train

for argv in json.loads(sys.argv[2]):
    if os.environ["RANK"] == "0":
        print("run:", flush=True)
        if "--resume" in argv:
            folder = argv[argv.index("--output_dir") + 1]
            shutil.copytree(folder.replace("resumed", "lora"), folder, ignore=lambda *_: ["checkpoint-4", "final"])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    train.main(argv)
    AcceleratorState._reset_state()
"""


@pytest.mark.slow
@needs_fsdp2
def test_a_sharded_run_saves_the_same_as_one_process(data, tmp_path, capsys):
    """Two processes with the shipped configuration: losses, checkpoints, the best one, the saved model, a resume."""
    config = yaml.safe_load((ROOT / "examples" / "fsdp.yaml").read_text())
    config.update(num_processes=2, mixed_precision="no", use_cpu=True)
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "fsdp_on_cpu.py").write_text(FSDP_ON_CPU)
    kinds = {
        "lora": NO_DROPOUT,
        "full": ["--no_lora", "--mini_batch_size", 2],
        "resumed": [*NO_DROPOUT, "--resume"],
    }
    runs = [options(data, tmp_path / name, *SAME, *HALF, *kind, rows="mixed.parquet") for name, kind in kinds.items()]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "fsdp.yaml"]
    launched = start(*launcher, tmp_path / "fsdp_on_cpu.py", ROOT / "examples", json.dumps(runs))
    tables = {}
    for name in ("lora", "full"):
        train.main(options(data, tmp_path / "one" / name, *SAME, *kinds[name], rows="mixed.parquet"))
        tables[name] = table(capsys.readouterr().out)
    sharded = [table(output) for output in finish(launched).split("run:")[1:]]
    assert sharded == [tables["lora"], tables["full"], tables["lora"]] and len(sharded[0]) == 3
    for name in ("lora", "full"):
        assert_equal_runs(tmp_path / name, tmp_path / "one" / name, ["checkpoint-2", "final"])
    assert history(tmp_path / "resumed") == pytest.approx(history(tmp_path / "lora"), rel=1e-5)
    resumed, whole = (embedding(tmp_path / name / "checkpoint-4") for name in ("resumed", "lora"))
    torch.testing.assert_close(resumed, whole, atol=1e-6, rtol=0)
