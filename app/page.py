"""The search page: words or a picture in, documents out, and what more vectors would buy.

`Search` does what the page shows and knows nothing of Gradio; `Events` are what its components call; `build` lays them
out. What belongs to one visitor is in the state that the events pass on, so that visitors do not disturb each other.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, wraps
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..retrieval.quantization import bytes_per_vector
from ..stores import VectorStore
from . import page_html as html
from .attention import Attention, AttentionReader, highlight
from .encoder import Encoder, load_encoder
from .settings import Settings, open_index, read_settings
from .source import Source, picture_of
from .where import EXAMPLE, read_where

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the search page needs Gradio: pip install 'metaembed[app]'") from error

_THUMBNAIL, _LARGE = 280, 900  # pixels of the longer side
_SIDE_BY_SIDE = 5  # results of every budget
_MOST = 100  # results, each with a picture in the page
_SESSIONS = 256  # visitors whose state is kept
_HINT = "Type words, drop a picture, or both."
_NOTHING = "Nothing has been searched for yet."
_LAYERS = ("last", "mean of all")
_SIDES = [("The chosen result", "document"), ("Your query", "query")]


@dataclass(frozen=True, eq=False)
class Asked:
    """What one visitor asked, and what they are shown.

    Attributes:
        item: What was encoded: words, a picture, or both.
        query: `[R_q, D]`, all vectors of the query, of which every budget takes the first.
        encoding: Seconds that encoding took.
        budget: `(query vectors, document vectors)` of the results.
        k: How many results.
        where: The filter, as it was typed.
        hits: Ids, scores and metadata of the results.
        chosen: The id of the result that is looked at.
    """

    item: Any
    query: Tensor
    encoding: float
    budget: tuple[int, int]
    k: float | None = None
    where: str = ""
    hits: list[tuple[str, float, dict[str, Any]]] = field(default_factory=list)
    chosen: str | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """Where the Meta Tokens of one input looked: kept while a visitor goes through them.

    Attributes:
        of: The vectors of a query, or the id of a document.
        attention: Where its Meta Tokens looked.
    """

    of: Any
    attention: Attention


class Search:
    """What the page does. Several threads may share it.

    Args:
        index: What to search.
        encoder: Encodes queries.
        source: Opens the documents that were indexed.
        k: How many results to show to who asks for no other number.
    """

    def __init__(self, index: VectorStore, encoder: Encoder, source: Source, k: int = 12):
        self.index, self.encoder, self.source, self.k = index, encoder, source, k
        largest = encoder.query_vectors, min(encoder.document_vectors, index.vectors)
        self.budgets = [tuple(one) for one in encoder.budgets if one[1] < largest[1]] + [largest]
        self._thumbnail = lru_cache(maxsize=4096)(self._draw_thumbnail)

    @cached_property
    def _reader(self) -> AttentionReader:
        return AttentionReader(self.encoder.model)

    def meta_tokens(self, side: str) -> int:
        """Return the number of Meta Tokens of a side."""
        return self.encoder.query_vectors if side == "query" else self.encoder.document_vectors

    # Searching

    def ask(self, words: str | None, picture: Image.Image | None) -> Asked | None:
        """Encode a query. None if nothing was asked.

        Raises:
            ValueError: If it cannot be encoded.
        """
        words = (words or "").strip()
        if not words and picture is None:
            return None
        item = words if picture is None else {"image": picture, "text": words} if words else picture
        start = time.perf_counter()
        query = self.encoder.encode_queries([item])[0]
        return Asked(item, query, time.perf_counter() - start, self.budgets[-1], self.k)

    def narrow(
        self, asked: Asked, r_q: float, r_c: float, k: float | None = None, where: str | None = None
    ) -> tuple[Asked, float]:
        """Find the documents of a query at a budget, without encoding it again, and return the seconds too.

        Args:
            asked: What was asked.
            r_q: Where the slider of query vectors is.
            r_c: Where the slider of document vectors is.
            k: How many results. None: as before.
            where: The filter, as it was typed. None: as before.

        Raises:
            ValueError: If there cannot be so many results, or the filter is none.
        """
        asked = self.want(asked, r_q, r_c, asked.k if k is None else k, asked.where if where is None else where)
        k = asked.k
        if k is None or not 1 <= k <= _MOST or k != int(k):
            given = "" if k is None else f", not {k}"
            raise ValueError(f"The number of results must be a whole number from 1 to {_MOST}{given}.")
        hits, seconds = self._find(asked, asked.budget, int(k))
        ids = [id for id, _, _ in hits]
        chosen = asked.chosen if asked.chosen in ids else ids[0] if ids else None
        return replace(asked, hits=hits, chosen=chosen), seconds

    def want(self, asked: Asked, r_q: float, r_c: float, k: float | None, where: str | None) -> Asked:
        """Return what was asked, with what the controls of the page say now."""
        return replace(asked, budget=self.rest(r_q, r_c), k=k, where=(where or "").strip())

    def rest(self, r_q: float, r_c: float) -> tuple[int, int]:
        """Return the budget that sliders at these values mean."""
        return snap(r_q, [q for q, _ in self.budgets]), snap(r_c, [c for _, c in self.budgets])

    def choose(self, asked: Asked, rank: Any) -> Asked:
        """Return what a visitor is shown who chooses the result `rank`, 0 for the first.

        Raises:
            ValueError: If there is no such result.
        """
        if not isinstance(rank, int) or not 0 <= rank < len(asked.hits):
            raise ValueError(f"There is no result {rank!r}.")
        return replace(asked, chosen=asked.hits[rank][0])

    def _find(self, asked: Asked, budget: tuple[int, int], k: int) -> tuple[list[Any], float]:
        where = read_where(asked.where, "The filter")
        start = time.perf_counter()
        found = self.index.search(asked.query[None, : budget[0]], k=k, budget=budget, where=where)
        seconds = time.perf_counter() - start
        return list(zip(found.ids[0], found.scores[0].tolist(), found.metadata[0], strict=True)), seconds

    # Showing

    def summary(self, asked: Asked, scoring: float) -> str:
        """Return what the search cost."""
        size = self._bytes(asked, asked.budget[1])
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
            return html.message("No document fits the filter." if asked.where else "This index is empty.")
        return html.cards([self._found(*hit) for hit in asked.hits], asked.budget[0], asked.chosen)

    def compare(self, asked: Asked) -> str:
        """Return the first results of every budget, one budget below the other."""
        rows = []
        for budget in self.budgets:
            times: list[float] = []
            while len(times) < 5 and sum(times) < 0.05:  # the median of several, where they are short
                hits, seconds = self._find(asked, budget, _SIDE_BY_SIDE)
                times.append(seconds)
            found = [self._found(*hit) for hit in hits]
            rows.append(html.BudgetRow(budget, self._bytes(asked, budget[1]), median(times), found))
        return html.budget_table(rows, asked.budget)

    def look(self, asked: Asked, seen: Seen | None, side: str, meta: int, layer: str) -> tuple[Seen | None, str]:
        """Return where a Meta Token of the query, or of the chosen document, looked.

        Args:
            asked: What was asked.
            seen: What was returned last, which is not computed again.
            side: `"query"` or `"document"`.
            meta: The number of the Meta Token, 0 for the first.
            layer: `"last"` or `"mean of all"`.
        """
        if not self.encoder.ordered:
            return None, html.message("This model has no Meta Tokens, so there is no attention of theirs to show.")
        if asked.chosen is None:
            return None, html.message(_NOTHING)
        of = asked.query if side == "query" else asked.chosen
        try:
            item = asked.item if side == "query" else self.source.open(self._metadata(asked))
            if seen is None or not (seen.of is of or (isinstance(of, str) and seen.of == of)):
                seen = Seen(of, self._reader.read(item, side))
            shown = _show_attention(seen.attention, item, meta, None if layer == _LAYERS[1] else -1)
        except ValueError as error:  # a NoAttentionError, or a file that is gone
            return seen, html.message(f"No attention to show: {error}")
        return seen, shown + html.note(self._explain(asked, side, meta))

    def best_meta(self, asked: Asked, side: str) -> int:
        """Return the Meta Token of a side that gives the most to the score of the chosen document."""
        best, winner = self._matches(asked)
        if side == "query":
            return int(best.argmax())
        return int(torch.zeros(asked.budget[1]).index_add_(0, winner, best).argmax())

    def _explain(self, asked: Asked, side: str, meta: int) -> str:
        """Return which Meta Tokens of the other side this one met, and what that gave to the score."""
        best, winner = self._matches(asked)
        r_q, r_c = asked.budget
        if meta >= (r_q if side == "query" else r_c):
            return f"A search at budget ({r_q}, {r_c}) does not use this Meta Token."
        if side == "query":
            return f"It meets document token {winner[meta] + 1}: {best[meta]:.2f} of the score."
        met = (winner == meta).nonzero()[:, 0].tolist()
        if not met:
            return f"At budget ({r_q}, {r_c}), no query token meets it."
        names = ", ".join(str(i + 1) for i in met)
        return f"Met by query token{'s' * (len(met) > 1)} {names}: {best[met].sum():.2f} of the score."

    def _matches(self, asked: Asked) -> tuple[Tensor, Tensor]:
        """Return for every query vector its best similarity to the chosen document, and the vector that has it."""
        document = self._embedding(asked)[: asked.budget[1]]
        query = asked.query[: asked.budget[0]]
        if query.shape[1] != document.shape[1]:  # a PCA of the index
            document = self.encoder.encode_documents([self.source.open(self._metadata(asked))])[0, : asked.budget[1]]
        best, winner = (query @ document.T).max(dim=1)
        return best, winner

    def _bytes(self, asked: Asked, r_c: int) -> int:
        """Return the bytes of a document's first `r_c` vectors, as an index keeps them; in float32 elsewhere."""
        kept = getattr(self.index, "quantization", None)
        quantization = kept["main"][0] if isinstance(kept, Mapping) else "float32"
        dim = self.index.dim if asked.chosen is None else self._embedding(asked).shape[1]
        return r_c * bytes_per_vector(quantization, dim)

    def _embedding(self, asked: Asked) -> Tensor:
        return self.index.get([asked.chosen])[0].embedding

    def _metadata(self, asked: Asked) -> dict[str, Any]:
        return next(metadata for id, _, metadata in asked.hits if id == asked.chosen)

    def _found(self, id: str, score: float, metadata: dict[str, Any]) -> html.Found:
        file, text = metadata.get("file"), str(metadata.get("text") or "")[:300]
        name = id if not file else Path(str(file)).stem if metadata.get("kind") == "image" else Path(str(file)).name
        place = next((f"{kind} {metadata[kind]}" for kind in ("page", "part", "row") if kind in metadata), "")
        keys = ("source", "file", "kind", "page", "row")
        picture = self._thumbnail(tuple((key, metadata[key]) for key in keys if key in metadata))
        return html.Found(id, name, score, picture, text, place)

    def _draw_thumbnail(self, metadata: tuple[tuple[str, Any], ...]) -> str | None:
        """Return a small picture as a data URL, or None for a text, or if the file is gone."""
        if dict(metadata).get("kind") == "text":
            return None
        try:
            picture = picture_of(self.source.open(dict(metadata)))
        except ValueError:
            return None
        return None if picture is None else html.data_url(shrink(picture, _THUMBNAIL))


def _show_attention(attention: Attention, item: Any, meta: int, layer: int | None) -> str:
    """Return the picture and the words of an input, highlighted where a Meta Token looked."""
    picture, shown = picture_of(item), []
    if picture is not None:
        large = shrink(picture, _LARGE, least=_LARGE // 2)
        marked = html.data_url(highlight(large, attention.over_picture(meta, layer)))
        shown.append(html.attention_over_picture(marked, attention.share_of_picture(meta, layer), meta + 1))
    if attention.pieces:
        shown.append(html.attention_over_text(attention.over_text(meta, layer), meta + 1))
    return "".join(shown)


def snap(value: float, choices: Sequence[int]) -> int:
    """Return the choice that is nearest by ratio, the larger one of two."""
    return min(choices, key=lambda choice: (max(choice, value) / max(1, min(choice, value)), -choice))


def shrink(picture: Image.Image, most: int, least: int = 0) -> Image.Image:
    """Return a picture whose longer side has `most` pixels at most, and `least` at least."""
    longer = max(picture.size)
    target = max(least, min(most, longer))
    if target == longer:
        return picture
    width, height = (max(1, round(side * target / longer)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


class Events:
    """What the components of the page call."""

    def __init__(self, search: Search):
        self.search = search

    def ask(
        self, words: str, picture: Image.Image | None, r_q: float, r_c: float, k: float | None, where: str
    ) -> tuple[Asked | None, str, str]:
        """Words or a picture were given."""
        return self.narrow(self.search.ask(words, picture), r_q, r_c, k, where)

    def narrow(
        self, asked: Asked | None, r_q: float, r_c: float, k: float | None, where: str
    ) -> tuple[Asked | None, str, str]:
        """A budget, a number of results or a filter was chosen. The query is kept if that cannot be."""
        if asked is None:
            return None, "", html.message(_HINT)
        asked = replace(self.search.want(asked, r_q, r_c, k, where), hits=[])
        try:
            asked, scoring = self.search.narrow(asked, r_q, r_c)
        except ValueError as error:
            return replace(asked, chosen=None), "", html.wrong(str(error))
        return asked, self.search.summary(asked, scoring), self.search.cards(asked)

    def follow(self, asked: Asked | None, r_q: float, r_c: float, k: float | None, where: str) -> Any:
        """A query was encoded, and somebody may have moved something meanwhile; or a field was left."""
        if asked is not None:
            now = self.search.want(asked, r_q, r_c, k, where)
            if (now.budget, now.k, now.where) != (asked.budget, asked.k, asked.where):
                return self.narrow(asked, r_q, r_c, k, where)
        return gr.skip(), gr.skip(), gr.skip()

    def choose(self, asked: Asked | None, event: gr.EventData) -> Asked | None:
        """A result was chosen."""
        return None if asked is None else self.search.choose(asked, (event._data or {}).get("rank"))

    def look_first(
        self, asked: Asked | None, seen: Seen | None, side: str, layer: str
    ) -> tuple[Seen | None, Any, str]:
        """Another result, or the other side, is looked at: begin with the Meta Token that matters most."""
        if asked is None or asked.chosen is None:
            return None, gr.skip(), html.message(_NOTHING)
        meta = self.search.best_meta(asked, side) if self.search.encoder.ordered else 0
        seen, shown = self.search.look(asked, seen, side, meta, layer)
        return seen, gr.update(value=meta + 1, maximum=self.search.meta_tokens(side)), shown

    def look(
        self, asked: Asked | None, seen: Seen | None, side: str, meta: float, layer: str
    ) -> tuple[Seen | None, str]:
        """A Meta Token or a layer was chosen."""
        if asked is None:
            return None, html.message(_NOTHING)
        return self.search.look(asked, seen, side, int(meta) - 1, layer)

    def compare(self, asked: Asked | None) -> str:
        """The same query at every budget."""
        return html.message(_NOTHING) if asked is None or not asked.hits else self.search.compare(asked)


def told(event: Callable[..., Any]) -> Callable[..., Any]:
    """Return an event whose `ValueError`, a sentence for a person, is shown to them."""

    @wraps(event)
    def tell(*arguments: Any) -> Any:
        try:
            return event(*arguments)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return tell


# A click, or Enter, on a result. Its button stays in place, so that the keyboard's focus does.
_CARDS_JS = """
element.addEventListener("click", event => {
  const card = event.target.closest("button[data-rank]");
  if (!card) return;
  element.querySelectorAll("button[data-rank]").forEach(one => one.setAttribute("aria-pressed", one === card));
  trigger("select", {rank: Number(card.dataset.rank)});
  if (innerWidth <= 640) document.getElementById("look").scrollIntoView({behavior: "smooth"});
});
"""

# Sliders rest on the budgets that the model was trained for: at once, in the browser. A step of the arrow keys goes to
# the next one, even where the nearest is the one that it came from.
_SNAP_JS = """
(r_q, r_c) => {
  const snap = (name, value, choices) => {
    const rests = window.metaembedRests ??= {}, old = rests[name] ?? choices.at(-1);
    const far = choice => Math.max(choice, value) / Math.min(choice, value);
    let best = choices.reduce((a, b) => far(b) <= far(a) ? b : a);
    if (best === old && value > old) best = choices.find(one => one > old) ?? old;
    if (best === old && value < old) best = choices.findLast(one => one < old) ?? old;
    return rests[name] = best;
  };
  return [snap("query", r_q, %s), snap("document", r_c, %s)];
}
"""


def build(search: Search, title: str = "metaembed", examples: Sequence[str] = (), words: str = "") -> gr.Blocks:
    """Return the page, ready to be launched.

    Args:
        search: Does what the page shows.
        title: What stands on top.
        examples: Queries to try.
        words: The query that the page starts with.
    """
    events = Events(search)
    rests = [sorted({budget[side] for budget in search.budgets}) for side in (0, 1)]
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        state, seen = gr.State(None), gr.State(None)
        gr.HTML(html.header(title, len(search.index), search.index.vectors), apply_default_css=False)
        with gr.Row(elem_id="query"):
            with gr.Column(scale=3, min_width=280):
                with gr.Row(equal_height=True, elem_id="ask"):
                    text = gr.Textbox(
                        words,
                        label="Words",
                        placeholder=_HINT,
                        autofocus=True,
                        max_length=8000,
                        scale=5,
                        min_width=280,
                        elem_id="words",
                    )
                    go = gr.Button("Search", variant="primary", scale=1, min_width=90, elem_id="go")
                tried = (
                    gr.Examples([[one] for one in examples], text, label="Try", elem_id="try") if examples else None
                )
            picture = gr.Image(
                label="Picture",
                placeholder="Or drop a picture",
                type="pil",
                sources=["upload", "clipboard"],
                height=150,
                scale=1,
                min_width=230,
                buttons=[],
                visible=search.encoder.takes_images,
                elem_id="picture",
            )
            picture.async_move_resource_to_block_cache = _uploads_only(picture.async_move_resource_to_block_cache)
        with gr.Row():
            r_q = _slider("Query vectors", rests[0], "query-vectors")
            r_c = _slider("Document vectors", rests[1], "document-vectors")
        with gr.Row():
            k = gr.Number(search.k, label="Results", precision=0, min_width=110, scale=1, elem_id="count")
            where = gr.Textbox(
                label="Filter", placeholder=EXAMPLE, max_length=8000, min_width=280, scale=6, elem_id="filter"
            )
        facts = gr.HTML(apply_default_css=False, elem_id="facts")
        with gr.Tabs():
            with gr.Tab("Results"), gr.Row():
                with gr.Column(scale=3, min_width=280):
                    found = gr.HTML(
                        html.message(_HINT), js_on_load=_CARDS_JS, apply_default_css=False, elem_id="results"
                    )
                with gr.Column(scale=2, min_width=280, elem_id="look"):
                    gr.HTML(html.heading("Where each Meta Token looked"), apply_default_css=False)
                    side = gr.Radio(_SIDES, value="document", show_label=False, container=False, elem_id="side")
                    looked = gr.HTML(html.message(_NOTHING), apply_default_css=False, elem_id="looked")
                    meta = gr.Slider(
                        1, search.meta_tokens("document"), 1, step=1, label="Meta Token", elem_id="meta", buttons=[]
                    )
                    layer = gr.Radio(list(_LAYERS), value=_LAYERS[0], label="Layer", elem_id="layer")
            with gr.Tab("Every budget"):
                table = gr.HTML(html.message(_NOTHING), apply_default_css=False, elem_id="budgets")

        # The latest of several quick events is the one that counts. `state` is what was asked, and only what a visitor
        # does changes it; `seen` is a memory, so that an answer which comes late does no harm.
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "always_last"}
        budget, answer = [r_q, r_c], [state, facts, found]
        wanted = [*budget, k, where]
        sight: dict[str, Any] = {
            "fn": told(events.look_first),
            "inputs": [state, seen, side, layer],
            "outputs": [seen, meta, looked],
            **quiet,
        }
        comparing: dict[str, Any] = {"fn": told(events.compare), "inputs": state, "outputs": table, **quiet}
        starts = [go.click, text.submit, picture.change]
        starts += [page.load] if words else []
        starts += [tried.load_input_event.then] if tried else []
        for number, start in enumerate(starts):
            options = {**quiet, "show_progress": "minimal"} if number else {"api_name": "search"}
            asked = start(told(events.ask), [text, picture, *wanted], answer, **options)
            asked.then(told(events.follow), [state, *wanted], answer, **quiet).then(**sight).then(**comparing)
        moved = gr.on([r_q.input, r_c.input], None, budget, budget, js=_SNAP_JS % tuple(rests), **quiet)
        moved.then(told(events.narrow), [state, *wanted], answer, **quiet).then(**sight).then(**comparing)
        changed = gr.on([k.input, where.submit, where.blur], told(events.follow), [state, *wanted], answer, **quiet)
        changed.then(**sight).then(**comparing)
        found.select(told(events.choose), state, state, **quiet).then(**sight)
        side.input(**sight)
        gr.on([meta.input, layer.input], told(events.look), [state, seen, side, meta, layer], [seen, looked], **quiet)
    return page


def _uploads_only(move: Callable[[Any], Awaitable[str | None]]) -> Callable[[Any], Awaitable[str | None]]:
    """Return how Gradio takes over a file that a visitor names, without fetching it where it is a URL."""

    async def take(file: Any) -> str | None:
        if re.match(r"\w+://", str(file)):
            raise gr.Error("Upload the picture: no URL is fetched.", print_exception=False)
        return await move(file)

    return take


def _slider(label: str, rests: Sequence[int], elem_id: str) -> gr.Slider:
    info = f"Of {', '.join(map(str, rests[:-1]))} or {rests[-1]}, as trained" if len(rests) > 1 else None
    return gr.Slider(
        1, rests[-1], rests[-1], step=1, label=label, info=info, min_width=280, elem_id=elem_id, buttons=[]
    )


def launch(
    index: VectorStore | str | os.PathLike[str],
    model: Any = None,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    *,
    settings: Settings | None = None,
    title: str = "metaembed",
    examples: Sequence[str] = (),
    words: str = "",
    k: int = 12,
    device: str | None = None,
    **options: Any,
) -> Any:
    """Start the search page, and serve it until it is interrupted.

    Pictures and pages are read from the folders that were indexed, and sent within the page: no file is served.

    Args:
        index: The folder (or address) that `metaembed index` wrote to, or an open index.
        model: What encodes queries: a folder or Hub id, or a loaded model or [`Encoder`]. None: the index's own.
        host: Where to listen; "0.0.0.0" for everybody who can reach this machine.
        port: None or 0: a free one from 7860 on.
        settings: Of an open index: where the files of its documents are. None: those of its folder, if there are any.
        title: What stands on top.
        examples: Queries to try.
        words: The query that the page starts with.
        k: How many results to show.
        device: Where the model computes. None: a GPU if there is one.
        **options: For Gradio's `launch` (`prevent_thread_lock`, `quiet`, ...).

    Returns:
        What Gradio's `launch` returns.

    Raises:
        ImportError: If Gradio is not installed.
        FileNotFoundError: If there is no index.
        ValueError: If the model does not fit the index, or neither says which model it is.
    """
    if isinstance(index, (str, os.PathLike)):
        index, settings = open_index(index), settings or _settings_of(index, model)
    if model is None:
        if settings is None:
            raise ValueError("which model encodes the queries of this index? Pass model=...")
        model = settings.model
    encoder = model
    if not isinstance(model, Encoder):
        trust = {} if settings is None else {"trust_remote_code": settings.trust_remote_code}
        revision = settings.revision if settings is not None and model == settings.model else None
        encoder = load_encoder(model, device=device, revision=revision, **trust)
    if encoder.dim != index.dim:
        raise ValueError(
            f"{encoder.name} has {encoder.dim} dimensions, but the index {index.dim}: another model made it."
        )
    search = Search(index, encoder, Source(settings), k)
    search.narrow(search.ask("warm up", None), *search.budgets[-1])  # the first visitor should not wait for it
    page = build(search, title, examples, words)
    page.queue(default_concurrency_limit=4, max_size=64, api_open=False)
    return page.launch(
        server_name=host,
        server_port=port or None,
        theme=theme(),
        css=html.CSS,
        allowed_paths=[],
        max_file_size="20mb",
        state_session_capacity=_SESSIONS,
        **{"share": False, "enable_monitoring": False, "footer_links": [], "ssr_mode": False, **options},
    )


def _settings_of(index: str | os.PathLike[str], model: Any) -> Settings | None:
    try:
        return read_settings(index)
    except FileNotFoundError:
        if model is None:
            raise
        return None  # not made by `metaembed index`: there are no files to show


def theme() -> gr.themes.Base:
    """Return a theme with the fonts of the visitor's system: none is loaded."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    return gr.themes.Base(
        primary_hue="indigo", neutral_hue="stone", font=fonts, font_mono=["ui-monospace", "Menlo", "monospace"]
    ).set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
