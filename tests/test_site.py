"""The documentation site builds strictly and on its own, its reference is complete, and its errors are the code's."""

import ast
import copy
import doctest
import importlib
import logging
import pkgutil
import re
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import sentence_transformers
import torch
from datasets import Dataset
from PIL import Image
from tiny_models import tiny_model
from torch.nn.functional import normalize

import metaembed
from metaembed import MetaEmbedModel, MultiVectorIndex, lora_config, to_multi_vector_encoder

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.py").is_file())
DOCS = ROOT / "docs"
DIRECTIVE = re.compile(r"^::: (\S+)", re.MULTILINE)
DOCUMENTED = sorted(name for page in (DOCS / "reference").glob("*.md") for name in DIRECTIVE.findall(page.read_text()))


# -- The site ------------------------------------------------------------------------------------------------------


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the extra `docs` is not installed")
    from mkdocs.config import load_config

    folder, warnings = tmp_path_factory.mktemp("site"), Warnings()
    logging.getLogger("mkdocs").addHandler(warnings)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=False)  # to see every warning
        mkdocs.build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(warnings)
    assert warnings.messages == []
    return folder


def test_every_page_of_the_site_has_only_parts_of_its_own(site):
    """No font, script, style or picture comes from another machine, and the theme does not ask for the stars."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*>", html)
        foreign = [tag for tag in tags if re.search(r'(?:src|href)="?(?:https?:)?//', tag)]
        assert [tag for tag in foreign if 'rel="canonical"' not in tag] == [], page
        assert 'data-md-component="source"' not in html
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"url\((?:https?:)?//", styles)


def test_links_out_of_the_docs_lead_to_the_repository(site):
    home = re.search(r'^HOME = "(.+)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    guide = (site / "guides" / "fine-tune.html").read_text(encoding="utf-8")
    assert f'href="{home}/blob/main/examples/recipes/README.md"' in guide
    assert "](" not in re.sub(r"<pre.*?</pre>|<code.*?</code>", "", guide, flags=re.DOTALL)


def test_names_in_docstrings_are_links(site):
    model = (site / "reference" / "model.html").read_text(encoding="utf-8")
    assert re.search(r'href="training\.html#metaembed\.MMRLoss"[^>]*><code>MMRLoss</code></a>', model)
    assert "[<code>" not in model


def test_the_drawings_are_what_the_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "site"))
    from drawings import DRAWINGS, IMAGES

    for name, draw in DRAWINGS.items():
        assert (IMAGES / f"concept-{name}.svg").read_text(encoding="utf-8") == draw(), "python docs/site/drawings.py"


# -- The reference -------------------------------------------------------------------------------------------------


def public_names():
    """What the package offers, and what its folders say that they do."""
    yield from (f"metaembed.{name}" for name in metaembed.__all__)
    yield from (f"metaembed.stores.{name}" for name in importlib.import_module("metaembed.stores").__all__)


@pytest.mark.parametrize("name", sorted(public_names()))
def test_every_public_name_is_in_the_reference(name):
    documented = {id(pkgutil.resolve_name(known)) for known in DOCUMENTED}
    assert id(pkgutil.resolve_name(name)) in documented


METHODS = (FunctionType, classmethod, staticmethod, property)


class AnyOutput(doctest.OutputChecker):
    """Accepts any output where an example shows none."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, as it was loaded from its folder."""
    model = tiny_model(hidden_size=64, layers=4, num_query_tokens=16, num_document_tokens=64, token_projection=True)
    folder = tmp_path_factory.mktemp("trained") / "model"
    model.save_pretrained(folder)
    return MetaEmbedModel.from_pretrained(folder)


def documents_to_search():
    torch.manual_seed(0)
    documents = normalize(torch.randn(50, 64, 64), dim=-1)
    return documents, normalize(documents[:8, :16] + 0.1 * torch.randn(8, 16, 64), dim=-1)


def retrieval_names():
    documents, queries = documents_to_search()
    return {"documents": documents, "queries": queries, "relevant": torch.eye(8, 50, dtype=torch.bool)}


def evaluation_names():
    queries, corpus = {"q": "a red apple"}, {f"d{i}": f"the number {i}" for i in range(12)}
    return {"queries": queries, "corpus": corpus, "relevant": {"q": {"d1"}}}


def full_dial_names(model):
    pages = ["red", "green", "blue"]
    parts = model.encode_documents(pages, tokens=16)
    new = {name: MultiVectorIndex.create(None, part.shape[1], 64) for name, part in parts._asdict().items()}
    return {"pages": pages * 4, "ids": [str(i) for i in range(12)], **new}


def surroundings(name, model, tmp_path):
    """The variables that the example of `name` takes for granted."""
    Image.new("RGB", (224, 224), "white").save(tmp_path / "apple.png")
    last = name.rpartition(".")[2]
    given = {
        "torch": torch,
        "Image": Image,
        **{name: getattr(sentence_transformers, name) for name in dir(sentence_transformers) if "MultiVector" in name},
        "dataset": Dataset.from_dict({"query": ["red", "cat"], "positive": ["a red apple", "a cat face"]}),
        "model": model,
        "processor": model.processor,
        "encoder": to_multi_vector_encoder(model),
        **{known.rpartition(".")[2]: pkgutil.resolve_name(known) for known in DOCUMENTED},
        **{known: getattr(metaembed, known) for known in metaembed.__all__},
    }
    if name.startswith("metaembed.training.distill"):
        vectors = documents_to_search()[0]
        given |= {"teacher": model, "queries": ["red", "green"], "index_vectors": vectors}
    elif last == "BudgetEvaluator":
        given |= evaluation_names()
    elif last == "BudgetModel":
        tasks = SimpleNamespace(tasks=[])  # MTEB would download them
        given["mteb"] = SimpleNamespace(get_benchmark=lambda name: tasks, evaluate=lambda model, tasks: [])
    elif last == "MetaEmbedTrainer":
        given["args"] = sentence_transformers.MultiVectorEncoderTrainingArguments("out", max_steps=1, report_to="none")
    elif last == "create_app":
        MultiVectorIndex.create("my-index", vectors=64, dim=64)
    elif last == "merge_adapter":
        model.add_adapter(lora_config(model))
    elif last == "search_full_dial":
        given |= full_dial_names(model)
    else:
        given |= retrieval_names()
    return given


def examples():
    """The documented objects, with their methods, that have an example in their docstring."""
    for name in DOCUMENTED:
        thing = pkgutil.resolve_name(name)
        parts = {name: thing}
        if isinstance(thing, type):
            parts |= {f"{name}.{key}": part for key, part in vars(thing).items() if isinstance(part, METHODS)}
        for part, value in parts.items():
            if ">>>" in (value.__doc__ or ""):
                yield pytest.param(value.__doc__, id=part)


@pytest.mark.parametrize("text", list(examples()))
def test_the_examples_of_docstrings_run(text, request, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = request.node.callspec.id
    text = text.replace("you/your-metaembed", trained.name_or_path)
    given = surroundings(name, copy.deepcopy(trained), tmp_path)
    test = doctest.DocTestParser().get_doctest(text, given, name, None, 0)
    report = []
    runner = doctest.DocTestRunner(AnyOutput(), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    failed = runner.run(test, out=report.append).failed
    assert not failed, "".join(report)


# -- The errors ----------------------------------------------------------------------------------------------------


def messages():
    """The text of every string of the package, with … where a value is put in."""
    files = [*ROOT.glob("*.py"), *(path for mark in ROOT.glob("*/__init__.py") for path in mark.parent.rglob("*.py"))]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_error_that_the_page_explains_is_one_of_the_package():
    page = (DOCS / "faq.md").read_text(encoding="utf-8")
    explained = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(explained) >= 20
    known = list(messages())
    assert [text for text in explained if not any(text in message for message in known)] == []
