"""examples/train.py runs end to end on the tiny checkpoint, and a killed run goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset
from tiny_models import ROOT, WORDS, picture, save_tiny_backbone

from metaembed import MetaEmbedModel


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
        found[name] = prepare(data, find_columns(data.column_names, arguments), tmp_path)[0]
    assert list(found["rows.jsonl"]) == ["query", "positive", "negative"]
    assert found["rows.jsonl"]["positive"] == {"text": "b", "image": tmp_path / "0.png"}
    assert found["rows.jsonl"]["negative"] == [tmp_path / "0.png", tmp_path / "1.png"]
    assert found["rows.parquet"]["positive"]["image"].tobytes() == picture(0).tobytes()
    assert [image.tobytes() for image in found["rows.parquet"]["negative"]] == [picture(i).tobytes() for i in range(2)]
    assert found["folder"]["image"].tobytes() == picture(0).tobytes() and list(found["folder"]) == ["query", "image"]
    with pytest.raises(ValueError, match="no column 'answer'"):
        find_columns(["query"], Arguments(backbone="", dataset="", positive_column="answer"))


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
    return folder


def start(data, output, *options, launcher=()):
    command = [
        *(sys.executable, *launcher, ROOT / "examples" / "train.py"),
        *("--backbone", data / "backbone", "--dataset", data / "pairs.parquet", "--output_dir", output),
        *("--num_query_tokens", 4, "--num_document_tokens", 8, "--per_device_train_batch_size", 8),
        *("--learning_rate", 1e-3, "--eval_size", 8, "--save_steps", 2, "--logging_steps", 1, "--report_to", "none"),
        *("--dataloader_pin_memory", False, *options),
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
