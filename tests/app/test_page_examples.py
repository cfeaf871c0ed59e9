"""The Space and the document of the search page are what they say."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from pages import make_index
from PIL import Image

from metaembed.app import page as page_module
from metaembed.app.page import Search, build
from metaembed.app.settings import open_index
from metaembed.app.source import Source

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.py").is_file())
SPACE = ROOT / "examples" / "space"


def test_the_space_searches_the_documents_beside_it_wherever_they_were_indexed(tmp_path, monkeypatch):
    index, encoder = make_index(tmp_path)
    (tmp_path / "files").rename(tmp_path / "documents")
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    started = []
    monkeypatch.setattr(app, "HERE", tmp_path)
    monkeypatch.setattr(app, "launch", lambda *arguments, **options: started.append((arguments, options)))
    monkeypatch.setenv("EXAMPLES", "red apple; blue fish")
    app.main()
    (folder, model), options = started[0]
    assert folder == index and model == "tiny" and options["examples"] == ["red apple", "blue fish"]
    search = Search(open_index(folder), encoder, Source(options["settings"]))
    state, _ = search.narrow(search.ask("red apple", None), 4, 8)
    assert search.cards(state).count('src="data:image/webp') == 8, "all but the text have a picture"


def test_the_front_matter_of_the_space_names_what_is_there():
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", (SPACE / "README.md").read_text(), re.DOTALL)[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    assert "metaembed[app]" in (SPACE / "requirements.txt").read_text()
    assert len(front["short_description"]) <= 60, "longer ones are refused"


def test_the_example_of_the_document_runs(qwen):
    text = (ROOT / "docs" / "search-page.md").read_text(encoding="utf-8")
    given = {"model": qwen, "picture": Image.new("RGB", (64, 32), "white")}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], given)
    assert given["seen"].grid == (2, 4)


def test_the_example_of_the_command_line_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    index, _ = make_index(tmp_path)
    index.rename(tmp_path / "my-index")
    monkeypatch.chdir(tmp_path)
    given = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(block, given)
    assert given["settings"].path_of(given["document"].metadata).is_relative_to(tmp_path / "files")


def test_the_pictures_of_the_document_are_small():
    pictures = list((ROOT / "docs" / "images").glob("search-*.png"))
    assert pictures and all(path.stat().st_size < 300_000 for path in pictures)


def test_a_model_that_takes_no_pictures_is_offered_none(tmp_path, monkeypatch):
    index, encoder = make_index(tmp_path)
    search = Search(open_index(index), encoder, Source(None))
    for takes in (True, False):
        monkeypatch.setattr(type(encoder), "takes_images", takes)
        shown = [one for one in build(search).blocks.values() if isinstance(one, page_module.gr.Image)]
        assert [one.visible for one in shown] == [takes]


@pytest.mark.parametrize("name", ["page.py", "page_html.py", "attention.py", "source.py"])
def test_no_file_names_an_address_to_load_from(name):
    assert not re.search(r"https?://", (ROOT / "app" / name).read_text(encoding="utf-8"))
