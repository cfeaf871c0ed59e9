"""The quickstart runs from end to end, and its tables and figures are right."""

import json
import random
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
import quickstart
import torch
from conftest import build_qwen2_5_vl
from figures import OTHER, RELEVANT, draw_curve, draw_sheet, plt
from PIL import Image
from quickstart import evaluate, format_table, parse_arguments
from scenes import (
    PICTOGRAMS,
    Scene,
    draw_pictogram,
    is_relevant,
    make_query,
    make_scene,
    make_task,
    name_query,
)


@pytest.fixture(autouse=True)
def tidy():
    """The quickstart sets the number of threads, and leaves its figures open."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    plt.close("all")


@pytest.mark.slow
def test_the_whole_path_runs_and_answers_a_typed_query(tmp_path, capsys):
    short = ["--output", str(tmp_path), "--steps", "3", "--batch-size", "4", "--test-scenes", "20"]
    quickstart.main(short)
    said = capsys.readouterr().out
    for name in ("AutoModel", "MultiVectorEncoder"):
        assert f"reloaded in a fresh process with {name}: largest difference" in said
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["budget"] for row in rows] == ["(1,1)", "(2,4)", "(4,8)", "(8,16)", "(16,64)"]
    assert (tmp_path / "table.md").read_text() == format_table(rows) + "\n" and format_table(rows) in said
    for name, size in (("curve.png", (1050, 600)), ("sheet.png", (880, 1672))):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == size
    before = (tmp_path / "model/model.safetensors").stat().st_mtime
    quickstart.main([*short, "--query", "cat face, red apple"])
    answer = capsys.readouterr().out
    assert '"cat face, red apple":' in answer and (tmp_path / "answer.png").is_file()
    assert (tmp_path / "model/model.safetensors").stat().st_mtime == before  # answers without training again


@pytest.mark.slow
def test_a_backbone_from_a_folder_and_a_single_budget_run_the_same_path(tmp_path, capsys, monkeypatch):
    backbone, processor = build_qwen2_5_vl()
    backbone.save_pretrained(tmp_path / "backbone")
    processor.save_pretrained(tmp_path / "backbone")
    reloaded = []
    monkeypatch.setattr(
        quickstart, "check_reload", lambda *args: reloaded.append(args)
    )  # in a process of its own above
    sizes = ["--steps", "2", "--batch-size", "4", "--test-scenes", "10", "--cell", "16"]
    source = ["--backbone", str(tmp_path / "backbone"), "--output", str(tmp_path / "out")]
    quickstart.main([*source, "--budgets", "16,64", *sizes])
    said = capsys.readouterr().out
    assert "'loss_16x64'" in said and "'loss_1x1'" not in said and len(reloaded) == 1


ROWS = [
    {"budget": "(1,1)", "recall@1": 0.7, "recall@5": 0.8, "nDCG@10": 0.75, "bytes/document": 256, "ms/query": 0.1},
    {"budget": "(2,4)", "recall@1": 0.9, "recall@5": 0.95, "nDCG@10": 0.92, "bytes/document": 1024, "ms/query": 0.2},
]


def test_the_curve_shows_every_metric_against_the_bytes_of_a_document():
    (axes,) = draw_curve(ROWS).axes
    assert axes.get_xscale() == "log" and "bytes per document" in axes.get_xlabel() and axes.get_ylabel() == "quality"
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["recall@1", "recall@5", "nDCG@10"]
    for metric in ("recall@1", "recall@5", "nDCG@10"):
        x, y = lines[metric].get_data()
        assert list(x) == [256, 1024] and list(y) == [row[metric] for row in ROWS]
    places = {note.get_text(): note.xy for note in axes.texts}
    assert places == {"(1,1)": (256, 0.7), "(2,4)": (1024, 0.9)}


def test_the_sheet_shows_each_query_with_the_pictures_it_found_and_frames_the_relevant_ones():
    scenes, _, texts = make_task(4, seed=3)
    found = torch.tensor([[2, 0, 1], [3, 1, 0]])
    relevant = torch.tensor([[True, False, False], [False, False, True]])
    cells = np.array(draw_sheet(texts[:2], found, relevant, scenes).axes, dtype=object).reshape(2, 3)
    assert [row[0].get_title(loc="left") for row in cells] == texts[:2]
    for row in range(2):
        for column in range(3):
            cell = cells[row, column]
            shown = np.asarray(cell.get_images()[0].get_array())
            assert np.array_equal(shown, np.asarray(scenes[found[row, column]].draw(48)))
            colors = {matplotlib.colors.to_hex(spine.get_edgecolor()) for spine in cell.spines.values()}
            assert colors == {matplotlib.colors.to_hex(RELEVANT if relevant[row, column] else OTHER)}
            assert not len(cell.get_xticks()) and not len(cell.get_yticks())


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
def test_a_command_line_that_cannot_work_is_refused_before_anything_is_trained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
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
def test_each_backbone_has_a_folder_of_its_own(arguments, folder):
    assert parse_arguments([*arguments, "--query", "red apple"]).output == Path("outputs") / folder


def test_the_quickstart_asks_for_sqrt_by_name():
    assert parse_arguments([]).normalize == "sqrt"


def test_scenes_are_the_same_for_the_same_seed_and_have_the_pictograms_they_list():
    scenes = [make_scene(random.Random(7)) for _ in range(2)]
    assert scenes[0] == scenes[1] and len(scenes[0].pictograms) == 6
    rng = random.Random(0)
    query = make_query(scenes[0], rng)
    assert query <= scenes[0].pictograms and 4 <= len(query) <= 6
    assert len(name_query(query, rng).split(", ")) == len(query)


def test_every_pictogram_is_drawn_and_all_differ():
    drawn = {draw_pictogram(pictogram, 16).tobytes() for pictogram in PICTOGRAMS}
    assert len(drawn) == len(PICTOGRAMS) == 64
    assert Scene(("",) * 9).draw().getextrema() == ((255, 255),) * 3
    assert all(picture != b"\xff" * len(picture) for picture in drawn)


def test_a_scene_is_relevant_to_a_query_if_it_has_all_that_the_query_names():
    scene = Scene(("🍎", "🐱", *[""] * 7))
    assert is_relevant("Cat face,  red apple", scene) and is_relevant("red apple", scene)
    assert not is_relevant("red apple, banana", scene) and not is_relevant("apple", scene)


def test_evaluation_counts_every_relevant_scene(qwen):
    documents = torch.nn.functional.normalize(torch.eye(12, 64)[:, None].expand(12, 64, 64), dim=-1)
    queries = torch.nn.functional.normalize(documents[:3, :16] + 0.5 * documents[3:6, :16], dim=-1)  # best: 0, 1, 2
    relevant = torch.zeros(3, 12, dtype=torch.bool)
    relevant[0, 0] = relevant[1, 4] = True  # found first; found second
    relevant[2, [2, 5]] = True  # two relevant ones, found first and second
    full = evaluate(qwen, queries, documents, relevant)[-1]
    assert full["recall@1"] == pytest.approx(2 / 3) and full["recall@5"] == 1
    second = 1 / torch.tensor(3.0).log2().item()
    assert full["nDCG@10"] == pytest.approx((1 + second + 1) / 3)
    assert full["bytes/document"] == 64 * 64 * 4
