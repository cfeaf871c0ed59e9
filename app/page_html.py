"""The HTML of the search page: what was found becomes cards, tables and highlighted pictures. No event, no state."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image


@dataclass(frozen=True)
class Found:
    """A result as it is shown.

    Attributes:
        id: Of the document.
        name: Its file's name, or its id.
        score: Its score.
        picture: A data URL of its picture, or None for a text.
        text: Its first words, for a text.
        place: Where in the file it is: "page 3".
    """

    id: str
    name: str
    score: float
    picture: str | None = None
    text: str = ""
    place: str = ""

    @property
    def title(self) -> str:
        """The name, and where in the file it is."""
        return f"{self.name}, {self.place}" if self.place else self.name


def data_url(picture: Image.Image) -> str:
    """Return a picture as a data URL, so that the browser asks for no file."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def bytes_text(count: int) -> str:
    """Return a number of bytes as a person reads it: `272 B`, `4.2 KB`, `34 MB`."""
    size, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def milliseconds_text(seconds: float) -> str:
    """Return a time as a person reads it."""
    return f"{1000 * seconds:.2g} ms" if seconds < 0.01 else f"{1000 * seconds:,.0f} ms"


def message(text: str) -> str:
    """Return a sentence in place of something that there is not."""
    return f'<p class="me-message">{escape(text)}</p>'


def wrong(text: str) -> str:
    """Return what a visitor has to change, which a screen reader says at once."""
    return f'<p class="me-message me-wrong" role="alert">{escape(text)}</p>'


def summary(facts: Sequence[tuple[str, str]]) -> str:
    """Return facts, `(name, value)`, as a line of figures."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="me-facts" aria-live="polite">{items}</dl>'


def cards(found: Sequence[Found], best: float, chosen: str | None = None) -> str:
    """Return results as a list of buttons. Bars compare scores with `best`, the largest that there could be."""
    items = []
    for rank, hit in enumerate(found):
        face = (
            f'<img src="{hit.picture}" alt="" loading="lazy">'
            if hit.picture
            else f'<span class="me-text">{escape(hit.text or "(no preview)")}</span>'
        )
        place = f'<span class="me-page">{escape(hit.place)}</span>' if hit.place else ""
        filled = max(0.0, min(1.0, hit.score / best)) if best > 0 else 0.0
        label = escape(f"{rank + 1}: {hit.title}, score {hit.score:.2f}", quote=True)
        items.append(
            f'<li><button type="button" data-rank="{rank}" aria-pressed="{str(hit.id == chosen).lower()}" '
            f'aria-label="{label}"><span class="me-face">{face}{place}</span>'
            f'<span class="me-bar"><span style="width:{100 * filled:.0f}%"></span></span>'
            f'<span class="me-line"><span class="me-name">{escape(hit.name)}</span>'
            f'<span class="me-score">{hit.score:.2f}</span></span></button></li>'
        )
    return f'<ol class="me-cards">{"".join(items)}</ol>'


@dataclass(frozen=True)
class BudgetRow:
    """What a budget costs and finds."""

    budget: tuple[int, int]
    bytes_per_document: int
    seconds: float
    found: list[Found]


def budget_table(rows: Sequence[BudgetRow], current: tuple[int, int]) -> str:
    """Return one line for a budget, smallest first. What the largest budget finds too is framed."""
    last = {hit.id for hit in rows[-1].found}
    lines = []
    for row in rows:
        hits = "".join(
            f'<li class="{"me-same" if hit.id in last else "me-other"}" title="{escape(hit.title, quote=True)}">'
            + (f'<img src="{hit.picture}" alt="' if hit.picture else '<span class="me-text" aria-label="')
            + escape(f"{hit.title}, score {hit.score:.2f}", quote=True)
            + ('">' if hit.picture else f'">{escape(hit.text[:60])}</span>')
            + "</li>"
            for hit in row.found
        )
        same = sum(hit.id in last for hit in row.found)
        r_q, r_c = row.budget
        lines.append(
            f"<tr{' class=me-current' if row.budget == current else ''}>"
            f'<th scope="row">({r_q}, {r_c})</th>'
            f"<td>{bytes_text(row.bytes_per_document)}</td><td>{milliseconds_text(row.seconds)}</td>"
            f'<td class="me-agree">{same} of {len(row.found)}</td><td><ol>{hits}</ol></td></tr>'
        )
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("Budget", "Bytes a document", "Scoring", "Same as largest", "First results")
    )
    table = f'<table class="me-budgets"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return table + note("Framed results are also among the first of the largest budget.")


def header(title: str, documents: int, vectors: int) -> str:
    """Return the title, and what is searched."""
    what = f"{documents:,} documents, up to {vectors} vectors each. You choose how many a search uses."
    return f'<header class="me-head"><h1>{escape(title)}</h1><p>{what}</p></header>'


def heading(text: str) -> str:
    """Return a heading of a part of the page."""
    return f'<h2 class="me-heading">{escape(text)}</h2>'


def note(text: str) -> str:
    """Return a sentence below something."""
    return f'<p class="me-note">{escape(text)}</p>'


def attention_over_picture(picture: str, share: float, meta: int) -> str:
    """Return a highlighted picture, and the share of the attention of a Meta Token, 1 for the first, that is on it."""
    alt = f"The patches that Meta Token {meta} looked at, highlighted"
    caption = f"Meta Token {meta}: <b>{share:.0%}</b> of its attention is on the picture."
    return f'<figure class="me-look"><img src="{picture}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'


def attention_over_text(pieces: Sequence[tuple[str, float]], meta: int) -> str:
    """Return a text whose pieces are the more highlighted, the more attention of a Meta Token they got."""
    most = max((share for _, share in pieces), default=0.0) or 1.0
    spans = "".join(
        f'<span style="--share:{100 * share / most:.0f}%" title="{share:.1%} of the attention">{escape(text)}</span>'
        for text, share in pieces
    )
    whole = sum(share for _, share in pieces)
    caption = f"Meta Token {meta}: <b>{whole:.0%}</b> of its attention is on these words."
    return f'<figure class="me-look"><p class="me-tokens">{spans}</p><figcaption>{caption}</figcaption></figure>'


CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container .tabitem { padding: 14px 0 0 !important; border: 0; }
#ask { align-items: stretch; } #go { align-self: stretch; }
footer { display: none !important; }
.me-head h1 { font-size: 1.5rem; font-weight: 700; margin: 0.2rem 0 0; letter-spacing: -0.01em; }
.me-head p { margin: 0.15rem 0 0.4rem; color: var(--body-text-color-subdued); font-size: 0.95rem; }
.me-heading { font-size: 1.05rem; font-weight: 600; margin: 0.3rem 0 0; }
.me-note { color: var(--body-text-color-subdued); font-size: 0.92rem; margin: 0.3rem 0 0; }
.me-message { color: var(--body-text-color-subdued); padding: 1.2rem 0.2rem; margin: 0; }
.me-wrong { color: var(--body-text-color); border-left: 3px solid var(--error-border-color, #dc2626);
  padding: 0.6rem 0.9rem; overflow-wrap: anywhere; }
.me-facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 0.4rem 1.2rem;
  margin: 0; padding: 0.6rem 0; }
.me-facts dt { font-size: 0.78rem; color: var(--body-text-color-subdued); }
.me-facts dd { margin: 0; font-size: 1.12rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.me-cards { list-style: none; margin: 0; padding: 2px; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); }
.me-cards li { margin: 0; min-width: 0; }
.me-cards button { all: unset; box-sizing: border-box; width: 100%; height: 100%; cursor: pointer; display: block;
  border: 1px solid var(--border-color-primary); border-radius: 10px; overflow: hidden;
  background: var(--background-fill-primary); }
.me-cards button:hover { border-color: var(--color-accent); }
.me-cards button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px; }
.me-cards button[aria-pressed="true"] { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent); }
.me-face { display: flex; position: relative; aspect-ratio: 1; background: #fff; align-items: center;
  justify-content: center; overflow: hidden; }
.me-face img { width: 100%; height: 100%; object-fit: contain; margin: 0; }
.me-text { padding: 10px; color: #333; font-size: 0.8rem; line-height: 1.4; overflow: hidden;
  align-self: flex-start; overflow-wrap: anywhere; }
.me-page { position: absolute; right: 6px; bottom: 6px; background: rgba(0, 0, 0, 0.72); color: #fff;
  font-size: 0.75rem; border-radius: 5px; padding: 1px 7px; }
.me-bar { display: block; height: 3px; background: var(--border-color-primary); }
.me-bar span { display: block; height: 100%; background: var(--color-accent); }
.me-line { display: flex; justify-content: space-between; gap: 8px; padding: 6px 10px; font-size: 0.85rem; }
.me-name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--body-text-color-subdued); }
.me-score { font-weight: 600; font-variant-numeric: tabular-nums; color: var(--body-text-color); }
.me-budgets { border-collapse: collapse; width: 100%; font-size: 0.92rem; color: var(--body-text-color); }
.me-budgets th, .me-budgets td { text-align: left; padding: 8px 12px 8px 8px; vertical-align: middle;
  border-bottom: 1px solid var(--border-color-primary); font-variant-numeric: tabular-nums; white-space: nowrap; }
.me-budgets thead th { font-weight: 500; font-size: 0.8rem; color: var(--body-text-color-subdued); }
.me-budgets tbody th { font-weight: 600; }
.me-budgets tr.me-current th { box-shadow: inset 3px 0 var(--color-accent); }
.me-budgets td:last-child { width: 60%; white-space: normal; }
.me-budgets ol { display: flex; gap: 8px; list-style: none; margin: 0; padding: 0; }
.me-budgets li { flex: 0 1 92px; min-width: 0; aspect-ratio: 1; border-radius: 6px; overflow: hidden;
  background: #fff; margin: 0; border: 2px solid transparent; }
.me-budgets li.me-same { border-color: var(--color-accent); }
.me-budgets li.me-other img, .me-budgets li.me-other span { opacity: 0.45; }
.me-budgets li.me-other { border-color: var(--border-color-primary); }
.me-budgets li img { width: 100%; height: 100%; object-fit: contain; margin: 0; }
.me-look { margin: 0; } .me-look + .me-look { margin-top: 0.8rem; }
.me-look img { width: 100%; max-height: 460px;
  object-fit: contain; background: #fff; border-radius: 10px;
  border: 1px solid var(--border-color-primary); margin: 0; }
.me-look figcaption { padding: 0.6rem 0 0; font-size: 0.92rem; color: var(--body-text-color-subdued);
  line-height: 1.5; }
.me-look figcaption b { color: var(--body-text-color); font-weight: 600; }
.me-tokens { background: #fff; color: #1c1917; border-radius: 10px; padding: 14px; margin: 0; line-height: 2;
  font-size: 1.02rem; white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--border-color-primary); }
.me-tokens span { background: color-mix(in srgb, #ff6a00 calc(var(--share) * 0.75), transparent); border-radius: 3px;
  padding: 3px 0; }
@media (max-width: 640px) {
  .me-cards { grid-template-columns: repeat(2, 1fr); }
  .me-budgets thead { display: none; }
  .me-budgets tr { display: grid; grid-template-columns: auto 1fr 1fr 1fr; border-bottom: 1px solid
    var(--border-color-primary); padding: 6px 0; align-items: center; }
  .me-budgets th, .me-budgets td { border: 0; padding: 4px 8px 4px 6px; }
  .me-budgets .me-agree::after { content: " the same"; }
  .me-budgets td:last-child { grid-column: 1 / -1; width: auto; }
}
"""
