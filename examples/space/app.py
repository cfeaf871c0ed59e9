"""A Hugging Face Space that searches the documents beside it: see README.md."""

import os
from dataclasses import replace
from pathlib import Path

from metaembed.app.page import launch
from metaembed.app.settings import read_settings

HERE = Path(__file__).resolve().parent


def main(**options):
    """Start the page on the index and the documents beside this file."""
    settings = read_settings(HERE / "index")
    examples = [one.strip() for one in os.environ.get("EXAMPLES", "").split(";") if one.strip()]
    return launch(
        HERE / "index",
        os.environ.get("MODEL") or settings.model,
        host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),  # a Space is there for everybody
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
        settings=replace(settings, roots=[str(HERE / "documents")]),  # indexed on another machine
        title=os.environ.get("TITLE", "Search these documents"),
        words=os.environ.get("WORDS", ""),
        examples=examples,
        **options,
    )


if __name__ == "__main__":
    main()
