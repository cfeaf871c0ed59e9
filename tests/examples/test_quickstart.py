"""The quickstart runs from end to end, and measures what it says it measures."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_qwen2_5_vl
from scenes import PICTOGRAMS, Scene, draw_pictogram, make_query, make_scene, name_query

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(output: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--output", str(output), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_whole_path_runs_and_answers_a_typed_query(tmp_path):
    short = ["--steps", "3", "--batch-size", "4", "--test-scenes", "20"]
    said = run(tmp_path, *short)
    for door in ("AutoModel", "MultiVectorEncoder"):
        assert f"with {door}: largest difference" in said
    budgets = [row["budget"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]]
    assert budgets == ["(1,1)", "(2,4)", "(4,8)", "(8,16)", "(16,64)"]
    assert (tmp_path / "curve.png").stat().st_size > 10_000 and (tmp_path / "sheet.png").stat().st_size > 10_000
    before = (tmp_path / "model/model.safetensors").stat().st_mtime
    answer = run(tmp_path, *short, "--query", "cat face, red apple")
    assert '"cat face, red apple":' in answer and (tmp_path / "answer.png").is_file()
    assert (tmp_path / "model/model.safetensors").stat().st_mtime == before  # the saved model answers, untrained anew


@pytest.mark.slow
def test_a_backbone_from_a_folder_and_a_single_budget_run_the_same_path(tmp_path):
    backbone, processor = build_qwen2_5_vl()
    backbone.save_pretrained(tmp_path / "backbone")
    processor.save_pretrained(tmp_path / "backbone")
    sizes = ["--steps", "2", "--batch-size", "4", "--test-scenes", "10", "--cell", "16"]
    said = run(tmp_path / "out", "--backbone", str(tmp_path / "backbone"), "--budgets", "16,64", *sizes)
    assert "'loss_16x64'" in said and "'loss_1x1'" not in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--test-scenes", "9"], "at least 10"),
        (["--budgets", "16x64"], "expected pairs"),
        (["--budgets", "1,1 1,65"], "between 1 and 64"),
        (["--budgets", ""], "expected pairs"),
        (["--query", " "], "names no pictogram"),
        (["--steps", "0"], "at least 1"),
        (["--cell", "-1"], "at least 1"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused_before_anything_is_trained(
    arguments, message, monkeypatch, capsys
):
    from quickstart import parse_arguments

    monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, folder",
    [
        ([], "quickstart"),
        (["--budgets", "4,8 16,64"], "quickstart-4x8-16x64"),
        (["--backbone", "Qwen/Qwen2.5-VL-3B-Instruct"], "quickstart-Qwen--Qwen2.5-VL-3B-Instruct"),
        (["--backbone", "/models/tiny/", "--budgets", "16,64"], "quickstart-models--tiny-16x64"),
    ],
)
def test_each_backbone_has_a_folder_of_its_own(arguments, folder, monkeypatch):
    from quickstart import parse_arguments

    monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments, "--query", "red apple"])
    assert parse_arguments().output == Path("outputs") / folder


def test_scenes_are_the_same_for_the_same_seed_and_hold_what_they_say():
    scenes = [make_scene(random.Random(7)) for _ in range(2)]
    assert scenes[0] == scenes[1] and len(scenes[0].pictograms) == 6
    rng = random.Random(0)
    query = make_query(scenes[0], rng)
    assert query <= scenes[0].pictograms and 4 <= len(query) <= 6
    assert len(name_query(query, rng).split(", ")) == len(query)


def test_every_pictogram_is_drawn_and_looks_like_no_other():
    drawn = {draw_pictogram(pictogram, 16).tobytes() for pictogram in PICTOGRAMS}
    assert len(drawn) == len(PICTOGRAMS) == 64
    assert Scene(("",) * 9).draw().getextrema() == ((255, 255),) * 3
    assert all(picture != b"\xff" * len(picture) for picture in drawn)


def test_evaluation_counts_every_right_scene(qwen):
    from quickstart import evaluate

    documents = torch.nn.functional.normalize(torch.eye(12, 64)[:, None].expand(12, 64, 64), dim=-1)
    queries = torch.nn.functional.normalize(documents[:3, :16] + 0.5 * documents[3:6, :16], dim=-1)  # best: 0, 1, 2
    relevant = torch.zeros(3, 12, dtype=torch.bool)
    relevant[0, 0] = relevant[1, 4] = True  # found first; found second
    relevant[2, [2, 5]] = True  # two right ones, found first and second
    full = evaluate(qwen, queries, documents, relevant)[-1]
    assert full["recall@1"] == pytest.approx(2 / 3) and full["recall@5"] == 1
    second = 1 / torch.tensor(3.0).log2().item()
    assert full["nDCG@10"] == pytest.approx((1 + second + 1) / 3)
    assert full["bytes/document"] == 64 * 64 * 4
