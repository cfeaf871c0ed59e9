"""From folders and datasets to an index: everything is accounted for, once, whatever happens on the way."""

import json
import os
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest
import torch
from hash_encoder import HashEncoder
from some_files import messy, pdf, picture

from metaembed import MultiVectorIndex
from metaembed.app import ingest as ingestion
from metaembed.app.ingest import REPORT, begin, ingest
from metaembed.app.pdf import PdfReader
from metaembed.app.settings import Settings, open_index, read_settings
from metaembed.app.sources import Columns, split

TESTS = Path(__file__).parent.parent


def run(index, *sources, encoder=None, options=None, vectors=4, **kwargs):
    encoder = encoder or HashEncoder()
    begin(index, encoder, Settings(model="hash", vectors=vectors, options=options or {}), quantization="float32")
    return ingest(index, list(map(str, sources)), encoder, **kwargs)


def content(index):
    """All that an index holds, byte for byte, by id."""
    with MultiVectorIndex.open(index) as opened:
        return {one.id: (one.embedding.numpy().tobytes(), one.metadata) for one in opened}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(5):
        picture(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"text {number}")
    pdf(folder / "book.pdf", 12)
    return folder


def test_each_of_200_files_is_accounted_for(tmp_path):
    expected = messy(tmp_path / "source")
    assert len(expected) == 200
    encoder = HashEncoder()
    summary = run(tmp_path / "index", tmp_path / "source", encoder=encoder)
    found = {problem.file: problem.status for problem in summary.problems}
    assert len(found) == len(summary.problems)
    documents = content(tmp_path / "index")
    found |= {metadata["file"]: metadata["kind"] for _, metadata in documents.values()}
    assert found == expected
    assert all(problem.reason for problem in summary.problems)
    assert summary.encoded == encoder.encoded == len(documents)
    assert {f"book.pdf#page={page}" for page in range(1, 31)} <= documents.keys()
    report = [json.loads(line) for line in (tmp_path / "index" / REPORT).read_text().splitlines()]
    assert {one["file"]: one["status"] for one in report} == {
        name: what for name, what in expected.items() if what in ("unreadable", "skipped")
    }
    reasons = {problem.file: problem.reason for problem in summary.problems}
    assert "password" in reasons["encrypted.pdf"] and "empty" in reasons["empty.png"]
    assert "truncated" in reasons["truncated.png"] and "UTF-8" in reasons["latin.txt"]


def test_documents_say_where_they_are_from(source, tmp_path):
    (source / "long.md").write_text("words " * 1000)
    run(tmp_path / "index", source)
    documents = {i: metadata for i, (_, metadata) in content(tmp_path / "index").items()}
    page = documents["book.pdf#page=3"]
    assert (page["file"], page["page"], page["kind"], page["source"]) == ("book.pdf", 3, "pdf", 0)
    assert len(page["sha256"]) == 64 and page["sha256"] == documents["book.pdf#page=4"]["sha256"]
    assert documents["2.txt"]["text"] == "text 2" and "page" not in documents["2.txt"]
    assert documents["long.md#part=2"]["part"] == 2 and len(documents["long.md#part=1"]["text"]) <= 200
    settings = read_settings(tmp_path / "index")
    assert settings.path_of(page) == source / "book.pdf"
    assert settings.path_of({"source": 0, "file": "../secret"}) is None
    assert settings.path_of({}) is None


def test_a_second_run_encodes_nothing(source, tmp_path):
    assert run(tmp_path / "index", source).encoded == 22
    encoder = HashEncoder()
    summary = run(tmp_path / "index", source, encoder=encoder)
    assert (summary.encoded, summary.kept, encoder.encoded) == (0, 22, 0)


def test_a_source_need_not_be_named_again(source, tmp_path):
    run(tmp_path / "index", source)
    (source / "new.txt").write_text("new")
    assert run(tmp_path / "index").encoded == 1


def test_two_sources_with_files_of_one_name_are_kept_apart(source, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "1.txt").write_text("another text")
    (source / "1:1.txt").write_text("a name like the id of another source")
    assert run(tmp_path / "index", source, other).encoded == 24
    documents = content(tmp_path / "index")
    assert documents["1.txt"][1]["text"] == "text 1" and documents["1:1.txt"][1]["text"] == "another text"
    assert documents["0:1:1.txt"][1]["source"] == 0


def test_sync_encodes_what_changed_and_deletes_what_is_gone(source, tmp_path):
    run(tmp_path / "index", source)
    (source / "1.txt").write_text("other words")
    (source / "2.txt").unlink()
    pdf(source / "book.pdf", 7, seed=1)
    kept = run(tmp_path / "index", source)
    assert kept.encoded == 0 and {problem.status for problem in kept.problems} == {"changed"}
    assert content(tmp_path / "index")["1.txt"][1]["text"] == "text 1"
    summary = run(tmp_path / "index", source, sync=True)
    assert summary.encoded == 8 and summary.deleted == 6
    fresh = run(tmp_path / "fresh", source)
    assert fresh.encoded == 16
    assert content(tmp_path / "index") == content(tmp_path / "fresh")


def test_sync_deletes_nothing_if_a_whole_source_is_gone(source, tmp_path):
    run(tmp_path / "index", source)
    for path in source.iterdir():
        path.unlink()
    summary = run(tmp_path / "index", source, sync=True)
    assert summary.deleted == 0 and "mounted" in summary.problems[0].reason
    shutil.rmtree(source)
    with pytest.raises(FileNotFoundError, match="is not there"):
        run(tmp_path / "index", source, sync=True)
    assert len(content(tmp_path / "index")) == 22


@pytest.mark.skipif(not os.geteuid(), reason="root may list any folder")
def test_sync_keeps_what_lies_in_a_folder_that_cannot_be_listed(source, tmp_path):
    (source / "below").mkdir()
    (source / "below" / "a.txt").write_text("a")
    run(tmp_path / "index", source)
    (source / "below").chmod(0)
    summary = run(tmp_path / "index", source, sync=True)
    (source / "below").chmod(0o755)
    assert summary.deleted == 0 and [problem.file for problem in summary.of("unreadable")] == ["below/"]


def test_a_folder_that_cannot_be_listed_hides_nothing(source, tmp_path, monkeypatch):
    (source / "below").mkdir()
    (source / "below" / "a.txt").write_text("a")
    run(tmp_path / "index", source)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    summary = run(tmp_path / "index", source, sync=True)
    assert summary.deleted == 0 and [problem.file for problem in summary.of("unreadable")] == ["below/"]


def test_a_file_that_fails_later_keeps_its_documents_and_is_listed(source, tmp_path):
    run(tmp_path / "index", source)
    (source / "book.pdf").write_bytes(b"%PDF-1.4 damaged")
    summary = run(tmp_path / "index", source, sync=True)
    assert summary.deleted == 0 and [problem.file for problem in summary.of("unreadable")] == ["book.pdf"]


def test_what_the_model_refuses_is_listed_and_the_rest_stored(source, tmp_path):
    encoder = HashEncoder(fail=lambda text: "text 3" in text)
    summary = run(tmp_path / "index", source, encoder=encoder)
    assert [(one.file, one.reason) for one in summary.problems] == [("3.txt", "it is too long")]
    assert summary.encoded == len(content(tmp_path / "index")) == 21
    assert run(tmp_path / "index", source).encoded == 1  # it is tried again


def test_a_file_that_changes_while_it_is_read_is_not_stored(source, tmp_path, monkeypatch):
    load = PdfReader.page

    def touch(self, path, number, **kwargs):
        if number == 5:
            os.utime(path, (1, 1))
        return load(self, path, number, **kwargs)

    monkeypatch.setattr(PdfReader, "page", touch)
    summary = run(tmp_path / "index", source, workers=1)
    assert {problem.page for problem in summary.problems} == set(range(5, 13))
    assert all("changed while it was read" in problem.reason for problem in summary.problems)


def test_pages_are_never_all_in_memory(tmp_path, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    pdf(folder / "book.pdf", 60)
    alive, most = set(), []
    read, store = ingestion._Readers.read, ingestion._Run.store_batch

    def reading(self, documents):
        alive.update(one.id for one in documents)
        most.append(len(alive))
        return read(self, documents)

    def storing(self, batch):
        store(self, batch)
        alive.difference_update(one.id for one in batch.documents)

    monkeypatch.setattr(ingestion._Readers, "read", reading)
    monkeypatch.setattr(ingestion._Run, "store_batch", storing)
    assert run(tmp_path / "index", folder, batch_size=4, workers=2).encoded == 60
    assert max(most) <= (2 + 1) * 4


KILLED = """
import json, os, random, signal, sys, threading
from hash_encoder import HashEncoder
from metaembed.app.ingest import begin, ingest
from metaembed.app.settings import Settings

index, source, log, seed = sys.argv[1:]
rng = random.Random(int(seed))


def run(seconds):
    encoder = HashEncoder(log)
    if seconds is not None:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    begin(index, encoder, Settings(model="hash", vectors=4), quantization="float32")
    ingest(index, [source], encoder, batch_size=2, workers=2)
    os._exit(0)


codes = []
for attempt in range(5):
    child = os.fork()
    if not child:
        run(None if attempt == 4 else rng.uniform(0.0, 0.4))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def test_killed_at_any_moment_and_started_again_it_loses_nothing_and_encodes_nothing_twice(
    source, tmp_path, fresh_process
):
    unbroken = run(tmp_path / "unbroken", source)
    log = tmp_path / "log"
    done = fresh_process("-c", KILLED, tmp_path / "index", source, log, 0, path=[TESTS])
    codes = json.loads(done.stdout)
    kills = codes.count(-signal.SIGKILL)
    assert kills and set(codes[:-1]) <= {0, -signal.SIGKILL} and codes[-1] == 0, done.stderr
    assert content(tmp_path / "index") == content(tmp_path / "unbroken")
    encoded = sum(map(int, log.read_text().split()))
    assert unbroken.encoded <= encoded <= unbroken.encoded + 2 * kills  # but for the batch on the way


@pytest.mark.parametrize("stored", [False, True])
def test_a_batch_that_was_on_the_way_is_asked_for_in_the_store(source, tmp_path, monkeypatch, stored):
    upsert = MultiVectorIndex.upsert

    def fail(self, *args, **kwargs):
        if stored:
            upsert(self, *args, **kwargs)
        raise OSError("killed")

    monkeypatch.setattr(MultiVectorIndex, "upsert", fail)
    with pytest.raises(OSError, match="killed"):
        run(tmp_path / "index", source)
    monkeypatch.undo()
    encoder = HashEncoder()
    assert run(tmp_path / "index", source, encoder=encoder).encoded == (14 if stored else 22)
    assert len(content(tmp_path / "index")) == 22


def test_what_was_deleted_from_the_index_is_encoded_again(source, tmp_path):
    run(tmp_path / "index", source)
    with MultiVectorIndex.open(tmp_path / "index") as index:
        index.delete(ids=["1.txt", "book.pdf#page=4"])
    assert run(tmp_path / "index", source).encoded == 2


def test_one_run_at_a_time(source, tmp_path):
    from filelock import FileLock

    run(tmp_path / "index", source)
    with FileLock(tmp_path / "index" / ingestion.LOCK), pytest.raises(TimeoutError, match="another process"):
        run(tmp_path / "index", source)


def test_an_index_of_others_is_left_alone(tmp_path, source):
    index = MultiVectorIndex.create(tmp_path / "index", vectors=4, dim=8)
    index.add(torch.ones(1, 4, 8), ids=["a"])
    index.close()
    with pytest.raises(ValueError, match="did not put there"):
        run(tmp_path / "index", source)


def test_the_index_may_lie_inside_the_source(source):
    assert run(source / "index", source).encoded == 22
    assert run(source / "index", source).encoded == 0


def test_a_damaged_journal_is_an_error_that_says_what_to_do(source, tmp_path):
    run(tmp_path / "index", source)
    (tmp_path / "index" / ingestion.JOURNAL).write_bytes(b"damaged" * 1000)
    with pytest.raises(ValueError, match="delete it"):
        run(tmp_path / "index", source)
    for path in (tmp_path / "index").glob(f"{ingestion.JOURNAL}*"):
        path.unlink()
    assert run(tmp_path / "index", source).encoded == 22
    assert len(content(tmp_path / "index")) == 22


def test_links_are_followed_out_of_the_source_only_when_asked(source, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.txt").write_text("outside")
    os.symlink(outside, source / "out")
    os.symlink(source, outside / "back")
    assert run(tmp_path / "index", source).encoded == 22
    assert run(tmp_path / "followed", source, options={"follow_links": True}).encoded == 23


def test_pages_may_be_text(tmp_path):
    page = b"BT /F1 24 Tf 20 100 Td (red apples) Tj ET"
    content_of = b"%PDF-1.4\n1 0 obj <</Type /Catalog /Pages 2 0 R>> endobj\n"
    content_of += b"2 0 obj <</Type /Pages /Kids [3 0 R] /Count 1>> endobj\n"
    content_of += b"3 0 obj <</Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents 4 0 R /Resources "
    content_of += b"<</Font <</F1 <</Type /Font /Subtype /Type1 /BaseFont /Helvetica>>>>>>>> endobj\n"
    content_of += b"4 0 obj <</Length %d>> stream\n%s\nendstream endobj\n" % (len(page), page)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.pdf").write_bytes(content_of + b"trailer <</Root 1 0 R /Size 5>>\n%%EOF\n")
    pdf(tmp_path / "source" / "scanned.pdf", 1)
    summary = run(tmp_path / "index", tmp_path / "source", options={"pages": "text"})
    assert content(tmp_path / "index")["a.pdf#page=1"][1]["text"] == "red apples"
    assert [problem.file for problem in summary.problems] == ["scanned.pdf"]
    assert "scanned" in summary.problems[0].reason


def test_a_crash_of_the_renderer_costs_one_page(source, tmp_path, monkeypatch):
    ask = PdfReader._ask

    def crash(self, **request):
        if request.get("page") == 3:
            self._started().kill()
        return ask(self, **request)

    monkeypatch.setattr(PdfReader, "_ask", crash)
    summary = run(tmp_path / "index", source)
    assert [(one.file, one.page) for one in summary.problems] == [("book.pdf", 3)]
    assert "crashed" in summary.problems[0].reason and summary.encoded == 21


def test_a_page_that_takes_too_long_is_given_up(source):
    reader = PdfReader(timeout=0.5)
    reader._started()
    os.kill(reader._process.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match=r"more than 0\.5 seconds"):
        reader.count(source / "book.pdf")
    reader.timeout = 60
    assert reader.count(source / "book.pdf") == 12
    reader.close()


def test_large_pages_are_rendered_at_a_lower_resolution(tmp_path):
    pdf(tmp_path / "a.pdf", 1)
    reader = PdfReader(dpi=600, most_pixels=1000)
    image, _ = reader.page(tmp_path / "a.pdf", 1)
    reader.close()
    assert image.width * image.height <= 1100


def test_text_is_split_at_paragraphs_and_nothing_is_lost():
    text = "\n\n".join(f"Paragraph {number}. " + "word " * 50 for number in range(20)) + "x" * 700
    parts = split(text, 600)
    assert max(map(len, parts)) <= 600
    assert "".join(text.split()) == "".join("".join(parts).split())
    assert all(part.startswith("Paragraph") for part in parts[:-2])
    assert split("", 100) == [] and split("short", 100) == ["short"]


def test_a_store_has_its_settings_in_a_folder_beside(source, tmp_path, monkeypatch):
    pytest.importorskip("qdrant_edge")
    monkeypatch.chdir(tmp_path)
    address = "qdrant+edge:pages"

    def again(**kwargs):
        encoder = HashEncoder()
        begin(address, encoder, Settings(model="hash", vectors=4))
        return ingest(address, [str(source)], encoder, **kwargs)

    assert again().encoded == 22
    (source / "1.txt").unlink()
    summary = again(sync=True)
    assert (summary.encoded, summary.kept, summary.deleted) == (0, 21, 1)
    assert read_settings(address) == read_settings("pages.metaembed")
    for place in (address, "pages.metaembed"):
        with open_index(place) as store:
            query = HashEncoder().encode_queries(["text 2"])
            assert len(store) == 21 and store.search(query, k=1).ids == [["2.txt"]]


# Datasets


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_of_jsonl_become_documents_and_bad_ones_are_listed(tmp_path):
    picture(1).save(tmp_path / "1.png")
    rows = [
        {"key": "a", "caption": "a red apple", "file": "1.png", "year": 2020},
        {"key": "b", "caption": "a pear", "file": None, "year": 2021},
        "{not json",
        {"key": "c", "caption": None, "file": "/etc/hostname", "year": 1},
        {"key": "d", "caption": None, "file": "http://127.0.0.1/x.png", "year": 1},
        {"key": "a", "caption": "again", "file": None, "year": 1},
        {"key": "e", "caption": None, "file": None, "year": 1},
        {"caption": "no key"},
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = Columns(text="caption", image="file", id="key", metadata=("year",))
    summary = run(tmp_path / "index", data, columns=columns)
    assert [problem.row for problem in summary.problems] == [3, 4, 5, 6, 7, 8]
    reasons = " ".join(problem.reason for problem in summary.problems)
    for words in ("no JSON", "outside", "--allow-urls", "earlier row", "empty", "no column"):
        assert words in reasons
    documents = content(tmp_path / "index")
    assert documents.keys() == {"rows.jsonl#a", "rows.jsonl#b"}
    first = documents["rows.jsonl#a"][1]
    assert (first["year"], first["row"], first["kind"], first["text"]) == (2020, 1, "image", "a red apple")


def test_sync_follows_the_rows_of_a_dataset(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"i": i, "t": f"text {i}"} for i in range(10)])
    columns = Columns(text="t", id="i")
    assert run(tmp_path / "index", data, columns=columns).encoded == 10
    write_jsonl(data, [{"i": i, "t": f"text {i}" if i else "other"} for i in range(8)])
    kept = run(tmp_path / "index", data, columns=columns)
    assert (kept.encoded, kept.deleted, [problem.status for problem in kept.problems]) == (0, 0, ["changed"])
    summary = run(tmp_path / "index", data, columns=columns, sync=True)
    assert (summary.encoded, summary.kept, summary.deleted) == (1, 7, 2)


def test_rows_of_parquet_hold_pictures_as_datasets_writes_them(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    picture(1).save(tmp_path / "1.png")
    bytes_of = (tmp_path / "1.png").read_bytes()
    images = [{"bytes": bytes_of, "path": None}, {"bytes": bytes_of[:-30], "path": None}]
    table = pyarrow.table({"image": images, "name": ["whole", "half"], "unused": [1, 2]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    summary = run(tmp_path / "index", tmp_path / "rows.parquet", columns=Columns(image="image", id="name"))
    assert content(tmp_path / "index").keys() == {"rows.parquet#whole"}
    assert [(one.row, one.reason) for one in summary.problems] == [(2, "image file is truncated")]
    with pytest.raises(ValueError, match="no column 'picture'"):
        run(tmp_path / "index", tmp_path / "rows.parquet", columns=Columns(image="picture"))
    with pytest.raises(ValueError, match="name its columns"):
        run(tmp_path / "index", tmp_path / "rows.parquet")


def test_a_dataset_of_the_hub_is_streamed(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"t": ["one", "two"]}).to_iterable_dataset()
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or table)
    assert run(tmp_path / "index", "lab/data", columns=Columns(text="t", split="test")).encoded == 2
    assert asked == [(("lab/data", None), {"split": "test", "streaming": True})]
    assert content(tmp_path / "index").keys() == {"lab/data#row=1", "lab/data#row=2"}


def test_a_journal_is_a_file_that_others_can_read(source, tmp_path):
    run(tmp_path / "index", source)
    with sqlite3.connect(tmp_path / "index" / ingestion.JOURNAL) as database:
        assert database.execute("SELECT COUNT(*) FROM documents WHERE stored").fetchone() == (22,)
