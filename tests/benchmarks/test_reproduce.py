"""`make reproduce` runs end to end, repeats no run, resumes an interrupted one, and writes its page from results."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_bert

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import reproduce
from reproduction import execute, manuals, report, results, tasks
from reproduction.objectives import objective
from reproduction.report import Point, chosen_at, verdict
from reproduction.results import interval, pack, unpack
from reproduction.runs import ALL, CHOICES, DIAL, MMR, PAPER, RIVALS, TASKS, Run, plan
from reproduction.vectors import Encoder, Vectors, keep_meta, pool_agc, pool_ward

from metaembed.retrieval.pooling import pool
from metaembed.training.losses import MMRLoss

TINY = {
    "pictures": replace(TASKS["pictures"], steps=3, batch=4, warmup=1, test=12),
    "manuals": replace(TASKS["manuals"], steps=2, batch=4, warmup=1, length=12),
}


@pytest.fixture(autouse=True)
def tidy(monkeypatch):
    """Small vocabularies and byte dials; the number of threads as it was."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(tasks, "VOCABULARY", 20)
    monkeypatch.setattr(results, "DRAWS", 50)
    monkeypatch.setattr(execute, "DIMENSIONS", {"pictures": (16,), "manuals": (16,)})
    yield
    torch.set_num_threads(threads)


def tiny(*methods, task="pictures", seeds=(0,)):
    return [Run(task, method, seed, TINY[task]) for seed in seeds for method in methods]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Returns a function that calls the command with these runs as its plan."""

    def call(runs, *arguments):
        for module in (reproduce, report):
            monkeypatch.setattr(module, "plan", lambda form: runs)
        folders = [word for name in ("results", "state", "docs") for word in (f"--{name}", str(tmp_path / name))]
        reproduce.main([*folders, *arguments])
        return tmp_path

    return call


def test_a_tiny_run_of_every_kind_ends_in_a_page_with_its_tables_and_plots(command):
    folder = command(tiny(MMR, PAPER[1], PAPER[2], *RIVALS, DIAL))
    page = (folder / "docs/reproduction.md").read_text()
    for text in ("The paper's claims", "(16,64)", "full dial", "attention-guided", "to 4,096 B", "1 of 1"):
        assert text in page
    for image in ("reproduction-pictures", "quality-against-bytes"):
        assert (folder / f"docs/images/{image}.png").stat().st_size > 1000
    assert not list((folder / "state").glob("*.safetensors"))


def test_a_finished_run_is_never_repeated_and_the_page_comes_from_the_results_alone(command, monkeypatch, capsys):
    runs = tiny(PAPER[3], seeds=(0, 1))
    folder = command(runs)
    first = (folder / "docs/reproduction.md").read_text()
    monkeypatch.setattr(execute, "execute", lambda *arguments: pytest.fail("ran again"))
    command(runs)
    command(runs, "--report")
    assert (folder / "docs/reproduction.md").read_text() == first
    capsys.readouterr()
    command([*runs, *tiny(MMR)], "--list")
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == ["done", "done", "left"]


def test_an_interrupted_run_resumes_to_what_it_would_have_been(tmp_path):
    (run,) = tiny(MMR)
    whole = execute.execute(run, tmp_path / "one")
    pieces = 0
    while True:  # the deadline is over after every step
        try:
            resumed = execute.execute(run, tmp_path / "two", deadline=0)
            break
        except execute.OutOfTimeError:
            pieces += 1
    assert pieces == run.settings.steps
    assert resumed["views"] == whole["views"]
    assert resumed["loss"] == whole["loss"]


def test_any_setting_gives_a_run_another_name():
    (run,) = tiny(MMR)
    others = [replace(run, seed=1), replace(run, settings=replace(run.settings, steps=4))]
    others += [replace(run, method=method) for method in (*CHOICES, DIAL)]
    assert len({run.key, *(other.key for other in others)}) == 1 + len(others)
    full = plan("full")
    assert len({run.key for run in full}) == len(full)
    assert {run.key for run in plan("quick")} < {run.key for run in full}  # the full form continues the quick one


def test_the_manuals_train_and_measure_with_a_small_bert(monkeypatch, tmp_path):
    backbone, tokenizer = build_bert()
    backbone.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    pairs = [(f"red apple {i}", "a cat face on the table and a key " * (i % 3 + 1)) for i in range(9)]
    books = {"users": pairs, "gnuplot": [*pairs, ("Red Apple 0", "a guitar")]}
    monkeypatch.setattr(manuals, "read_pairs", lambda folder: books)
    monkeypatch.setattr(manuals, "fetch_backbone", lambda folder: tmp_path / "bert")
    tasks.open_task.cache_clear()
    for run in tiny(ALL["untrained"], DIAL, task="manuals"):
        views = execute.execute(run, tmp_path / "state")["views"]
        assert all(0 <= view["ndcg@10"] <= 1 for view in views)
        assert len(unpack(views[0]["per_query"]["recall@1"])) == 9  # headings that are equal are one query


def test_a_section_is_what_stands_under_its_heading(tmp_path):
    text = ["Intro", "x" * 160, "1.2 Data frames", "y" * 170, "Next page", "z" * 180]
    (tmp_path / "book.pdf").write_bytes(
        make_pdf(text[:4], text[4:], [("Intro", 0), ("1.2 Data frames", 0), ("Next page", 1)])
    )
    assert manuals.read_book(tmp_path / "book.pdf") == [
        ("Intro", "x" * 160),
        ("Data frames", "y" * 170),
        ("Next page", "z" * 180),
    ]


def make_pdf(first, second, marks):
    """Return a PDF of two pages of lines, with bookmarks (title, page)."""
    parts = ["<< /Type /Catalog /Pages 2 0 R /Outlines 8 0 R >>", "<< /Type /Pages /Kids [3 0 R 4 0 R] /Count 2 >>"]
    font = "/Resources << /Font << /F << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    parts += [f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 3000 800] /Contents {n} 0 R {font} >>" for n in (5, 6)]
    for lines in (first, second):
        body = "BT /F 10 Tf 20 700 Td " + " ".join(f"({line}) Tj 0 -20 Td" for line in lines) + " ET"
        parts.append(f"<< /Length {len(body)} >>\nstream\n{body}\nendstream")
    last = 8 + len(marks)
    parts += ["null", f"<< /Type /Outlines /First 9 0 R /Last {last} 0 R /Count {len(marks)} >>"]
    for i, (title, page) in enumerate(marks):
        links = (f"/Next {10 + i} 0 R" if i + 1 < len(marks) else "") + (f" /Prev {8 + i} 0 R" if i else "")
        parts.append(f"<< /Title ({title}) /Parent 8 0 R {links} /Dest [{3 + page} 0 R /Fit] >>")
    body, offsets = "%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{part}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(parts) + 1
    tail = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return f"{body}xref\n0 {size}\n0000000000 65535 f \n{table}{tail}".encode()


def test_fewer_meta_tokens_are_what_the_processor_would_have_appended():
    (run,) = tiny(MMR)
    model = tasks.task_of(run).task.model(MMR)
    ids = {"query": model.config.query_token_ids, "document": model.config.document_token_ids}
    texts = ["red apple", "a key and a guitar on the table"]
    features = model.processor.process_queries(texts)
    for count in (0, 1, 4):
        kept, is_meta = keep_meta(dict(features), ids, "query", count)
        assert is_meta.sum(dim=1).tolist() == [count, count]
        if count:
            expected = model.processor.process_queries(
                ["red apple", "a key and a guitar on the table"], num_meta=count
            )
            for name in ("input_ids", "attention_mask"):
                real = expected["attention_mask"].bool()
                assert torch.equal(kept[name][real], expected[name][real])


def random_vectors(lengths, meta=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(lengths), max(lengths), 6, generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    unit = torch.nn.functional.normalize
    saliency = torch.rand(mask.shape, generator=generator) * mask
    meta = unit(torch.randn(len(lengths), meta, 6, generator=generator), dim=-1)
    tokens = unit(tokens, dim=-1) * mask[..., None]
    return Vectors(meta, tokens, mask, saliency=saliency / saliency.sum(dim=1, keepdim=True))


def test_pooling_in_the_loss_is_the_pooling_of_the_index():
    vectors = random_vectors([9, 3, 1])
    every = [tokens[own] for tokens, own in zip(vectors.tokens, vectors.mask, strict=True)]
    for size, (pooled, present) in zip((1, 4), pool_ward(vectors, (1, 4)), strict=True):
        for made, own, expected in zip(pooled, present, pool(every, size, "ward"), strict=True):
            assert (made[own] @ expected.T).amax(dim=1).min() > 1 - 1e-5
            assert (made[own] @ expected.T).amax(dim=0).min() > 1 - 1e-5


def test_attention_guided_clusters_are_means_weighted_by_saliency():
    vectors = random_vectors([5, 2])
    (one, present), (many, some) = pool_agc(vectors, (1, 4))
    weighted = (vectors.tokens * vectors.saliency[..., None]).sum(dim=1)
    torch.testing.assert_close(one[:, 0], torch.nn.functional.normalize(weighted, dim=-1))
    assert present.all()
    assert some.sum(dim=1).tolist() == [4, 2]  # no more clusters than tokens
    assert torch.isfinite(many).all()


def test_gradients_reach_everything_that_a_method_trains():
    for method in (MMR, DIAL, *RIVALS):
        (run,) = tiny(method)
        encoder = Encoder(tasks.task_of(run).task.model(method), method)
        task = tasks.task_of(run)
        queries, documents = task.get(0, encoder.model.processor, 0, False)
        objective(method, encoder(queries, "query"), encoder(documents, "document")).backward()
        weight = encoder.model.backbone.get_input_embeddings().weight.grad
        ids = encoder.model.config.document_token_ids[: method.meta_tokens[1]]
        reached = weight[ids].abs().sum(dim=1) > 0
        assert reached[:16].all(), method.name  # the last of 64 may win no maximum


def test_the_dial_is_trained_with_the_loss_of_the_package():
    (run,) = tiny(replace(DIAL, budgets=MMR.budgets))
    encoder = Encoder(tasks.task_of(run).task.model(run.method), run.method)
    features = tasks.task_of(run).get(0, encoder.model.processor, 0, False)
    sides = [encoder(column, side) for column, side in zip(features, ("query", "document"), strict=True)]
    terms = {"tokens_tokens": 4, "meta_tokens": 1, "tokens_meta": 1}
    loss = MMRLoss(encoder.model.to_sentence_transformers(device="cpu"), normalize="sqrt", token_terms=terms)
    parts = loss.losses(*(torch.cat([side.meta, side.tokens], dim=1) for side in sides), torch.arange(4))
    torch.testing.assert_close(objective(run.method, *sides), sum(parts.values()))


def test_results_are_kept_to_a_250th_and_intervals_hold_the_mean(monkeypatch):
    monkeypatch.setattr(results, "DRAWS", 1000)
    values = np.random.default_rng(0).random(500)
    assert np.abs(unpack(pack(values)) - values).max() <= 0.002
    mean, low, high = interval(values[None])
    assert low < mean < high
    assert high - low < 0.06
    assert interval(np.ones((3, 40))) == (1, 1, 1)


def test_no_query_chooses_what_it_is_measured_with():
    luck = np.random.default_rng(0).integers(0, 2, (40, 1, 400)).astype(float)
    points = [Point(str(i), 100, values) for i, values in enumerate(luck)]
    assert max(point.values.mean() for point in points) > 0.54  # the best of many equal ones, by luck
    (chosen,) = chosen_at(points, (128,))
    assert abs(chosen.values.mean() - 0.5) < 0.05


def test_a_claim_is_decided_by_the_whole_interval():
    assert [verdict(*ends, 0.09) for ends in ((0.1, 0.2), (0, 0.05), (0, 0.2))] == [
        "holds",
        "does not hold",
        "not decided",
    ]
