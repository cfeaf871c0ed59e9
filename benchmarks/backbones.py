"""Try every architecture that transformers lists for images or recordings with text, and write the table of results.

    python benchmarks/backbones.py [--only qwen3_vl,paligemma] [--output docs/backbones.md]

With `--only`, the rows of the other architectures stay as they are in the output file.

Each architecture is built tiny, with random weights and its real processor (see `tests/tiny.py`), and must pass every
check of `tests/conformance.py`.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402
from conformance import CHECKS, inputs_of, load, run  # noqa: E402
from tiny import build  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES  # noqa: E402

from metaembed.evaluation.tables import markdown_table  # noqa: E402

ALSO = ["modernvbert", "audioflamingo3", "qwen3", "llama", "bert", "modernbert"]
TIME_LIMIT = 300  # seconds of the processor for one architecture
LONGEST_REASON = 600  # characters

# Why some do not work, read in their source, where the error alone does not say it. The error itself is printed.
NEEDS = "Its base model needs {} with every text (pixel_values), so a text alone has no vectors."
NAMELESS = "transformers names no processor for it, so the tiny model has none."
REASONS = {
    **dict.fromkeys(("blip", "blip-2", "idefics", "instructblip", "kosmos-2"), NEEDS.format("an image")),
    **dict.fromkeys(("fast_vlm", "kosmos-2.5"), NAMELESS),
    "diffusion_gemma": "Its last hidden states are at a canvas of random tokens and not at the input's tokens.",
    "evolla": "Its processor takes proteins and chats about them, and no texts.",
    "fuyu": "Its processor drops the first token of a prompt with an image: with its own tokenizer that is an "
    "underscore, with the tiny one it is a part of the image.",
    "gemma3n": "With its vision tower, mobilenetv5_300m_enc of timm, the tiny model has 295 million parameters, too "
    "many to try here.",
    "instructblipvideo": NEEDS.format("a video"),
    "nemotron_h_omni": "transformers has no base model for it (AutoModel), only one with a head, and names no feature "
    "extractor for its processor.",
    "perception_lm": "Its vision tower is one of timm's, whose sizes (model_args) the default configuration lacks.",
    "qwen2_5_omni": "It also speaks; the part that reads is by itself: qwen2_5_omni_thinker works.",
    "qwen3_omni_moe": "It also speaks; the part that reads is by itself: qwen3_omni_moe_thinker works.",
    "vision-encoder-decoder": "It is an encoder-decoder, and its encoder takes images alone.",
    "voxtral": "Its processor takes recordings in chats alone, through the tokenizer of mistral-common, which is not "
    "built here.",
}

HEADER = """\
# Backbones

Written by `make backbones` with transformers {version}. The table covers every architecture that it lists for images,
videos or recordings with text, and some others. Each is built tiny, with random weights and its real processor, and
must pass every check of `tests/conformance.py`: {checks}.

**{works} of {total} work.** For the others, the second table gives the reason. The package has no list of backbones:
a model is a backbone if it passes the checks of `MetaEmbedModel.from_backbone`.

- *prefix*: "fewer tokens" if the backbone is causal, so that `num_meta` Meta Tokens are enough; "slice" if it is not,
  so that all Meta Tokens are appended and the first `num_meta` rows are kept.
- *batches*: "mixed" if inputs with any numbers of images can share a batch; "by images" if only inputs with equal
  numbers of images can; "alone" if each input with images is encoded by itself. The same holds for recordings, where
  it differs. `encode_queries` and `encode_documents` form the batches accordingly.

## Backbones that work

{table}

## Backbones that do not work

{reasons}
"""


class TooLongError(Exception):
    """Raised when an architecture takes longer than the time limit."""


def raise_too_long(*_) -> None:
    """Raise `TooLongError` when the alarm goes off."""
    raise TooLongError(f"took longer than {TIME_LIMIT} s")


def attempt(name: str) -> tuple[bool, list[str]]:
    """Try one architecture.

    Returns:
        Whether it works, and the cells of its row.
    """
    stage = "built tiny"
    signal.signal(signal.SIGPROF, raise_too_long)
    signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)
    try:
        build(name)
        stage = "created"
        model = load(name)
        for check in CHECKS:
            stage = check.replace("_", " ")
            with tempfile.TemporaryDirectory() as folder:
                run(check, name, Path(folder))
        traits = model.config.traits
        batches = "mixed" if traits.mixes_images else "by images" if traits.batches_images else "alone"
        heard = "mixed" if traits.mixes_audio else "by recordings" if traits.batches_audio else "alone"
        if traits.takes_audio and heard != batches:
            batches = f"{batches}; recordings: {heard}"
        return True, [", ".join(inputs_of(model)), "fewer tokens" if traits.causal else "slice", batches]
    except Exception as error:
        reason = " ".join((str(error) or "the check failed").split()).replace("|", "\\|")
        if "Unrecognized configuration class" in reason:  # and then names all that are recognized
            reason = "transformers has no base model for it (AutoModel)"
        reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]} ..."
        kind = {"built tiny": "not built here", "created": "refused at creation"}.get(stage, f"fails: {stage}")
        return False, [kind, reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def read(path: Path) -> dict[str, tuple[bool, list[str]]]:
    """Return the results in a file written by this command."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    works, _, fails = text.partition("## Backbones that do not work")
    results = {}
    for worked, part in ((True, works), (False, fails)):
        for line in part.splitlines():
            if line.startswith("| ") and "| architecture |" not in line:
                name, *cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
                results[name] = worked, cells
    return results


def main() -> None:
    """Try all architectures, or the named ones, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="names of architectures, separated by commas")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "backbones.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # models this small are slower with more
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    every = [*MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, *ALSO]
    results = read(arguments.output) if arguments.only else {}
    for name in tqdm(arguments.only.split(",") if arguments.only else every):
        start = time.process_time()
        results[name] = attempt(name)
        tqdm.write(f"{name}: {', '.join(results[name][1])}, {time.process_time() - start:.1f} s")
        write(results, arguments.output)  # each time: what was found out is kept if the next one crashes
    print(f"{sum(works for works, _ in results.values())} of {len(results)} work. Written to {arguments.output}.")


def write(results: dict[str, tuple[bool, list[str]]], path: Path) -> None:
    """Write the tables of results."""
    rows = {
        works: sorted([name, *cells] for name, (worked, cells) in results.items() if worked is works)
        for works in (True, False)
    }
    for row in rows[False]:
        row[-1] = REASONS.get(row[0], row[-1])
    text = HEADER.format(
        version=transformers.__version__,
        checks=", ".join(check.replace("_", " ") for check in CHECKS),
        works=len(rows[True]),
        total=len(results),
        table=markdown_table(["architecture", "inputs", "prefix", "batches"], rows[True]),
        reasons=markdown_table(["architecture", "stage", "reason"], rows[False]),
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
