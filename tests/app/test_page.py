"""The search page without a browser: what its events answer, and what its server refuses."""

import dataclasses
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pages import TEXT, make_search
from PIL import Image

from metaembed import MultiVectorIndex
from metaembed.app import page as page_module
from metaembed.app.page import Events, Search, launch, snap
from metaembed.app.source import Source

PICTURE = Image.new("RGB", (48, 48), (200, 30, 30))


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    return make_search(tmp_path_factory.mktemp("page"))


def asked(search, words="red apple", r_q=4, r_c=8):
    return search.narrow(search.ask(words, None), r_q, r_c)[0]


def test_results_are_those_of_the_index_at_the_budget_that_was_chosen(search):
    query = search.encoder.encode_queries(["red apple"])
    for r_q, r_c in ((1, 1), (2, 4), (4, 8)):
        found = search.index.search(query[:, :r_q], k=9, budget=(r_q, r_c))
        assert [hit[0] for hit in asked(search, r_q=r_q, r_c=r_c).hits] == found.ids[0]


def test_another_budget_does_not_encode_the_query_again(search, monkeypatch):
    before = asked(search)
    monkeypatch.setattr(search.encoder, "encode_queries", None)
    after, seconds = search.narrow(before, 1, 1)
    assert after.budget == (1, 1) and after.encoding == before.encoding and seconds > 0


def test_words_and_a_picture_are_searched_for_together(search):
    both = search.ask("red", PICTURE).query
    assert torch.equal(both, search.encoder.encode_queries([{"image": PICTURE, "text": "red"}])[0])
    assert torch.equal(search.ask("", PICTURE).query, search.encoder.encode_queries([PICTURE])[0])
    assert search.ask("  ", None) is None


def test_a_text_that_names_a_file_or_a_url_is_text(search):
    name = "file:///etc/hostname"
    assert torch.equal(search.ask(name, None).query, search.encoder.encode_queries([{"text": name}])[0])


@pytest.mark.parametrize(("value", "expected"), [(1, 1), (3, 4), (12, 16), (30, 16), (33, 64), (64, 64), (900, 64)])
def test_a_budget_between_those_that_were_trained_is_the_nearest_by_ratio(value, expected):
    assert snap(value, [1, 4, 16, 64]) == expected


def test_a_larger_budget_costs_more_bytes_a_document(search):
    rows = [search._bytes(asked(search), r_c) for r_c in (1, 4, 8)]
    assert rows == [36, 144, 288] and rows[-1] == search.index.bytes_per_document
    assert "288 B" in search.summary(asked(search), 0.001)


def test_a_result_shows_its_picture_its_page_or_its_words_with_its_score(search):
    shown = search.cards(asked(search))
    assert shown.count("<li>") == 9 and shown.count('src="data:image/webp;base64,') == 8
    assert "report.pdf, page 2, score" in shown and "red apple green &lt;b&gt;boat" in shown.replace(
        "\n", " "
    ).replace("  ", " ")
    assert "<b>" not in shown, "what documents say is text"


def test_every_budget_is_shown_side_by_side(search):
    shown = search.compare(asked(search))
    assert all(f"({r_q}, {r_c})</th>" in shown for r_q, r_c in search.budgets)
    assert shown.count("<tr") == 1 + len(search.budgets) and "5 of 5" in shown


@pytest.mark.parametrize("words", ["red apple", "blue fish"])
def test_each_meta_token_shows_where_it_looked(search, words):
    state = asked(search, words)
    for rank, (id, _, metadata) in enumerate(state.hits):
        seen, shown = search.look(search.choose(state, rank), None, "document", 2, "last")
        assert ("me-tokens" in shown) == (metadata["kind"] == "text") != ("data:image/webp" in shown), id
        assert seen.of == id
    shown = search.look(state, seen, "query", 1, "mean of all")[1]
    assert "me-tokens" in shown and "of the score" in shown


def test_the_first_meta_token_that_is_shown_gives_the_most_to_the_score(search):
    state = asked(search)
    similarity = state.query @ search.index.get([state.chosen])[0].embedding.T
    best, winner = similarity.max(1)
    shares = [best[winner == meta].sum().item() for meta in range(8)]
    assert search.best_meta(state, "document") == max(range(8), key=shares.__getitem__)
    assert best.sum().item() == pytest.approx(state.hits[0][1], abs=0.05)


def test_attention_is_computed_once_for_a_document(search, monkeypatch):
    state = asked(search)
    for side in ("document", "query"):
        seen, _ = search.look(state, None, side, 0, "last")
        with monkeypatch.context() as patch:
            patch.setitem(search.__dict__, "_reader", None)
            assert "of its attention" in search.look(state, seen, side, 3, "last")[1]


def test_a_file_outside_of_the_sources_or_gone_is_neither_opened_nor_an_error(search, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"")
    source = search.source
    for file in ("../secret.png", str(tmp_path / "secret.png"), "gone.png", "/etc/passwd", ""):
        metadata = {"source": 0, "file": file, "kind": "image"}
        with pytest.raises(ValueError, match="any more"):
            source.open(metadata)
        assert search._found("a", 1.0, metadata).picture is None
    with pytest.raises(ValueError, match="no file"):
        source.open({"text": "a document of another program"})


def test_an_opened_document_is_what_was_encoded(search):
    for document in search.index:
        again = search.encoder.encode_documents([search.source.open(document.metadata)])[0]
        assert (again * document.embedding).sum(-1).min() > 0.99, document.id


def test_an_index_without_files_shows_ids_and_texts(search):
    with MultiVectorIndex.create(None, 8, search.encoder.dim) as index:
        index.add(search.encoder.encode_documents(["red", "blue"]), ids=["<a>", "b"], metadata=[{"text": "red"}, None])
        plain = Search(index, search.encoder, Source(None))
        state = asked(plain)
        assert (
            "&lt;a&gt;" in plain.cards(state)
            and "No attention to show" in plain.look(state, None, "document", 0, "last")[1]
        )


def test_visitors_at_the_same_time_get_their_own_answers(search):
    words = [f"{color} {thing}" for color in ("red", "green", "blue") for thing in ("apple", "boat", "cat", "fish")]
    events = Events(search)

    def visit(text):
        state, _, cards = events.ask(text, None, 4, 8, 9, "")
        looked = events.look_first(state, None, "query", "last")[2]
        return cards, looked

    alone = [visit(text) for text in words]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(visit, words * 2)) == alone * 2


def test_what_moved_while_a_query_was_encoded_counts(search):
    events = Events(search)
    state, _, _ = events.ask("red apple", None, 4, 8, 9, "")
    assert events.follow(state, 1, 4, 9, "")[0].budget == (1, 4)
    assert len(events.follow(state, 4, 8, 2, "")[0].hits) == 2
    assert len(events.follow(state, 4, 8, 9, '{"kind": "pdf"}')[0].hits) == 2
    assert events.follow(state, 4, 7, 9, " ")[1] == page_module.gr.skip(), "nothing has moved"


def test_as_many_results_are_shown_as_asked_for(search):
    state = asked(search)
    for k in (1, 4, 100):
        narrowed, _ = search.narrow(state, 4, 8, k)
        assert narrowed.hits == state.hits[:k] and search.cards(narrowed).count("<li>") == min(k, 9)


def test_a_filter_is_that_of_the_command_line_and_holds_at_every_budget(search):
    where = '{"kind": "image", "file": {"$gt": "picture 2"}}'
    state, _ = search.narrow(asked(search), 4, 8, None, where)
    query = search.encoder.encode_queries(["red apple"])
    found = search.index.search(query, k=9, where={"kind": "image", "file": {"$gt": "picture 2"}})
    assert [hit[0] for hit in state.hits] == found.ids[0] and len(state.hits) == 4
    shown = search.compare(state)
    assert "picture 1" not in shown and "note.md" not in shown and "4 of 4" in shown
    nothing, _ = search.narrow(state, 4, 8, None, '{"kind": "video"}')
    assert "No document fits the filter." in search.cards(nothing)


@pytest.mark.parametrize(
    ("k", "where", "sentence"),
    [
        (0, "", "The number of results must be a whole number from 1 to 100, not 0."),
        (101, "", "not 101."),
        (2.5, "", "not 2.5."),
        (None, "", "from 1 to 100."),
        (9, "kind=pdf", "The filter must be JSON, such as"),
        (9, "[1]", "The filter must be a JSON object, such as"),
        (9, '{"kind": {"$like": "p"}}', "The filter is no filter: there is no operator"),
        (9, '{"kind": ["pdf"]}', "The filter is no filter: $eq compares"),
        (9, '{"<b>": {"$no": 1}}', "&#x27;$no&#x27;"),
    ],
)
def test_what_cannot_be_searched_with_is_a_sentence_and_the_query_is_kept(search, k, where, sentence, monkeypatch):
    events = Events(search)
    state, facts, shown = events.ask("red apple", None, 4, 8, k, where)
    assert 'role="alert"' in shown and sentence in shown and not facts and "<b>" not in shown
    assert "Nothing has been searched" in events.compare(state) + events.look(state, None, "query", 1, "last")[1]
    monkeypatch.setattr(search.encoder, "encode_queries", None)
    assert events.follow(state, 4, 8, 9, "")[0].hits == events.narrow(state, 4, 8, 9, "")[0].hits != []


def test_nothing_asked_is_a_hint_and_no_error(search):
    events = Events(search)
    assert events.ask("", None, 1, 1, 9, "")[0] is None
    assert "Nothing has been searched" in events.compare(None) + events.look(None, None, "query", 1, "last")[1]
    with pytest.raises(ValueError, match="no result 99"):
        search.choose(asked(search), 99)


def test_a_model_without_meta_tokens_searches_and_says_why_it_has_no_attention(search):
    other = dataclasses.make_dataclass("Other", [("model", object, search.encoder.model)])
    other.takes_images, other.ordered, other.dim = True, False, search.encoder.dim
    other.query_vectors, other.document_vectors = 4, 8
    other.budgets, other.encode_queries = [(4, 1), (4, 8)], search.encoder.encode_queries
    plain = Search(search.index, other, search.source)
    assert "no Meta Tokens" in plain.look(asked(plain), None, "document", 0, "last")[1]


def test_a_model_of_other_dimensions_is_refused(search):
    with MultiVectorIndex.create(None, 8, 16) as index, pytest.raises(ValueError, match="another model made it"):
        launch(index, search.encoder)
    with pytest.raises(ValueError, match="Pass model="):
        launch(search.index)


@pytest.fixture(scope="module")
def url(search):
    _, address, _ = launch(
        search.index, search.encoder, port=None, settings=search.source.settings, prevent_thread_lock=True, quiet=True
    )
    yield address
    page_module.gr.close_all()


def post(url, words, picture=None):
    """Call the search by Gradio's own API, as a script of a stranger would."""
    call = urllib.request.Request(
        f"{url}gradio_api/call/search",
        json.dumps({"data": [words, picture, 4, 8, 9, ""]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call, timeout=20) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/search/{event}", timeout=20) as answer:
        return answer.read().decode()


def test_the_server_answers_a_search(url):
    answer = post(url, "red apple")
    assert "event: complete" in answer and "me-cards" in answer


def test_the_server_reads_no_file_and_no_url_on_behalf_of_a_visitor(url, search, monkeypatch):
    fetched = []
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *names: fetched.append(names))
    root = search.source.settings.roots[0]
    for path in (f"{root}/picture 1.png", "/etc/hostname", "https://example.com/a.png"):
        answer = post(url, "", {"path": path, "meta": {"_type": "gradio.FileData"}})
        assert "event: error" in answer and "me-cards" not in answer, path
    assert not fetched
    for path in (f"{root}/picture 1.png", "/etc/hostname", __file__, "..%2f..%2fetc/hostname"):
        for route in ("gradio_api/file=", "file="):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{url}{route}{path}".replace(" ", "%20"), timeout=20)
            assert refused.value.code in (403, 404)


def test_the_page_asks_nothing_of_other_machines(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        config = answer.read().decode()
    assert '"analytics_enabled":false' in config.replace(" ", "")


def test_the_text_of_the_fixture_is_what_is_shown(search):
    assert search.source.open({"source": 0, "file": "note.md", "kind": "text"}) == TEXT
