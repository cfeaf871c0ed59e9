"""`benchmarks/distill_manuals.py` trains a teacher once and a student of it, and the page shows both."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from conftest import build_bert

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import distill_manuals as distill
from reproduction import manuals, report, tasks
from reproduction.results import Results
from reproduction.runs import TASKS


def test_the_teacher_is_trained_once_and_the_page_compares_its_students(monkeypatch, tmp_path):
    backbone, tokenizer = build_bert()
    backbone.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    pairs = [(f"red apple {i}", "a cat face on the table. And a key " * (i % 3 + 1)) for i in range(12)]
    for module in (manuals, distill):
        monkeypatch.setattr(module, "read_pairs", lambda folder: {"users": pairs, "gnuplot": pairs})
    monkeypatch.setattr(manuals, "fetch_backbone", lambda folder: tmp_path / "bert")
    monkeypatch.setattr(distill, "STATE", tmp_path / "state")
    monkeypatch.setitem(TASKS, "manuals", replace(TASKS["manuals"], steps=2, batch=4, warmup=1, length=12))
    threads = torch.get_num_threads()
    tasks.open_task.cache_clear()
    try:
        for layers in ("2", "1"):  # the second call loads the teacher
            distill.main(["--layers", layers, "--epochs", "1", "--result", str(tmp_path / "distill.json")])
            monkeypatch.setattr(distill, "train", None)
    finally:
        torch.set_num_threads(threads)
    lines = report.distilled(Results(tmp_path))
    assert [line.split(" |")[0] for line in lines[-2].splitlines()[2:]] == ["| teacher", "| student of 1 layer"]
    assert report.distilled(Results(tmp_path / "elsewhere")) == []
