"""Draws the SVG pictures of docs/concepts.md: `python docs/site/drawings.py`. They bring their own background."""

from __future__ import annotations

from html import escape
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "images"
STYLE = """
  .paper { fill: #ffffff; } .line { stroke: #5b6270; stroke-width: 1.5; fill: none; }
  text { font: 15px system-ui, sans-serif; fill: #20242c; } .small { font-size: 13px; fill: #4d5562; }
  .token { fill: #e3e6ec; } .query { fill: #3f6fd8; } .document { fill: #c2571a; } .off { opacity: .22; }
  .box { fill: #f3f4f7; stroke: #5b6270; stroke-width: 1.5; }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #1e2129; } .line { stroke: #a5adbb; } text { fill: #eceff4; } .small { fill: #c3c9d4; }
    .token { fill: #434a58; } .query { fill: #7ea2f0; } .document { fill: #f09a5e; }
    .box { fill: #2a2f3a; stroke: #a5adbb; }
  }
"""


def text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    """Return words at a place."""
    return f'<text x="{x:g}" y="{y:g}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'


def cells(x: float, y: float, count: int, css: str, width: int = 18, gap: int = 4, on: int | None = None) -> str:
    """Return a row of cells, of which the first `on` are bright."""
    on = count if on is None else on
    size = f'width="{width}" height="{max(width, 12)}" rx="{min(3, width // 3)}"'
    return "".join(
        f'<rect x="{x + i * (width + gap):g}" y="{y:g}" {size} class="{css if i < on else f"{css} off"}"/>'
        for i in range(count)
    )


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """Return a line that ends in an arrow."""
    return f'<path class="line" marker-end="url(#end)" d="M{x:g} {y:g}L{to_x:g} {to_y:g}"/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return a whole SVG picture."""
    marker = '<marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    marker += '<path class="line" d="M1 1L7 4L1 7"/></marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    paper = f'<rect class="paper" width="{width}" height="{height}" rx="8"/>'
    lines = [head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", f"<defs>{marker}</defs>", paper]
    return "\n".join([*lines, *parts, "</svg>"]) + "\n"


def meta_tokens() -> str:
    """Draw how an input becomes a matrix: tokens, Meta Tokens, backbone, rows."""
    parts = [
        text(30, 44, "what the document holds"),
        cells(30, 58, 13, "token"),
        text(352, 44, "64 Meta Tokens"),
        cells(352, 58, 8, "document"),
        text(532, 73, "…"),
        '<rect x="30" y="112" width="530" height="46" rx="6" class="box"/>',
        text(295, 141, "the backbone, untouched: any vision-language model", anchor="middle"),
        *(arrow(x, 80, x, 110) for x in (39, 171, 303, 361, 449, 515)),
        *(arrow(x, 160, x, 196) for x in (361, 405, 449, 493)),
        cells(352, 202, 8, "document"),
        text(532, 217, "…"),
        text(30, 194, "Kept are the last hidden states at"),
        text(30, 216, "the Meta Tokens, L2-normalised:"),
        text(30, 238, "the embedding, [64, D]"),
    ]
    return picture(
        590, 262, "Meta Tokens are appended to the input; their last hidden states are the embedding", parts
    )


def budgets() -> str:
    """Draw the five budgets as prefixes of the same vectors."""
    parts = [text(30, 40, "query vectors"), text(250, 40, "document vectors"), text(650, 40, "budget")]
    for row, (r_q, r_c) in enumerate([(1, 1), (2, 4), (4, 8), (8, 16), (16, 64)]):
        y = 58 + 30 * row
        parts.append(cells(30, y, 16, "query", width=9, gap=3, on=r_q))
        parts.append(cells(250, y, 64, "document", width=4, gap=2, on=r_c))
        parts.append(text(650, y + 12, f"({r_q}, {r_c})"))
    parts.append(
        text(30, 226, "One encoding and one index: a budget says how many vectors count, from the first.", "small")
    )
    return picture(730, 250, "Budgets are prefixes of the same query and document vectors", parts)


def mmr() -> str:
    """Draw the training loss: one forward pass, a loss for each prefix, summed."""
    parts = [
        text(30, 40, "one forward pass"),
        '<rect x="30" y="54" width="150" height="150" rx="6" class="box"/>',
        text(105, 118, "16 vectors a query", anchor="middle"),
        text(105, 144, "64 a document", anchor="middle"),
        text(260, 40, "a contrastive loss for each budget"),
        text(590, 122, "sum of the five"),
        text(590, 144, "= L", anchor="start"),
    ]
    for row, (r_q, r_c) in enumerate([(1, 1), (2, 4), (4, 8), (8, 16), (16, 64)]):
        y = 68 + 30 * row
        parts += [
            arrow(182, 129, 256, y),
            f'<rect x="260" y="{y - 13}" width="230" height="26" rx="5" class="box"/>',
            text(375, y + 5, f"InfoNCE of the scores at ({r_q}, {r_c})", "small", "middle"),
            arrow(492, y, 582, 126),
        ]
    return picture(730, 226, "Matryoshka Multi-Vector Retrieval trains every prefix at once", parts)


def full_dial() -> str:
    """Draw the full dial: Meta Tokens for the small sizes, the document's own tokens for the large ones."""
    parts = [
        text(30, 40, "small sizes: Meta Tokens"),
        text(370, 40, "large sizes: the document's own tokens, pooled"),
    ]
    for row, count in enumerate((1, 4, 8)):
        parts += [cells(30, 58 + 32 * row, 8, "document", on=count), text(222, 72 + 32 * row, f"{count}", "small")]
    for row, (count, words) in enumerate(((8, "8 pooled"), (16, "16 pooled"), (24, "all"))):
        parts.append(cells(370, 60 + 32 * row, 24, "document", width=9, gap=3, on=count))
        parts.append(text(668, 72 + 32 * row, words, "small"))
    parts.append(text(30, 178, "Both come from one encoding of the document.", "small"))
    return picture(740, 200, "The full dial: Meta Tokens for small sizes, pooled tokens for large ones", parts)


DRAWINGS = {"meta-tokens": meta_tokens, "budgets": budgets, "mmr": mmr, "full-dial": full_dial}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (IMAGES / f"concept-{name}.svg").write_text(draw(), encoding="utf-8")
