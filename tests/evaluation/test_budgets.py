"""One encoding gives the right figures at every budget."""

import importlib
import multiprocessing
import sys

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import parse_eval_result_entries
from tiny_models import ROOT, WORDS, picture, tiny_encoder

from metaembed.evaluation.budgets import BudgetEvaluator, budget_table
from metaembed.evaluation.metrics import mrr, ndcg, recall
from metaembed.evaluation.mmeb import precision_at_1, table

QUERIES = {f"q{i}": word for i, word in enumerate(WORDS[:6])}
CORPUS = {f"d{i}": {"text": word, "image": picture(i)} if i % 2 else word for i, word in enumerate(WORDS)}
RELEVANT = {f"q{i}": {f"d{i}", f"d{i + 6}"} for i in range(6)}


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


def test_the_metrics_of_a_budget_equal_those_of_encoding_at_that_budget(encoder):
    evaluator = BudgetEvaluator(QUERIES, CORPUS, RELEVANT, budgets=encoder[0].model.config.budgets, name="val")
    metrics = evaluator.budget_metrics(evaluator(encoder))
    assert list(metrics) == [(1, 1), (2, 4), (4, 8)]
    for (r_q, r_c), found in metrics.items():
        scores = encoder.similarity(
            encoder.encode_query(list(QUERIES.values()), num_meta=r_q),
            encoder.encode_document(list(CORPUS.values()), num_meta=r_c),
        )
        relevant = torch.tensor([[j in (i, i + 6) for j in range(len(CORPUS))] for i in range(6)])
        ranked, counts = relevant.gather(1, scores.argsort(dim=1, descending=True)), relevant.sum(dim=1)
        assert found["ndcg@10"] == pytest.approx(ndcg(ranked, counts, 10).mean().item())
        assert found["mrr@10"] == pytest.approx(mrr(ranked, counts, 10).mean().item())
        assert found["recall@5"] == pytest.approx(recall(ranked, counts, 5).mean().item())
    lines = budget_table(metrics, ["ndcg@10", "recall@1"]).splitlines()
    assert len(lines) == 5 and lines[-1].startswith(f"| (4, 8) | {metrics[4, 8]['ndcg@10']:.4f} |")


def test_the_model_defaults_do_not_shrink_an_evaluation(encoder):
    evaluator = BudgetEvaluator(QUERIES, CORPUS, RELEVANT, budgets=[(1, 1), (4, 8)], corpus_chunk_size=5)
    expected = evaluator(encoder)
    encoder[0].query_num_meta, encoder[0].document_num_meta = 2, 2
    try:
        assert evaluator(encoder) == expected
    finally:
        encoder[0].query_num_meta = encoder[0].document_num_meta = None
    assert evaluator.primary_metric == "4x8_ndcg@10"


def test_every_input_is_encoded_once(encoder):
    seen = []
    hook = encoder[0].model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        BudgetEvaluator(QUERIES, CORPUS, RELEVANT, budgets=encoder[0].model.config.budgets)(encoder)
    finally:
        hook.remove()
    assert sum(seen) == len(QUERIES) + len(CORPUS)


@pytest.mark.slow
def test_several_processes_encode_as_one(encoder, monkeypatch):
    """Processes that are forked of a server take their work pickled, as spawned ones do, and import torch once."""
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: multiprocessing.get_context("forkserver"))
    multiprocessing.set_forkserver_preload(["sentence_transformers"])
    documents = list(CORPUS.values()) * 2
    expected = encoder.encode_document(documents, num_meta=3)
    pool = encoder.start_multi_process_pool(["cpu", "cpu"])
    try:
        pooled = encoder.encode_document(documents, num_meta=3, pool=pool, chunk_size=5)
    finally:
        encoder.stop_multi_process_pool(pool)
    listed = encoder.encode_document(documents, num_meta=3, device=["cpu", "cpu"], chunk_size=5)
    for actual in (pooled, listed):
        torch.testing.assert_close(torch.stack(list(actual)), torch.stack(list(expected)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "name", ["MockRetrievalTask", "MockAny2AnyRetrievalI2TTask", "MockAny2AnyRetrievalT2ITask", "MockIT2ITask"]
)
def test_mteb_runs_at_a_budget_and_keeps_budgets_apart(encoder, tmp_path, name):
    from metaembed.evaluation.mteb import evaluate, table

    task = mteb_task(name)
    seen = []
    hook = encoder[0].model.register_forward_hook(lambda module, args, output: seen.append(output.embeddings.shape[1]))
    try:
        rows, _ = evaluate(encoder, [task], [(1, 1), (4, 8)], "you/tiny", "abc", output=str(tmp_path))
        assert set(seen) == {1, 4, 8}
        seen.clear()
        again, _ = evaluate(encoder, [mteb_task(name)], [(4, 8), (1, 1)], "you/tiny", "abc", output=str(tmp_path))
        assert again == rows[::-1] and not seen, "a cached result was computed again"
        for _ in range(2):  # a folder may have changed
            evaluate(encoder, [mteb_task(name)], [(1, 1)], "folder", output=str(tmp_path))
            assert seen
            seen.clear()
    finally:
        hook.remove()
    assert [budget for _, budget, _ in rows] == [(1, 1), (4, 8)]
    assert all(0 <= score <= 1 for _, _, score in rows)
    assert len(list((tmp_path / "results" / "you__tiny").rglob(f"{task.metadata.name}.json"))) == 2
    assert table(rows).splitlines()[-1].startswith("| mean |")


def mteb_task(name):
    """A mock task of MTEB, and one whose queries have an image and text."""
    from mteb.mocks.mock_tasks import retrieval

    if hasattr(retrieval, name):
        return getattr(retrieval, name)()
    base = retrieval.MockAny2AnyRetrievalT2ITask

    class MockIT2ITask(base):
        metadata = base.metadata.model_copy(update={"name": name, "category": "it2i"})

        def load_data(self, *args, **kwargs):
            super().load_data(*args, **kwargs)
            split = self.dataset["default"]["test"]
            rows = split["queries"].to_dict()
            split["queries"] = Dataset.from_dict({**rows, "image": [picture(i) for i in range(len(rows["id"]))]})

    return MockIT2ITask()


def test_mteb_runs_video_tasks_of_a_backbone_that_takes_video(encoder, tmp_path, monkeypatch):
    """They were refused, because the model's modalities lacked video. MTEB passes frames with channels first."""
    from mteb.mocks.mock_tasks.retrieval import MockVideoRetrievalT2V
    from mteb.models.modality_collators import FramesCollator

    from metaembed.evaluation.mteb import BudgetModel, evaluate

    videos = torch.arange(2 * 4 * 3 * 16 * 32, dtype=torch.int32).view(2, 4, 3, 16, 32).mul(7).remainder(251).byte()

    class Task(MockVideoRetrievalT2V):
        def load_data(self, *args, **kwargs):  # its own videos need a decoder; these are decoded
            corpus = Dataset.from_dict({"id": ["d1", "d2"], "video": [0, 1], "modality": ["video"] * 2})
            queries = Dataset.from_dict({"id": ["q0", "q1"], "text": ["red cat", "dog"], "modality": ["text"] * 2})
            relevant = {"q0": {"d1": 1}, "q1": {"d2": 1}}
            split = dict(queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None)
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    monkeypatch.setattr(FramesCollator, "resample_video", staticmethod(lambda video, **options: videos[video]))
    kept = []
    monkeypatch.setattr(
        BudgetModel, "_encode", lambda *a, f=BudgetModel._encode, **k: kept.append(f(*a, **k)) or kept[-1]
    )
    rows, failures = evaluate(encoder, [Task()], [(1, 1)], "folder", output=tmp_path)
    assert not failures and [budget for _, budget, _ in rows] == [(1, 1)]
    frames = [{"video": video.permute(0, 2, 3, 1).numpy()} for video in videos]
    expected = encoder.encode_document(frames, num_meta=1)
    found = next(vectors for vectors in kept if torch.allclose(vectors[0], expected[0], atol=1e-5))
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)


def test_a_task_of_mteb_that_fails_does_not_lose_the_others(encoder, tmp_path, monkeypatch, capsys):
    import evaluate_mteb

    good, bad = mteb_task("MockAny2AnyRetrievalT2ITask"), mteb_task("MockRetrievalTask")
    monkeypatch.setattr(bad, "load_data", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(evaluate_mteb.mteb, "get_tasks", lambda tasks: [bad, good])
    encoder.save_pretrained(str(tmp_path / "model"))
    options = ["--tasks", "bad", "good", "--budgets", "1,1", "4,8", "--output", tmp_path / "out"]
    options += ["--write-results", tmp_path / "model"]
    monkeypatch.setattr(sys, "argv", ["evaluate_mteb.py", *map(str, [tmp_path / "model", *options])])
    with pytest.raises(SystemExit, match=r"failed:\nMockRetrievalTask at \(1, 1\): division by zero"):
        evaluate_mteb.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        *("| task", f"| {good.metadata.name}", "| mean")
    ]
    files = sorted((tmp_path / "model" / ".eval_results").iterdir())
    assert [path.name.rpartition("-")[2] for path in files] == ["1x1.yaml", "4x8.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[1].read_text()))
    assert (entry.dataset_id, entry.task_id) == (good.metadata.dataset["path"], good.metadata.name)
    assert f"{entry.value / 100:.4f}"[:5] == lines[-1].split(" | ")[-1][:5]
    assert "with 4 query and 8 document vectors, measured by MTEB" in entry.notes


def test_a_partly_failed_row_of_the_mteb_table_is_in_no_mean():
    from metaembed.evaluation.mteb import table

    rows = [("a", (1, 1), 0.5), ("b", (1, 1), 0.1), ("b", (4, 8), 0.2)]
    assert table(rows).splitlines()[2:] == [
        *("| a | 0.5000 | failed |", "| b | 0.1000 | 0.2000 |", "| mean | 0.1000 | 0.2000 |")
    ]


def test_mteb_benchmarks_run_their_public_tasks_by_default(capsys):
    from evaluate_mteb import BENCHMARKS

    from metaembed.evaluation.mteb import public_tasks

    names = [task.metadata.name for task in public_tasks(BENCHMARKS)]
    assert len(names) == 22 and "Vidore3HrRetrieval" in names
    assert "not public: Vidore3TelecomRetrieval, Vidore3NuclearRetrieval" in capsys.readouterr().err


def test_mteb_refuses_a_budget_that_the_model_lacks(encoder):
    from metaembed.evaluation.mteb import BudgetModel

    with pytest.raises(ValueError, match="num_meta of a document must be between 1 and 8"):
        BudgetModel(encoder, (4, 64), "you/tiny")


def mmeb_rows(folder):
    """Return rows like MMEB-eval's: an image and text, and candidates of text or images, the relevant one first."""
    for i in range(8):
        picture(i, 32, 16 + 16 * (i % 2)).save(folder / f"{i}.png")
    rows = []
    for i in range(6):
        wrong = [j for j in range(8) if j != i]
        if i % 2:  # candidates are texts
            candidates = {"tgt_text": [WORDS[j] for j in (i, *wrong, i)], "tgt_img_path": [""] * 9}
        else:
            candidates = {"tgt_text": ["<|image_1|>"] * 8, "tgt_img_path": [f"{j}.png" for j in (i, *wrong)]}
        text = f"<|image_1|>\nFind what is {WORDS[i]}."
        rows.append({"qry_text": text, "qry_img_path": f"{i}.png", **candidates})
    return rows


def test_mmeb_counts_the_right_candidate_first(encoder, tmp_path):
    rows, model = mmeb_rows(tmp_path), encoder[0].model
    found = precision_at_1(model, rows, tmp_path, batch_size=3)
    for r_q, r_c in model.config.budgets:
        hits = 0
        for i, row in enumerate(rows):
            query = {"text": f"Find what is {WORDS[i]}.", "image": tmp_path / row["qry_img_path"]}
            texts = row["tgt_text"][:8] if i % 2 else [tmp_path / name for name in row["tgt_img_path"]]
            scores = model.score(
                model.encode_queries([query], num_meta=r_q), model.encode_documents(texts, num_meta=r_c)
            )
            hits += int(scores.argmax()) == 0
        assert found[r_q, r_c] == pytest.approx(hits / 6)
    assert table({"a": found, "b": found}).splitlines()[-1] == table({"a": found}).splitlines()[-1]


def test_mmeb_gives_no_credit_for_ties(encoder, tmp_path):
    rows = [{"qry_text": "a", "qry_img_path": "", "tgt_text": ["b", "b "], "tgt_img_path": ["", ""]}]
    assert set(precision_at_1(encoder[0].model, rows, tmp_path, batch_size=2).values()) == {0.0}


def test_a_subset_of_mmeb_that_fails_does_not_lose_the_others(encoder, tmp_path, monkeypatch, capsys):
    import evaluate_mmeb

    rows = mmeb_rows(tmp_path)
    subsets = {"Tiny": rows, "Broken": [{**rows[0], "qry_img_path": "gone.png"}]}
    monkeypatch.setattr(evaluate_mmeb, "load_dataset", lambda dataset, subset, split: subsets[subset])
    encoder.save_pretrained(str(tmp_path / "model"))
    options = ["--subsets", "Broken", "Tiny", "--image-dir", tmp_path, "--output", tmp_path / "out"]
    command = [*map(str, [tmp_path / "model", *options, "--write-results", tmp_path / "model"])]
    monkeypatch.setattr(sys, "argv", ["evaluate_mmeb.py", *command])
    with pytest.raises(SystemExit, match=r"failed:\nBroken: .*gone.png"):
        evaluate_mmeb.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| Tiny", "| mean"]
    files = sorted((tmp_path / "model" / ".eval_results").iterdir())
    assert [path.name for path in files] == [f"tiger-lab-mmeb-eval-tiny-{b}.yaml" for b in ("1x1", "2x4", "4x8")]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[2].read_text()))
    assert (entry.dataset_id, entry.task_id) == ("TIGER-Lab/MMEB-eval", "Tiny")
    monkeypatch.setattr(sys, "argv", ["evaluate_mmeb.py", *command, "--dataset", str(tmp_path)])
    with pytest.raises(ValueError, match="--dataset must be one, not a folder"):
        evaluate_mmeb.main()


@pytest.mark.parametrize("script", ["evaluate_mteb", "evaluate_mmeb"])
def test_results_are_written_into_a_saved_model_only(tmp_path, monkeypatch, script):
    options = [str(tmp_path), "--write-results", str(tmp_path), "--image-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [script, *options[: 3 if script == "evaluate_mteb" else 5]])
    with pytest.raises(ValueError, match="--write-results must be the folder of a saved model"):
        importlib.import_module(script).main()


@pytest.mark.slow
def test_the_evaluation_scripts_run(encoder, tmp_path, fresh_process):
    """From the command line, on a saved model: MMEB's format on disk, and the help of MTEB's."""
    encoder.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "data" / "Tiny").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    Dataset.from_list(mmeb_rows(tmp_path / "images")).to_parquet(tmp_path / "data" / "Tiny" / "test.parquet")
    card = "---\nconfigs:\n- config_name: Tiny\n  data_files: [{split: test, path: Tiny/test.parquet}]\n---\n"
    (tmp_path / "data" / "README.md").write_text(card)
    script = [ROOT / "examples" / "evaluate_mmeb.py", tmp_path / "model", "--subsets", "Tiny"]
    paths = ["--dataset", tmp_path / "data", "--image-dir", tmp_path / "images", "--output", tmp_path / "out"]
    done = fresh_process(*script, *paths)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert printed[0] == "| subset | (1,1) | (2,4) | (4,8) |" and printed[2].startswith("| Tiny | ")
    fresh_process(ROOT / "examples" / "evaluate_mteb.py", "--help").check_returncode()
