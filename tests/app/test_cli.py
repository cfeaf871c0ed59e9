"""The command line: indexes and searches with a real model, says in one line what is wrong, and exits as it should."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from some_files import pdf, picture

from metaembed.app import cli
from metaembed.app.ingest import REPORT
from metaembed.app.settings import SETTINGS, read_settings, without_password

COMMANDS = ("index", "search", "info", "serve", "demo")


@pytest.fixture(scope="module")
def model(qwen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    qwen.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """An index of two pictures, two texts and a PDF of two pages, and its sources."""
    folder = tmp_path_factory.mktemp("made")
    source = folder / "source"
    source.mkdir()
    for number in range(2):
        picture(number, (32, 32)).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text("a red apple and a cat face" if number else "a blue rocket")
    pdf(source / "book.pdf", 2)
    assert run("index", source, "--model", model, "--to", folder / "index", "--dpi", 144, "--quiet") == 0
    return folder / "index", source


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


def failed(capsys, *arguments) -> str:
    """Run what must fail; return the error, which is one line."""
    capsys.readouterr()
    code = run(*arguments)
    out, err = capsys.readouterr()
    assert code in (cli.FAILED, cli.USAGE) and not out
    assert err.startswith("metaembed: ") and err.count("\n") == 1, err
    return f"{code} {err}"


def test_search_finds_a_text_by_its_words_at_every_budget(made, capsys):
    for budget in ("1,1", "4,8", "16,64"):
        assert run("search", made[0], "a red apple and a cat face", "--budget", budget, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["budget"] == [int(number) for number in budget.split(",")]
        assert len(found["hits"]) == 6 and found["ordered"]
        assert found["hits"][0].keys() >= {"id", "score", "file", "kind", "sha256"}


def test_search_prints_files_pages_and_texts(made, capsys):
    assert run("search", made[0], "a blue rocket", "--where", '{"kind": "pdf"}', "--k", 1) == 0
    out, err = capsys.readouterr()
    assert out.startswith("  1") and "book.pdf  page" in out and out.count("\n") == 1
    assert "1 of 6 documents, budget (16,64)" in err
    assert run("search", made[0], "a blue rocket", "--where", '{"file": "0.txt"}') == 0
    assert "a blue rocket" in capsys.readouterr().out


def test_search_by_a_picture_finds_it(made, capsys):
    assert run("search", made[0], "--image", made[1] / "1.png", "--k", 6, "--json") == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert len(hits) == 6
    assert run("search", made[0], "words", "--image", made[1] / "1.png", "--json") == 0


def test_info_says_what_an_index_holds(made, capsys):
    assert run("info", made[0]) == 0
    out = capsys.readouterr().out
    assert "image 2, pdf 2, text 2" in out and "(16,64)" in out and "trained" in out
    assert run("info", made[0], "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["documents"], info["vectors"], info["unreadable"]) == (6, 64, 0)


def test_unreadable_files_are_in_the_exit_code_the_report_and_the_output(model, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.txt").write_text("a red apple")
    (source / "bad\x1b[31m.png").write_bytes(b"")
    arguments = ("index", source, "--model", model, "--to", tmp_path / "index", "--vectors", 8)
    assert run(*arguments) == cli.UNREADABLE
    out, err = capsys.readouterr()
    assert "1 could not be read" in out and "bad [31m.png: it is empty" in err and "doc" in err
    assert "\x1b[31m.png" not in err
    assert json.loads((tmp_path / "index" / REPORT).read_text())["reason"] == "it is empty"
    assert run(*arguments, "--json", "--quiet") == cli.UNREADABLE
    out, err = capsys.readouterr()
    done = json.loads(out)
    assert (done["encoded"], done["kept"], done["unreadable"], err) == (0, 1, 1, "")
    assert read_settings(tmp_path / "index").budgets == [[1, 1], [2, 4], [4, 8], [8, 8], [16, 8]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("search", "INDEX"), "2 metaembed: give words, --image, or both"),
        (("search", "INDEX", "x", "--budget", "99,1"), "2 metaembed: --budget must be Q,D from 1,1 to 16,64"),
        (("search", "INDEX", "x", "--budget", "four"), "2 metaembed: --budget must be Q,D"),
        (("search", "INDEX", "x", "--where", "{"), "2 metaembed: --where must be JSON"),
        (("search", "INDEX", "x", "--where", "[1]"), "2 metaembed: --where must be a JSON object"),
        (("search", "INDEX", "x", "--where", '{"a": {"$no": 1}}'), "2 metaembed: --where is no filter: there is no"),
        (("search", "INDEX", "x", "--where", '{"a": [1]}'), "2 metaembed: --where is no filter: $eq compares"),
        (("search", "INDEX", "--image", "nowhere.png"), "2 metaembed: nowhere.png: No such file"),
        (("search", "INDEX", "x", "--k", "0"), "2 metaembed: "),
        (("search", "nowhere", "x"), "1 metaembed: there is no index nowhere"),
        (("info", "nowhere"), "1 metaembed: there is no index nowhere"),
        (("search",), "2 metaembed: "),
        (("nothing",), "2 metaembed: "),
        (("index", "--to", "new"), "2 metaembed: new is no index yet"),
        (("index", "nowhere", "--to", "INDEX"), "2 metaembed: the source nowhere is not there"),
        (("index", "SOURCE", "--to", "INDEX", "--dpi", "99"), "2 metaembed: INDEX was made with --dpi 144"),
        (("index", "SOURCE", "--to", "INDEX", "--model", "other"), "2 metaembed: INDEX was made with --model"),
        (
            ("index", "SOURCE", "--to", "new", "--model", "./no/such/model"),
            "1 metaembed: the model ./no/such/model cannot",
        ),
        (("index", "SOURCE", "--to", "new", "--model", "x", "--columns", "y"), "2 metaembed: --columns must be"),
        (("index", "SOURCE", "--to", "SOURCE", "--model", "MODEL"), "1 metaembed: SOURCE is not empty"),
        (("index", "SOURCE", "--to", "new", "--model", "MODEL", "--vectors", "65"), "2 metaembed: --vectors must be"),
    ],
)
def test_an_error_is_one_line_with_the_exit_code_of_its_kind(made, model, capsys, arguments, words, monkeypatch):
    monkeypatch.chdir(made[1].parent)
    names = {"INDEX": str(made[0]), "SOURCE": str(made[1]), "MODEL": str(model)}
    for name, path in names.items():
        words = words.replace(name, path)
    assert failed(capsys, *(names.get(argument, argument) for argument in arguments)).startswith(words)
    assert not (made[1] / SETTINGS).exists() and not Path("new").exists()


def test_an_interrupt_is_one_line_and_130(made, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("metaembed.app.ingest.ingest", interrupt)
    assert run("index", made[1], "--to", made[0]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "metaembed: interrupted; the same command goes on where it was\n"


def test_help_fits_a_screen(capsys):
    for command in ((), *((name,) for name in COMMANDS)):
        assert run(*command, "--help") == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 24 and max(map(len, lines)) <= 80, command


@pytest.mark.parametrize("command", [(), ("search",)])
def test_help_imports_neither_torch_nor_transformers(command):
    code = "import sys; from metaembed.app.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and " ".join(["Usage: metaembed", *command]) in done.stdout, done.stderr
    assert {"torch", "transformers", "numpy"}.isdisjoint(done.stdout.splitlines()[-1].split())


def test_info_imports_no_transformers(made, fresh_process):
    code = """
import sys
from metaembed.app.cli import main
del sys.modules["transformers"]  # as if it had not been imported yet
try:
    main(["info", *sys.argv[1:]])
finally:
    assert "transformers" not in sys.modules
"""
    done = fresh_process("-c", code, made[0])
    assert done.returncode == 0 and "image 2, pdf 2, text 2" in done.stdout, done.stderr


def test_serve_and_demo_say_what_to_install_when_a_part_is_missing(made, capsys, monkeypatch):
    for command, module in (("serve", "server"), ("demo", "page")):
        monkeypatch.setitem(sys.modules, f"metaembed.app.{module}", None)
        assert "pip install 'metaembed[app]'" in failed(capsys, command, made[0])


def test_serve_and_demo_pass_on_where_to_listen(made, capsys, monkeypatch):
    for command, module, name, port in (("serve", "server", "serve", 8000), ("demo", "page", "launch", 7860)):
        asked = {}
        part = types.SimpleNamespace(**{name: lambda index, asked=asked, **kwargs: asked.update(kwargs, index=index)})
        monkeypatch.setitem(sys.modules, f"metaembed.app.{module}", part)
        assert run(command, made[0]) == 0
        expected = {"index": str(made[0]), "host": "127.0.0.1", "port": port, "model": None, "device": None}
        assert {name: asked.get(name, "not there") for name in expected} == expected


def test_serve_passes_on_what_requests_may_do(made, monkeypatch):
    asked = {}
    part = types.SimpleNamespace(serve=lambda index, **kwargs: asked.update(kwargs))
    monkeypatch.setitem(sys.modules, "metaembed.app.server", part)
    allowed = ["--allow-host", "*.example.com", "--allow-folder", "photos", "--allow-folder", "papers"]
    assert run("serve", made[0], "--read-only", *allowed) == 0
    assert asked["read_only"] and asked["allow_hosts"] == ("*.example.com",)
    assert asked["allow_folders"] == ("photos", "papers")


def test_a_pipe_that_is_closed_early_ends_in_silence(made, capsys, monkeypatch):
    def closed(text):
        raise BrokenPipeError(32, "Broken pipe")

    before = sys.stdout
    monkeypatch.setattr(cli, "_out", closed)
    assert run("info", made[0]) == cli.FAILED
    sys.stdout = before
    assert capsys.readouterr() == ("", "")


def test_passwords_are_not_written():
    assert without_password("postgresql://me:secret@host:5432/db?table=t") == "postgresql://me@host:5432/db?table=t"
    assert without_password("http://host:6333/pages") == "http://host:6333/pages"
