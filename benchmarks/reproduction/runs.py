"""What is run: methods, tasks and seeds, each run named by its settings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace

BUDGETS = ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64))  # the paper's
SMALL = BUDGETS[:3]  # what the full dial leaves to Meta Tokens
POOLED = (1, 2, 4, 8, 16, 32, 64)  # vectors of a pooled document


ADDED = ("term_weights", "tokens_first")  # fields that not all kept results know


@dataclass(frozen=True)
class Method:
    """How vectors are made of an input, and what is trained.

    Args:
        name: Short name, part of a run's name.
        label: What the tables and plots call it.
        kind: "meta" (Meta Tokens), "tokens" (the input's own tokens), "mean" or "last" (one vector), "agc", or "dial"
            (Meta Tokens and the input's own tokens from one forward pass).
        budgets: Budgets of the Meta Tokens that are trained.
        meta: Number of (query, document) Meta Tokens in the input. None: those of the largest budget.
        pooled: Numbers of vectors a document is pooled to in the loss, in addition to all tokens.
        dims: Numbers of first dimensions that are trained besides all of them (Matryoshka dimensions).
        normalize: "sum", "sqrt" or "mean" over the query vectors, in the logits.
        temperature: Of the logits.
        weights: Weights of the budgets. Empty: 1 each.
        terms: Of a dial: "t" query tokens x document tokens, "c" the two cross terms.
        term_weights: Of a dial: weights of the token term and of each cross term, where a budget's is 1.
        tokens_first: Share of the steps, from the start, that train the token term alone.
        projection: Of a dial: whether the tokens have a linear projection of their own.
        sees_query_tokens: Whether documents see the query Meta Tokens, as in the authors' layout.
        embedding_dim: Dimension after a projection. None: no projection.
        bidirectional: Whether every token of the input sees every other (pictures only).
        rows: What Meta Tokens start as: "spread" (mean and deviation of the vocabulary's rows) or "vocabulary"
            (copies of rows of it).
        hard_negatives: Number of hard negatives of each query (pictures: the scene with one pictogram exchanged).
        trained: False: the backbone as it is.
    """

    name: str
    label: str
    kind: str = "meta"
    budgets: tuple[tuple[int, int], ...] = ()
    meta: tuple[int, int] | None = None
    pooled: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    normalize: str = "sqrt"
    temperature: float = 0.03
    weights: tuple[float, ...] = ()
    terms: str = ""
    term_weights: tuple[float, float] = (1.0, 1.0)
    tokens_first: float = 0.0
    projection: bool = False
    sees_query_tokens: bool = False
    embedding_dim: int | None = None
    bidirectional: bool = False
    rows: str = "spread"
    hard_negatives: int = 0
    trained: bool = True

    @property
    def meta_tokens(self) -> tuple[int, int]:
        """The numbers of query and document Meta Tokens in the input."""
        return self.meta or (self.budgets[-1] if self.budgets else (0, 0))


@dataclass(frozen=True)
class Settings:
    """How a task's models are trained: the same for all methods.

    Args:
        steps: Number of training steps.
        batch: Queries in a batch, each with its document.
        learning_rate: Largest learning rate of AdamW.
        warmup: Steps of linear warm-up, before a cosine to 0.
        test: Number of documents to test on, where there is a choice.
        length: Largest number of text tokens of an input.
        cell: Pixels of a cell of a scene (patches are 4 pixels: a picture has (3 * cell / 8) ** 2 tokens).
        hidden: Width of the tiny backbone.
        layers: Layers of the tiny backbone.
    """

    steps: int
    batch: int = 32
    learning_rate: float = 3e-3
    warmup: int = 30
    test: int = 1000
    length: int | None = None
    cell: int = 16
    hidden: int = 64
    layers: int = 2


TASKS = {
    "pictures": Settings(steps=700),
    "manuals": Settings(steps=160, batch=16, learning_rate=2e-4, warmup=16, length=64, cell=0, hidden=0, layers=0),
}


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    task: str
    method: Method
    seed: int
    settings: Settings = field(default=TASKS["pictures"])

    @property
    def described(self) -> dict:
        """Everything that the result depends on, but for the versions."""
        method = asdict(self.method)
        del method["name"], method["label"]
        for name in ADDED:  # the results that were kept before there was this choice stay valid
            if getattr(self.method, name) == Method.__dataclass_fields__[name].default:
                del method[name]
        return {"task": self.task, "seed": self.seed, "method": method, "settings": asdict(self.settings)}

    @property
    def key(self) -> str:
        """Name of the run's file: changes with any setting."""
        digest = hashlib.sha256(json.dumps(self.described, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.task}-{self.method.name}-{self.seed}-{digest}"


MMR = Method("mmr", "MMR", budgets=BUDGETS)
PAPER = (
    MMR,
    Method("largest", "only (16,64) trained", budgets=BUDGETS[-1:]),
    Method("last", "one vector, last token", kind="last"),
    Method("mean", "one vector, mean", kind="mean"),
)
TOKENS = Method("tokens", "tokens, pooled afterwards", kind="tokens")
EVEN = Method("dial", "full dial, every term weighs 1", kind="dial", budgets=SMALL, terms="tc", projection=True)
DIAL = replace(EVEN, name="dial-t4", label="full dial", term_weights=(4.0, 1.0))
RIVALS = (
    TOKENS,
    Method("tokens-pooled", "tokens, pooled in the loss", kind="tokens", pooled=(1, 4, 8, 16, 32)),
    Method("agc", "attention-guided clustering", kind="agc", meta=(0, 16), pooled=(1, 4, 8, 16, 32)),
    Method("dimensions", "one vector, nested dimensions", kind="mean", dims=(16, 32)),
)
CHOICES = (
    replace(MMR, name="sum-0.03", label="summed, 0.03 (the paper's)", normalize="sum"),
    replace(MMR, name="sum-0.1", label="summed, 0.1", normalize="sum", temperature=0.1),
    replace(MMR, name="sum-0.3", label="summed, 0.3", normalize="sum", temperature=0.3),
    replace(MMR, name="sqrt-0.015", label="by root, 0.015", temperature=0.015),
    replace(MMR, name="sqrt-0.06", label="by root, 0.06", temperature=0.06),
    replace(MMR, name="mean-0.03", label="averaged, 0.03", normalize="mean"),
    replace(MMR, name="mean-0.01", label="averaged, 0.01", normalize="mean", temperature=0.01),
    replace(MMR, name="sees", label="documents see the query tokens", sees_query_tokens=True),
    replace(MMR, name="two-budgets", label="budgets (1,1) (16,64)", budgets=(BUDGETS[0], BUDGETS[-1])),
    replace(
        MMR,
        name="seven-budgets",
        label="budgets (1,1) (2,2) (3,4) (4,8) (8,16) (12,32) (16,64)",
        budgets=((1, 1), (2, 2), (3, 4), (4, 8), (8, 16), (12, 32), (16, 64)),
    ),
    replace(MMR, name="small-first", label="weights 4 2 1 1 1", weights=(4, 2, 1, 1, 1)),
    replace(MMR, name="large-first", label="weights 1 1 1 2 4", weights=(1, 1, 1, 2, 4)),
    replace(MMR, name="projection", label="projection to half the dimensions", embedding_dim=32),
    replace(MMR, name="vocabulary-rows", label="Meta Tokens start as rows of the vocabulary", rows="vocabulary"),
    replace(MMR, name="bidirectional", label="bidirectional attention", bidirectional=True),
    replace(MMR, name="hard-negatives", label="one hard negative a query", hard_negatives=1),
)
DIALS = (
    EVEN,
    replace(DIAL, name="dial-t16", label="token term weighs 16", term_weights=(16.0, 1.0)),
    replace(DIAL, name="dial-first", label="token term alone for 40% of the steps", tokens_first=0.4),
    replace(EVEN, name="dial-t", label="token term only, weighs 1", terms="t", projection=False),
    replace(EVEN, name="dial-tc", label="every term weighs 1, no projection", projection=False),
    replace(EVEN, name="dial-tp", label="token term only, weighs 1, projection", terms="t"),
    replace(MMR, name="anchored", label="token-anchored MMR", kind="dial", terms="tc"),
)
UNTRAINED = Method("untrained", "MiniLM as it is, mean", kind="mean", trained=False)
ALL = {method.name: method for method in (*PAPER, *RIVALS, DIAL, *CHOICES, *DIALS, UNTRAINED)}
ON_TEXT = {"bidirectional", "hard-negatives", "sees"}  # what has no meaning, or no data, with MiniLM and manuals


def plan(form: str) -> list[Run]:
    """Return the runs of a form, "quick" or "full", the most important first.

    A seed's runs of both tasks stand together, so that the full form, cut off anywhere, has whole comparisons.
    """
    if form == "quick":
        quick = {"pictures": (*PAPER[:2], TOKENS, DIAL, PAPER[3]), "manuals": (UNTRAINED, DIAL)}
        return [Run(task, method, 0, TASKS[task]) for task, methods in quick.items() for method in methods]
    seeds = range(6)
    dimensions = replace(RIVALS[3], dims=(64, 128, 192))
    first = {
        "pictures": (MMR, PAPER[1], TOKENS, DIAL, PAPER[3], PAPER[2], *RIVALS[1:]),
        "manuals": (UNTRAINED, TOKENS, DIAL, MMR, PAPER[1], PAPER[3], *RIVALS[1:3], dimensions, PAPER[2]),
    }
    second = {
        "pictures": (*DIALS, *CHOICES),
        "manuals": (*DIALS, *(method for method in CHOICES if method.name not in ON_TEXT)),
    }
    runs = []
    for methods in (first, second):
        for seed in seeds:
            for task, chosen in methods.items():
                runs += [Run(task, method, seed, TASKS[task]) for method in chosen if method.trained or seed == 0]
    return runs
