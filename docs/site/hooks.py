"""What `mkdocs.yml` adds to MkDocs: links out of docs/, the package for the API reference, and links of docstrings."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parents[2]
log = logging.getLogger("mkdocs.hooks")  # a warning fails a strict build
_package = tempfile.TemporaryDirectory(prefix="metaembed-docs-")


@event_priority(100)  # before mkdocstrings reads where the package is
def on_config(config: Any) -> Any:
    """Give the API reference a copy of the package under its name: a clone's folder may have any, and tests in it."""
    package = Path(_package.name) / "metaembed"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir()
    for path in ROOT.glob("*.py"):
        if path.name != "setup.py":
            shutil.copy(path, package)
    for marker in ROOT.glob("*/__init__.py"):
        shutil.copytree(marker.parent, package / marker.parent.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in package.rglob("*.py"):  # Google's style knows "Example:" too, but griffe shows only this as code
        text = re.sub(r"^( +)Example:$", r"\1Examples:", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")
    config.nav = existing(config.nav, Path(config.docs_dir))
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_package.name]
    return config


def existing(nav: Any, docs: Path) -> Any:
    """Return a part of the navigation without the pages that are not there (yet)."""
    if isinstance(nav, list):
        return [part for part in (existing(part, docs) for part in nav) if part]
    if isinstance(nav, dict):
        return {title: part for title, part in ((title, existing(part, docs)) for title, part in nav.items()) if part}
    return nav if (docs / nav).is_file() else None


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Lead links to files outside docs/, which GitHub shows, to the repository."""
    folder = Path(page.file.abs_src_path).parent

    def to_repository(match: re.Match[str]) -> str:
        name, _, anchor = match[2].partition("#")
        target = (folder / name).resolve()
        if target.is_relative_to(Path(config.docs_dir).resolve()):
            return match[0]
        if not target.exists():
            log.warning(f"{page.file.src_path} links to {match[2]}, which does not exist")
        kind = "tree" if target.is_dir() else "blob"
        address = f"{config.repo_url}/{kind}/main/{target.relative_to(ROOT).as_posix()}"
        return f"{match[1]}({address}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"(\])\((\.\./[^)\s]+)\)", to_repository, markdown)


def on_env(env: Any, config: Any, files: Any) -> Any:
    """Turn the [`name`] of docstrings into links, where the reference has the name, and into code where not."""
    documented = {}
    for identifier in config.plugins["autorefs"]._primary_url_map:
        for start in range(identifier.count(".") + 1):
            documented.setdefault(".".join(identifier.split(".")[start:]), identifier)
    for file in files.documentation_pages():
        link = r'<autoref identifier="{}" optional><code>{}</code></autoref>'

        def resolve(match: re.Match[str], link: str = link) -> str:
            known = documented.get(match[1])
            return link.format(known, match[1]) if known else f"<code>{match[1]}</code>"

        file.page.content = re.sub(r"\[<code>([\w.]+)</code>\]", resolve, file.page.content)
    return env
