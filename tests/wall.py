"""Print the files that travel with a checkpoint, with their lines.

python tests/wall.py
"""

from pathlib import Path

from metaembed.loading_metaembed import TRAVELLING

ROOT = Path(__file__).parent.parent
MOST_FILES, MOST_LINES = 7, 2_200  # what a person who is asked to trust the code can read in one sitting


def lines():
    """Return the number of lines of each file, blank ones, comments and docstrings included."""
    return {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in TRAVELLING}


if __name__ == "__main__":
    for name, count in lines().items():
        print(f"{count:6,}  {name}")
    print(f"{sum(lines().values()):6,}  in {len(lines())} files, of {MOST_LINES:,} allowed in {MOST_FILES}")
