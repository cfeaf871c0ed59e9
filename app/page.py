"""The search page: words or a picture in, documents out, and what more vectors would buy.

`Search` answers the events of the page and knows nothing of its layout; `build` lays it out. All that belongs to one
visitor is in the state that the events pass on, so that visitors do not disturb each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..modeling_metaembed import MetaEmbedModel
from ..retrieval.index import MultiVectorIndex
from ..retrieval.quantization import bytes_per_vector
from . import page_html as html
from .attention import Attention, AttentionReader, NoAttentionError, highlight
from .source import Source

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the search page needs Gradio: pip install 'metaembed[app]'") from error

_THUMBNAIL, _LARGE = 280, 900  # pixels of the longer side
_SIDE_BY_SIDE = 5  # results of every budget
LAYERS = ("last", "mean of all")


@dataclass(frozen=True, eq=False)
class Asked:
    """What one visitor asked, and what is shown to them.

    Attributes:
        item: What was encoded: words, a picture, or both.
        query: `[R_q, D]`, all vectors of the query, of which every budget takes the first.
        encoding: Seconds that encoding took.
        budget: `(query vectors, document vectors)` of the results.
        hits: Ids, scores and metadata of the results.
        chosen: The id of the result that is looked at.
        looked: For a document's id, or None for the query: where its Meta Tokens looked. What was last asked for.
    """

    item: Any
    query: Tensor
    encoding: float
    budget: tuple[int, int]
    hits: list[tuple[str, float, dict[str, Any]]] = field(default_factory=list)
    chosen: str | None = None
    looked: Mapping[str | None, Attention] = field(default_factory=dict)


class Search:
    """What the events of the page do.

    Args:
        index: What to search.
        model: What encodes queries: a [`MetaEmbedModel`], or a sentence-transformers `MultiVectorEncoder`.
        source: Opens the documents that were indexed.
        k: How many results to show.
    """

    def __init__(self, index: MultiVectorIndex, model: Any, source: Source, k: int = 12):
        self.index, self.model, self.source, self.k = index, model, source, k
        self.meta_model = find_meta_model(model)
        self.budgets = find_budgets(self.meta_model, index.vectors)
        self._thumbnail = lru_cache(maxsize=4096)(self._draw_thumbnail)

    @property
    def takes_pictures(self) -> bool:
        """Whether a query may be a picture."""
        return self.meta_model is None or self.meta_model.processor.image_processor is not None

    def ask(self, words: str, picture: Image.Image | None, r_q: int, r_c: int) -> Asked | None:
        """Encode a query and find its documents. None if nothing was asked."""
        words = (words or "").strip()
        if not words and picture is None:
            return None
        item = words if picture is None else {"image": picture, "text": words} if words else picture
        start = time.perf_counter()
        query = encode_query(self.model, item)
        return self.narrow(Asked(item, query, time.perf_counter() - start, (r_q, r_c)), r_q, r_c)[0]

    def narrow(self, asked: Asked, r_q: int, r_c: int) -> tuple[Asked, float]:
        """Find the documents at another budget, without encoding again, and return the seconds that it took."""
        budget = (snap(r_q, [q for q, _ in self.budgets]), snap(r_c, [c for _, c in self.budgets]))
        hits, seconds = self._find(asked.query, budget, self.k)
        ids = [hit[0] for hit in hits]
        chosen = asked.chosen if asked.chosen in ids else ids[0] if ids else None
        return replace(asked, budget=budget, hits=hits, chosen=chosen), seconds

    def _find(self, query: Tensor, budget: tuple[int, int], k: int) -> tuple[list[Any], float]:
        r_q = min(budget[0], len(query))
        start = time.perf_counter()
        found = self.index.search(query[None, :r_q], k=k, budget=(r_q, budget[1]))
        seconds = time.perf_counter() - start
        return list(zip(found.ids[0], found.scores[0].tolist(), found.metadata[0], strict=True)), seconds

    def bytes_per_document(self, r_c: int) -> int:
        """Return the bytes of a document's first `r_c` vectors, as the index keeps them."""
        return r_c * bytes_per_vector(self.index.quantization["main"][0], self._kept_dim)

    @cached_property
    def _kept_dim(self) -> int:
        first = next(iter(self.index), None)
        return self.index.dim if first is None else first.embedding.shape[1]

    def summary(self, asked: Asked, scoring: float) -> str:
        """Return the costs of what was asked."""
        size = self.bytes_per_document(asked.budget[1])
        return html.summary(
            [
                ("Encoding the query", html.milliseconds_text(asked.encoding)),
                (f"Scoring {len(self.index):,} documents", html.milliseconds_text(scoring)),
                ("Bytes a document", html.bytes_text(size)),
                ("All documents", html.bytes_text(size * len(self.index))),
            ]
        )

    def cards(self, asked: Asked) -> str:
        """Return the results."""
        if not asked.hits:
            return html.message("There is nothing in this index.")
        found = [self._found(*hit) for hit in asked.hits]
        return html.cards(found, min(asked.budget[0], len(asked.query)), asked.chosen)

    def compare(self, asked: Asked) -> str:
        """Return the first results of every budget, one below the other."""
        rows = []
        for r_q, r_c in self.budgets:
            hits, seconds = self._find(asked.query, (r_q, r_c), _SIDE_BY_SIDE)
            found = [self._found(*hit) for hit in hits]
            rows.append(html.BudgetRow((r_q, r_c), self.bytes_per_document(r_c), seconds, found))
        return html.budget_table(rows, asked.budget)

    def choose(self, asked: Asked, rank: int) -> Asked:
        """Return what is shown when a visitor chooses a result."""
        if not isinstance(rank, int) or not 0 <= rank < len(asked.hits):
            raise ValueError(f"there is no result {rank!r}.")
        return replace(asked, chosen=asked.hits[rank][0])

    def matches(self, asked: Asked) -> Tensor | None:
        """Return the similarity of every query vector to every vector of the chosen document, `[r_q, r_c]`."""
        if asked.chosen is None:
            return None
        document = self.index.get([asked.chosen])[0].embedding[: asked.budget[1]]
        query = asked.query[: asked.budget[0]]
        return query @ document.T if query.shape[1] == document.shape[1] else None  # a PCA is not undone

    def best_meta(self, asked: Asked, side: str) -> int:
        """Return the Meta Token of a side that gave the most to the score of the chosen document."""
        similarity = self.matches(asked)
        if similarity is None:
            return 0
        best, winner = similarity.max(dim=1)
        if side == "query":
            return int(best.argmax())
        return int(torch.zeros(similarity.shape[1]).index_add_(0, winner, best).argmax())

    def look(self, asked: Asked, side: str, meta: int, layer: str) -> tuple[Asked, str]:
        """Return where a Meta Token of the query, or of the chosen document, looked."""
        if self.meta_model is None:
            return asked, html.message("This model has no Meta Tokens, so there is nothing to look at.")
        if side == "document" and asked.chosen is None:
            return asked, html.message("Choose a result to see where the model looked.")
        key = asked.chosen if side == "document" else None
        if side == "document":
            metadata = next(hit[2] for hit in asked.hits if hit[0] == asked.chosen)
            item, options, title = self.source.open(metadata), self.source.options, _title(asked.chosen or "", metadata)
        else:
            item, options, title = asked.item, {}, "your query"
        try:
            attention = asked.looked.get(key) or self._reader.read(item, side, **options)
            asked = replace(asked, looked={key: attention})
            shown = self._show(attention, item, min(meta, attention.weights.shape[1] - 1), layer, title)
        except ValueError as error:  # a NoAttentionError, or a file that is gone
            return asked, html.message(f"No attention to show: {error}")
        return asked, shown + self._explain(asked, side, meta)

    def _show(self, attention: Attention, item: Any, meta: int, layer: str, title: str) -> str:
        at = None if layer == LAYERS[1] else -1
        share = attention.share_of_picture(meta, at)
        picture = item.get("image") if isinstance(item, dict) else item
        parts = []
        if isinstance(picture, Image.Image):
            weights = attention.over_picture(meta, at)
            caption = f"<b>{share:.0%}</b> of its attention is on the picture, the rest on the words around it."
            shown = highlight(shrink(picture, _LARGE, least=_LARGE // 2), weights)
            parts.append(html.attention_over_picture(html.data_url(shown), title, caption))
        if attention.pieces:
            pieces = attention.over_text(meta, at)
            caption = f"<b>{sum(share for _, share in pieces):.0%}</b> of its attention is on these words."
            parts.append(html.attention_over_text(pieces, caption))
        return "".join(parts)

    def _explain(self, asked: Asked, side: str, meta: int) -> str:
        """Return which vectors of the other side this Meta Token met, and what that gave to the score."""
        similarity = self.matches(asked)
        if similarity is None:
            return ""
        best, winner = similarity.max(dim=1)
        r_q, r_c = similarity.shape
        if side == "query" and meta < r_q:
            text = f"At {r_q} × {r_c}, its best match is document token {winner[meta] + 1}: {best[meta]:.2f} of the score."
        elif side == "document" and meta < r_c and (met := (winner == meta).nonzero()[:, 0].tolist()):
            names = ", ".join(str(i + 1) for i in met)
            text = f"At {r_q} × {r_c}, it is the best match of query token {names}: {best[met].sum():.2f} of the score."
        elif meta >= (r_q if side == "query" else r_c):
            text = f"This Meta Token is not used at {r_q} × {r_c}."
        else:
            text = f"At {r_q} × {r_c}, it is the best match of no query token."
        return f'<p class="me-note">{text}</p>'

    @cached_property
    def _reader(self) -> AttentionReader:
        return AttentionReader(self.meta_model)

    def _found(self, id: str, score: float, metadata: dict[str, Any]) -> html.Found:
        file, page, kind = metadata.get("file"), metadata.get("page"), metadata.get("kind")
        name, text = Path(file).name if file else id, str(metadata.get("text") or "")[:300]
        picture = None if kind == "text" else self._thumbnail(file, page, kind)
        return html.Found(id, name, score, picture, text or ("" if picture else "(cannot be read any more)"), page)

    def _draw_thumbnail(self, file: str | None, page: int | None, kind: str | None) -> str | None:
        """Return a small picture as a data URL, or None if the file is gone."""
        try:
            document = self.source.open({"file": file, "page": page, "kind": kind})
        except ValueError:
            return None
        return html.data_url(shrink(document, _THUMBNAIL)) if isinstance(document, Image.Image) else None


def find_meta_model(model: Any) -> MetaEmbedModel | None:
    """Return the model with Meta Tokens in what encodes queries, or None if it has none."""
    if hasattr(model, "encode_queries"):
        return model
    inner = getattr(model[0], "model", None) if hasattr(model, "__getitem__") else None
    return inner if hasattr(inner, "encode_queries") else None


def find_budgets(model: MetaEmbedModel | None, vectors: int) -> list[tuple[int, int]]:
    """Return the budgets to offer: those that the model was trained for, else powers of two, within the index."""
    pairs = model.config.budgets if model is not None else [(2**i, 2**i) for i in range(8)]
    largest = pairs[-1][0] if model is not None else 32
    fitting = [(min(q, largest), c) for q, c in pairs if c < vectors]
    return [*fitting, (largest, vectors)]


def snap(value: float, choices: Sequence[int]) -> int:
    """Return the choice that is nearest by ratio."""
    return min(choices, key=lambda choice: (abs(choice - value) / choice, -choice))


def encode_query(model: Any, item: Any) -> Tensor:
    """Return all vectors of one query, `[R_q, D]`."""
    encode = getattr(model, "encode_queries", None) or model.encode_query
    return torch.as_tensor(encode([item])[0]).float().cpu()


def shrink(picture: Image.Image, most: int, least: int = 0) -> Image.Image:
    """Return a picture whose longer side has `most` pixels at most, and `least` at least."""
    longer = max(picture.size)
    target = max(least, min(most, longer))
    size = tuple(max(1, round(side * target / longer)) for side in picture.size)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


# Layout

_CARDS_JS = """
element.addEventListener("click", event => {
  const card = event.target.closest("button[data-rank]");
  if (!card) return;
  element.querySelectorAll("button[data-rank]").forEach(one => one.setAttribute("aria-pressed", one === card));
  trigger("select", {rank: Number(card.dataset.rank)});
});
"""

# Sliders rest on the budgets that a model was trained for. In the browser, so that the thumb follows at once; the next
# choice in the direction of a move, so that the arrow keys do not fall back.
_SNAP_JS = """
(r_q, r_c) => {
  const snap = (name, value, choices) => {
    const kept = window.meSnap ??= {}, old = kept[name] ?? choices[choices.length - 1];
    let best = choices.reduce((a, b) => Math.abs(b - value) / b <= Math.abs(a - value) / a ? b : a);
    if (best === old && value > old) best = choices.find(one => one > old) ?? old;
    if (best === old && value < old) best = choices.findLast(one => one < old) ?? old;
    return kept[name] = best;
  };
  return [snap("query", r_q, %s), snap("document", r_c, %s)];
}
"""


class Events:
    """The events of the page: what components pass in, and what they show."""

    def __init__(self, search: Search):
        self.search = search

    def ask(self, words: str, picture: Image.Image | None, r_q: int, r_c: int) -> tuple[Asked | None, str, str]:
        """Words or a picture were given."""
        asked = self.search.ask(words, picture, r_q, r_c)
        return self.narrow(asked, r_q, r_c)

    def narrow(self, asked: Asked | None, r_q: int, r_c: int) -> tuple[Asked | None, str, str]:
        """A budget was chosen."""
        if asked is None:
            return None, "", html.message(_HINT)
        asked, scoring = self.search.narrow(asked, r_q, r_c)
        return asked, self.search.summary(asked, scoring), self.search.cards(asked)

    def choose(self, asked: Asked | None, event: gr.EventData) -> Asked | None:
        """A result was chosen."""
        return None if asked is None else self.search.choose(asked, event._data.get("rank"))

    def look_first(self, asked: Asked | None, side: str, layer: str) -> tuple[Asked | None, Any, str]:
        """Another result, or the other side, is looked at: begin with the Meta Token that matters most."""
        if asked is None:
            return None, gr.skip(), html.message(_NOTHING)
        meta = self.search.best_meta(asked, side)
        asked, shown = self.search.look(asked, side, meta, layer)
        return asked, gr.update(value=meta + 1, maximum=self.search.meta_tokens(side)), shown

    def look(self, asked: Asked | None, side: str, meta: int, layer: str) -> tuple[Asked | None, str]:
        """A Meta Token or a layer was chosen."""
        if asked is None:
            return None, html.message(_NOTHING)
        return self.search.look(asked, side, int(meta) - 1, layer)

    def compare(self, asked: Asked | None) -> str:
        """The same query at every budget."""
        return html.message(_NOTHING) if asked is None else self.search.compare(asked)


def told(event: Callable[..., Any]) -> Callable[..., Any]:
    """Return an event whose `ValueError`, a sentence for a person, is shown to them."""

    @wraps(event)
    def tell(*arguments: Any) -> Any:
        try:
            return event(*arguments)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return tell


def build(
    search: Search, title: str = "metaembed", examples: Sequence[str] = (), words: str = ""
) -> gr.Blocks:
    """Return the page, ready to be launched.

    Args:
        search: Answers the events.
        title: What stands on top.
        examples: Queries to try.
        words: The query that the page starts with.
    """
    events = Events(search)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        state = gr.State(None)
        gr.HTML(html.header(title, len(search.index), search.index.vectors), apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                text = gr.Textbox(
                    words, label="Words", placeholder=_HINT, autofocus=True, max_length=8000, elem_id="words"
                )
                tried = gr.Examples([[each] for each in examples], text, label="Try") if examples else None
                go = gr.Button("Search", variant="primary", elem_id="go")
            with gr.Column(scale=1, min_width=220, visible=search.takes_pictures):
                picture = gr.Image(
                    label="Picture", type="pil", sources=["upload", "clipboard"], height=190, buttons=[], elem_id="picture"
                )
        with gr.Row():
            r_q = _slider("Query vectors", [q for q, _ in search.budgets], "query-vectors")
            r_c = _slider("Document vectors", [c for _, c in search.budgets], "document-vectors")
        facts = gr.HTML(apply_default_css=False, elem_id="facts")
        with gr.Tabs():
            with gr.Tab("Results"), gr.Row():
                with gr.Column(scale=3, min_width=280):
                    found = gr.HTML(
                        html.message(_HINT), js_on_load=_CARDS_JS, apply_default_css=False, elem_id="results"
                    )
                with gr.Column(scale=2, min_width=280, elem_id="look"):
                    gr.HTML("<h2>Where each Meta Token looked</h2>", apply_default_css=False, elem_classes="me-head")
                    side = gr.Radio(_SIDES, value="document", show_label=False, container=False, elem_id="side")
                    looked = gr.HTML(html.message(_NOTHING), apply_default_css=False, elem_id="looked")
                    meta = gr.Slider(1, search.meta_tokens("document"), 1, step=1, label="Meta Token", elem_id="meta")
                    layer = gr.Radio(LAYERS, value=LAYERS[0], label="Layer", elem_id="layer")
            with gr.Tab("Every budget"):
                table = gr.HTML(html.message(_NOTHING), apply_default_css=False, elem_id="budgets")

        private = dict(api_visibility="private", show_progress="hidden")
        latest = dict(private, trigger_mode="always_last")
        shown, seen = [state, facts, found], [state, meta, looked]
        starts = [go.click, text.submit, picture.change, *([page.load] if words else [])]
        starts += [tried.load_input_event.then] if tried else []
        for number, start in enumerate(starts):
            options = private if number else dict(api_name="search", show_progress="minimal")
            asked = start(told(events.ask), [text, picture, r_q, r_c], shown, **options)
            looking = asked.then(told(events.look_first), [state, side, layer], seen, **private)
            looking.then(told(events.compare), state, table, **private)
        choices = [sorted({pair[i] for pair in search.budgets}) for i in (0, 1)]
        moved = gr.on([r_q.input, r_c.input], None, [r_q, r_c], [r_q, r_c], js=_SNAP_JS % tuple(choices), **private)
        narrowed = moved.then(told(events.narrow), [state, r_q, r_c], shown, **latest)
        compared = narrowed.then(told(events.compare), state, table, **latest)
        compared.then(told(events.look_first), [state, side, layer], seen, **latest)
        chosen = found.select(told(events.choose), state, state, js=None, **private)
        gr.on([chosen.then, side.input], told(events.look_first), [state, side, layer], seen, **private)
        gr.on([meta.input, layer.input], told(events.look), [state, side, meta, layer], [state, looked], **latest)
    return page
