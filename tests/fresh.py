"""Fresh processes that start at once: forked from one that has imported the libraries and done nothing else.

Python takes eight seconds to import torch, transformers and sentence-transformers, and many tests promise something
of a process that has seen nothing else yet. This package is not among the imports: a child imports it, or forbids it.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import types
import warnings
from pathlib import Path

LIBRARIES = (
    *("torch", "torchvision", "PIL.Image", "safetensors.torch", "transformers", "sentence_transformers", "peft"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto"),
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
)


class FreshProcesses:
    """Starts processes as `subprocess.run([sys.executable, *command])` does, each with the Hub's cache it is told."""

    def __init__(self, folder: Path, **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._home = folder, folder / "home"  # libraries read where their cache is once: it is a link
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "TRANSFORMERS_", "PYTEST_")) and name != "PYTHONPATH"
        }
        environment = {**clean, "HF_HOME": str(self._home), "OMP_NUM_THREADS": "1", **environment}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, *command: object, cwd=None, home=None, path=(), env=None) -> subprocess.CompletedProcess:
        """Run `-c CODE ARGUMENTS...` or `SCRIPT ARGUMENTS...` in a process of its own.

        Args:
            cwd: The folder to run in; without it, an empty one.
            home: The Hub's cache (HF_HOME); without it, an empty one.
            path: Folders to import from, as in PYTHONPATH.
            env: Variables to set.
        """
        number = len(list(self._folder.iterdir()))
        folder = self._folder / f"run{number}"
        for place in (folder, cwd := Path(cwd or folder / "empty"), home := Path(home or folder / "home")):
            place.mkdir(exist_ok=True)
        self._home.unlink(missing_ok=True)
        self._home.symlink_to(home)
        request = dict(command=list(map(str, command)), cwd=str(cwd), path=list(map(str, path)), env=env or {})
        print(json.dumps({**request, "output": str(folder)}), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the process that forks others has died"
        out, err = ((folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command, int(answer), out, err)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """Fork a child for each request; in the child, become what is asked for and end as Python does."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: there are none that hold a lock
            child = os.fork()
        if not child:
            return become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(command: list[str], cwd: str, path: list[str], env: dict[str, str], output: str) -> None:
    os.chdir(cwd)
    os.environ.update(env)
    for number, name in ((0, os.devnull), (1, f"{output}/stdout"), (2, f"{output}/stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0, closefd=False)  # the old one may have read ahead
    if command[0] == "-c":
        sys.argv, sys.path[:1] = ["-c", *command[2:]], ["", *path]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[:1] = command, [os.path.dirname(command[0]), *path]
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    serve()
