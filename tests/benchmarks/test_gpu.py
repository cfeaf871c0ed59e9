"""The scripts for GPUs, run on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))

import gpu
import gpu_cost


def test_every_section_runs_on_the_cpu_but_sharding(tmp_path, monkeypatch):
    """Sharding needs processes of its own: two with gloo, by `python benchmarks/gpu.py --device cpu --tiny`."""

    def once(work, device, repeats=3):
        work()
        return 1.0, "-"

    monkeypatch.setattr(gpu, "measure", once)
    output = tmp_path / "report.md"
    sections = ["Scoring", "Encoding", "Attention and quantization", "Training"]
    gpu.main(["--device", "cpu", "--tiny", "--sections", *sections, "--output", str(output)])
    report = output.read_text()
    assert [line[3:] for line in report.splitlines() if line.startswith("## ")] == sections
    assert "Failed" not in report and "| 32 | (16, 64) |" in report and "| sdpa | 4.00 |" in report


def test_a_section_that_fails_is_written_down(tmp_path, monkeypatch):
    def broken(setting):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setitem(gpu.SECTIONS, "Scoring", broken)
    monkeypatch.setattr(gpu, "Setting", lambda arguments: None)
    output = tmp_path / "report.md"
    with pytest.raises(SystemExit, match="failed: Scoring"):
        gpu.main(["--device", "cpu", "--tiny", "--sections", "Scoring", "--output", str(output)])
    assert "**Failed**: RuntimeError: out of memory\n" in output.read_text()


def test_a_machine_without_a_gpu_is_told_what_to_do(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_the_calculation_counts_the_weights_of_the_models():
    """The names of the models are their sizes, in billions of weights."""
    counts = {name: (gpu_cost.linear(shape) + gpu_cost.others(shape)) / 1e9 for name, shape in gpu_cost.MODELS.items()}
    assert {name: round(count) for name, count in counts.items()} == {"3B": 4, "7B": 8, "32B": 33}
    shape = gpu_cost.MODELS["7B"]
    assert gpu_cost.full(shape, 8) < gpu_cost.full(shape, 1) / 4
    assert gpu_cost.what_fits(shape, 24) == ["bfloat16", "LoRA on a 4-bit backbone", "16"]


def test_the_page_holds_what_the_command_prints(capsys):
    gpu_cost.main([])
    page = (Path(__file__).parent.parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
