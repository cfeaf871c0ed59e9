"""Take the pictures of docs/search-page.md: the search page on the quickstart's scenes, in Chromium without a window.

    make quickstart
    python benchmarks/screenshots.py      writes docs/images/search-*.png

Needs playwright and a Chromium (`apt-get install chromium`). Fails if the page asks anything of another machine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

import demo  # noqa: E402


def open_page(browser: Browser, url: str, width: int, height: int, scale: float) -> Page:
    """Open the page, and wait until its first query is answered."""
    page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
    elsewhere: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url))
    page.goto(url)
    expect(page.locator("#looked img")).to_be_visible(timeout=60_000)
    if foreign := [one for one in elsewhere if not one.startswith((url, "data:", "blob:"))]:
        raise SystemExit(f"the page asked other machines: {foreign}")
    page.evaluate("document.activeElement.blur()")
    return page


def take(target: Any, path: Path) -> None:
    """Save a picture of the page, or a part of it, in few colours: the file stays small."""
    getattr(target, "page", target).wait_for_timeout(800)  # for a last answer, and smooth scrolling
    target.screenshot(path=path)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}  {small.width} x {small.height}  {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("chromium-browser"))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    app, url, _ = demo.main(["--port", "0"], prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        page = open_page(browser, url, 1180, 980, 1)
        take(page, arguments.output / "search-desktop.png")
        take(page.locator("#look"), arguments.output / "search-attention.png")
        page.get_by_label("Your query").check()
        expect(page.locator("#looked .me-tokens")).to_be_visible()
        take(page.locator("#look"), arguments.output / "search-attention-query.png")
        page.get_by_role("tab", name="Every budget").click()
        expect(page.locator("#budgets tbody tr")).to_have_count(5, timeout=60_000)
        page.evaluate("document.activeElement.blur()")
        take(page.locator("#budgets"), arguments.output / "search-budgets.png")
        page = open_page(browser, url, 390, 844, 1.5)
        take(page, arguments.output / "search-phone.png")
        page.locator("#results button").nth(1).click()
        expect(page.locator("#looked img")).to_be_in_viewport()
        take(page, arguments.output / "search-phone-attention.png")
        browser.close()
    app.blocks.close(verbose=False)


if __name__ == "__main__":
    main()
