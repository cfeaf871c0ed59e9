"""Build what a release uploads, check it, and use it in an empty environment as the README says.

    python tests/release.py      or `make test-release`; the two files are in dist/ afterwards

Builds from the last commit, so that nothing else of the clone gets in. Downloads build, twine and all dependencies.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "train,examples,app"


def run(*command, **options):
    """Run a command, and end with what it printed if it fails."""
    print("$", *(Path(str(part)).name if os.path.isabs(str(part)) else part for part in command), flush=True)
    subprocess.run(list(map(str, command)), check=True, **options)


def make_environment(folder):
    """Return the Python of a new virtual environment."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def build(work, dist):
    """Build the sdist and the wheel of the last commit, check them, and return them."""
    commit = work / "commit"
    commit.mkdir()
    run("git", "archive", "--output", work / "commit.tar", "HEAD", cwd=ROOT)
    with tarfile.open(work / "commit.tar") as archive:
        archive.extractall(commit, filter="data")
    tools = make_environment(work / "tools")
    run(tools, "-m", "pip", "install", "--quiet", "build", "twine")
    shutil.rmtree(dist, ignore_errors=True)
    run(tools, "-m", "build", "--outdir", dist, commit, stdout=subprocess.DEVNULL)
    files = sorted(dist.iterdir())
    run(tools, "-m", "twine", "check", "--strict", *files)
    (wheel,), (sdist,) = ([file for file in files if file.name.endswith(end)] for end in (".whl", ".tar.gz"))
    return wheel, sdist


def install_and_use(work, wheel, sdist):
    """Install the wheel into an empty environment, and do there what the README of the sdist says."""
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "sdist", filter="data")
    (folder,) = (work / "sdist").iterdir()
    python = make_environment(work / "empty")
    pip = (python, "-m", "pip", "install", "--quiet", "--constraint", folder / "constraints.txt")
    run(*pip, "torch", "torchvision")
    run(*pip, f"{wheel}[{EXTRAS}]")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run(python, "-I", folder / "tests" / "release.py", "--use", cwd=folder, env={**environment, "HF_HUB_OFFLINE": "1"})


def use():
    """Use the package that is installed: the quickstart in small, the README's blocks, and the command."""
    import metaembed

    assert Path(metaembed.__file__).is_relative_to(sys.prefix), f"{metaembed.__file__} is not what was installed"
    small = ("--steps", 4, "--batch-size", 8, "--test-scenes", 20)
    run(sys.executable, "examples/quickstart.py", *small, stdout=subprocess.DEVNULL)

    sys.path.append("examples")
    from datasets import Dataset
    from tiny_backbone import build_backbone, build_processor

    pairs = {"query": ["red", "cat"], "positive": ["a red apple", "a cat face"]}
    processor = build_processor(pairs["positive"])
    for part in (build_backbone(processor), processor):
        part.save_pretrained("backbone")
    text = Path("README.md").read_text(encoding="utf-8").replace("Qwen/Qwen2.5-VL-3B-Instruct", "backbone")
    names = {"dataset": Dataset.from_dict(pairs)}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for number, block in enumerate(blocks, start=1):
        print(f"block {number} of the README, {block.count(chr(10))} lines", flush=True)
        exec(compile(block, f"README.md, block {number}", "exec"), names)

    command = Path(sys.executable).with_name("metaembed")
    for words in (("--help",), ("search", "--help")):
        start = time.perf_counter()
        run(command, *words, stdout=subprocess.DEVNULL)
        print(f"{time.perf_counter() - start:.2f} s")
    model = ("--model", "outputs/quickstart/model")
    run(command, "index", "outputs/quickstart/reload", *model, "--to", "pictures", "--quiet")
    run(command, "info", "pictures")
    search = (command, "search", "pictures", "red apple", "--budget", "4,8", "--where", '{"kind": "image"}', "--json")
    found = json.loads(subprocess.run(search, check=True, capture_output=True, text=True).stdout)
    assert len(found["hits"]) == 8, found
    print(f"metaembed {metaembed.__version__} does what its README says")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--use", action="store_true", help=argparse.SUPPRESS)  # in the empty environment
    parser.add_argument("--build-only", action="store_true", help="build and check, and install nothing")
    arguments = parser.parse_args()
    if arguments.use:
        return use()
    with tempfile.TemporaryDirectory() as folder:
        wheel, sdist = build(Path(folder), ROOT / "dist")
        if not arguments.build_only:
            install_and_use(Path(folder), wheel, sdist)
    for file in (wheel, sdist):
        print(f"{file.relative_to(ROOT)}  {file.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
