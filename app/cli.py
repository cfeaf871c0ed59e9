"""The command `metaembed`: index folders and datasets, search them, serve them.

What takes seconds to import (torch, transformers) is imported in the commands that need it, so that `--help` is fast.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
except ImportError:
    sys.exit("metaembed: the command line needs typer: pip install 'metaembed[app]'")

OK, FAILED, USAGE, UNREADABLE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

app = typer.Typer(
    name="metaembed",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use, 3 done but for unreadable files, 130 interrupted.",
)

Index = Annotated[str, typer.Argument(metavar="INDEX", help="Folder of the index, or address of a store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, ...")]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Model, instead of the index's own.")]


class Wrong(Exception):
    """Wrong use of a command."""


@app.callback()
def metaembed() -> None:
    r"""Search pictures, texts and PDFs with as many vectors as you choose.

    \b
    metaembed index papers/ --model you/your-metaembed --to my-index
    metaembed search my-index "a plot of losses" --budget 4,8
    """


@app.command()
def index(
    sources: Annotated[list[str] | None, typer.Argument(metavar="SOURCE", hidden=True)] = None,
    to: Annotated[str, typer.Option(metavar="INDEX", help="Folder or address of a store.")] = ...,  # type: ignore
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Folder or Hub id.")] = None,
    sync: Annotated[bool, typer.Option("--sync", help="Re-encode what changed, delete what is gone.")] = False,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Documents in a forward pass.")] = 8,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Readers ahead of the model.")] = None,
    vectors: Annotated[int | None, typer.Option(min=1, metavar="N", help="Vectors kept of each.")] = None,
    quantization: Annotated[str | None, typer.Option(metavar="NAME", help="int8, float32, ...")] = None,
    pages: Annotated[str | None, typer.Option(metavar="KIND", help="PDFs as image, text or both.")] = None,
    dpi: Annotated[float | None, typer.Option(min=10, max=600, help="Of PDF pages: 144.", metavar="N")] = None,
    columns: Annotated[str, typer.Option(metavar="USE=NAME,...", help="Of a dataset: text=, image=, id=.")] = "",
    metadata: Annotated[str, typer.Option(metavar="NAME,...", help="Other columns to keep.")] = "",
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Also out of SOURCE.")] = False,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch pictures of a dataset.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Of the model.")] = False,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Index folders of pictures, texts and PDFs, or datasets; go on after a kill."""
    from .ingest import begin, ingest
    from .settings import REPORT, SETTINGS, folder_of

    named = _columns(columns, metadata)
    options = {"dpi": dpi, "pages": pages, "follow_links": follow_links, "allow_urls": allow_urls}
    folder = folder_of(to)
    new = not (folder / SETTINGS).exists()
    if new and not (model and sources):
        raise Wrong(f"{to} is no index yet: name a SOURCE and --model to make one")
    for source in sources or []:
        if not Path(source).exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
            raise Wrong(f"the source {source} is not there")
    settings = None if new else _checked(to, model, vectors, options)
    encoder = _encoder(model or settings.model, device, trust_remote_code, settings)
    if settings is None:
        settings = _new_settings(model, encoder, vectors, trust_remote_code, options)
    settings = begin(to, encoder, settings, **({"quantization": quantization} if quantization else {}))
    if not settings.ordered and not quiet:
        _say("The prefixes of this model are not trained: those of the index are ordered summaries.")
    summary = ingest(
        to,
        sources or [],
        encoder,
        sync=sync,
        batch_size=batch,
        workers=workers,
        progress=not quiet,
        columns=named,
    )
    _print_summary(summary, to, folder / REPORT, as_json)
    raise typer.Exit(UNREADABLE if summary.of("unreadable") else OK)


def _columns(text: str, metadata: str) -> Any:
    """Parse `text=caption,image=picture` into the columns of a dataset."""
    from .sources import Columns

    found = {}
    for part in filter(None, text.split(",")):
        use, _, name = part.partition("=")
        if use not in ("text", "image", "id", "split", "name") or not name:
            raise Wrong(f"--columns must be as text=caption,image=picture,id=key,split=train, not {text}")
        found[use] = name
    return Columns(**found, metadata=tuple(filter(None, metadata.split(","))))


def _checked(to: str, model: str | None, vectors: int | None, options: dict[str, Any]) -> Any:
    """The settings of an index, which a later run may not change."""
    from .settings import read_settings

    settings = read_settings(to)
    given = {"model": model and _absolute(model), "vectors": vectors}
    now = {"model": settings.model, "vectors": settings.vectors}
    given |= {name: value or None for name, value in options.items()}
    for name, value in given.items():
        if value is not None and value != (old := (now | settings.options).get(name)):
            flag = name.replace("_", "-")
            raise Wrong(f"{to} was made with --{flag} {old}, not {value}: leave it out, or make another index")
    return settings


def _new_settings(model: Any, encoder: Any, vectors: int | None, trust: bool, options: dict[str, Any]) -> Any:
    from dataclasses import asdict

    from .settings import Settings
    from .sources import Reading

    if vectors is not None and vectors > encoder.document_vectors:
        raise Wrong(f"--vectors must be from 1 to {encoder.document_vectors}, not {vectors}")
    if options["pages"] not in (None, "image", "text", "both"):
        raise Wrong(f"--pages must be image, text or both, not {options['pages']}")
    if options["pages"] in ("image", "both") and not encoder.takes_images:
        raise Wrong(f"{model} takes no pictures: leave --pages out, or use --pages text")
    default = {"pages": "image" if encoder.takes_images else "text"}
    reading = Reading(**{**default, **{name: value for name, value in options.items() if value is not None}})
    return Settings(
        model=_absolute(model),
        vectors=vectors or encoder.document_vectors,
        trust_remote_code=trust,
        options=asdict(reading),
    )


def _print_summary(summary: Any, to: str, report: Path, as_json: bool) -> None:
    unreadable = summary.of("unreadable")
    if as_json:
        counts = {name: len(summary.of(name)) for name in ("unreadable", "skipped", "changed", "gone")}
        done = {name: getattr(summary, name) for name in ("encoded", "kept", "deleted")}
        _out(json.dumps({**done, **counts, "seconds": round(summary.seconds, 1), "report": str(report)}))
        return
    rate = summary.encoded / summary.seconds if summary.seconds else 0
    _out(f"{summary.encoded:,} documents encoded in {summary.seconds:.1f} s ({rate:.1f} a second), in {to}")
    for count, what in (
        (summary.kept, "were there already"),
        (summary.deleted, "deleted"),
        (len(summary.of("changed")), "changed since: --sync encodes them anew"),
        (len(summary.of("skipped")), "files left out"),
        (len(unreadable), "could not be read"),
    ):
        if count:
            _out(f"  {count:,} {what}")
    for problem in unreadable[:20]:
        place = next((f" {key} {at}" for key in ("page", "row", "part") if (at := getattr(problem, key))), "")
        _say(f"{_plain(problem.file)}{place}: {_plain(problem.reason)}")
    if len(unreadable) > 20:
        _say(f"and {len(unreadable) - 20:,} more")
    if summary.problems:
        _out(f"  all of them with the reason: {report}")


@app.command()
def search(
    index: Index,
    words: Annotated[str | None, typer.Argument(metavar="WORDS", help="What to look for.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture to look for.")] = None,
    budget: Annotated[str | None, typer.Option(metavar="Q,D", help="Vectors of query and document.")] = None,
    k: Annotated[int, typer.Option("--k", min=1, max=10_000, metavar="N", help="How many to find.")] = 10,
    where: Annotated[str | None, typer.Option(metavar="JSON", help='As {"kind": "pdf"}.')] = None,
    model: Model = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Find the documents that fit words, a picture, or both."""
    import time

    from .settings import open_index

    condition = _condition(where)
    if not words and image is None:
        raise Wrong("give words, --image, or both")
    query: dict[str, Any] = {"text": words} if words else {}
    if image is not None:
        try:
            query["image"] = image.read_bytes()
        except OSError as error:
            raise Wrong(f"{image}: {error.strerror}") from None
    settings = _settings(index, model)
    store = open_index(index)
    encoder = _encoder(model or settings.model, device, settings.trust_remote_code, settings)
    if encoder.dim != store.dim:
        raise Wrong(f"{index} holds vectors of {store.dim} dimensions, and {encoder.name} makes {encoder.dim}")
    r_q, r_c = _budget(budget, encoder.query_vectors, store.vectors)
    start = time.perf_counter()
    queries = encoder.encode_queries([query], num_meta=r_q)
    encoded = time.perf_counter()
    hits = store.search(queries, k=k, budget=(r_q, r_c), where=condition)
    done = time.perf_counter()
    found = [
        {"id": i, "score": round(float(score), 4), **metadata}
        for i, score, metadata in zip(hits.ids[0], hits.scores[0], hits.metadata[0], strict=True)
    ]
    if as_json:
        content = {"budget": [r_q, r_c], "ordered": encoder.ordered, "hits": found}
        content |= {"encoding_ms": _ms(encoded - start), "scoring_ms": _ms(done - encoded)}
        _out(json.dumps(content, ensure_ascii=False))
        return
    for rank, hit in enumerate(found, start=1):
        place = next((f"  {key} {hit[key]}" for key in ("page", "part", "row") if key in hit), "")
        _out(f"{rank:3}  {hit['score']:8.4f}  {_plain(hit.get('file', hit['id']))}{place}")
        if hit.get("text"):
            _out(f"               {_plain(str(hit['text']))[:64]}")
    summaries = "" if encoder.ordered else ", ordered summaries"
    _say(
        f"{len(found)} of {len(store):,} documents, budget ({r_q},{r_c}){summaries}, "
        f"query encoded in {_ms(encoded - start)} ms, scored in {_ms(done - encoded)} ms"
    )


@app.command()
def info(index: Index, as_json: AsJson = False) -> None:
    """Say what an index holds."""
    from contextlib import closing

    from .journal import JOURNAL, Journal
    from .settings import REPORT, folder_of, open_index

    settings, folder = _settings(index, None), folder_of(index)
    with closing(open_index(index)) as store:
        content: dict[str, Any] = {"documents": len(store)}
        if (folder / JOURNAL).exists():
            with closing(Journal(folder / JOURNAL)) as journal:
                content["kinds"] = journal.counts()
        content["model"] = settings.model
        content["vectors"], content["dim"] = store.vectors, store.dim
        content["prefixes"] = "trained" if settings.ordered else "ordered summaries"
        content["budgets"] = settings.budgets
        for name in ("quantization", "bytes_per_document"):
            if hasattr(store, name):
                content[name] = getattr(store, name)
    if settings.address:
        content["store"] = settings.address
    else:
        content["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    content["sources"] = settings.roots
    if (folder / REPORT).exists():
        lines = (folder / REPORT).read_text(encoding="utf-8").splitlines()
        content["unreadable"] = sum(json.loads(line)["status"] == "unreadable" for line in lines)
    if as_json:
        _out(json.dumps(content, ensure_ascii=False))
        return
    for name, value in content.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_short(one)}" for key, one in value.items())
        elif isinstance(value, list):
            value = ", ".join(_short(one) for one in value)
        else:
            value = f"{value:,}" if isinstance(value, int) else value
        _out(f"{name.replace('_', ' '):20}{_plain(str(value))}")


@app.command()
def serve(
    index: Index,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N")] = 8000,
    model: Model = None,
    device: Device = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Nobody adds or deletes.")] = False,
    allow_host: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Fetch pictures from.")] = None,
    allow_folder: Annotated[list[str] | None, typer.Option(metavar="PATH", help="Read pictures of.")] = None,
) -> None:
    """Serve an index over HTTP; METAEMBED_API_KEY is the key."""
    _imported("server", "serve")(
        index,
        host=host,
        port=port,
        model=model,
        device=device,
        read_only=read_only,
        allow_hosts=tuple(allow_host or ()),
        allow_folders=tuple(allow_folder or ()),
    )


@app.command()
def demo(
    index: Index,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N")] = 7860,
    model: Model = None,
    device: Device = None,
) -> None:
    """Open a page to search an index in."""
    _imported("page", "launch")(index, host=host, port=port, model=model, device=device)


def _imported(module: str, name: str) -> Any:
    from importlib import import_module

    try:
        return getattr(import_module(f".{module}", __package__), name)
    except ImportError as error:
        raise ImportError(f"this needs {error.name or module}: pip install 'metaembed[app]'") from error


def _settings(index: str, model: str | None) -> Any:
    """The settings of an index; of one that `metaembed index` did not make, those that a model implies."""
    from .settings import Settings, is_address, read_settings

    try:
        return read_settings(index)
    except FileNotFoundError as error:
        there = is_address(index) or Path(index).is_dir()
        if not there:
            raise FileNotFoundError(f"there is no index {index}") from None
        if model is None:
            raise Wrong(f"{error}; name its model with --model") from None
        return Settings(model=_absolute(model))


def _encoder(model: str, device: str | None, trust_remote_code: bool, settings: Any) -> Any:
    _quiet()
    from ..inputs_metaembed import InputPolicy
    from .encoder import load_encoder

    urls = settings is not None and settings.options.get("allow_urls", False)
    policy = InputPolicy(schemes=("http", "https") if urls else (), folders=())
    try:
        return load_encoder(
            model,
            device=device,
            revision=settings.revision if settings else None,
            trust_remote_code=trust_remote_code or bool(settings and settings.trust_remote_code),
            policy=policy,
        )
    except OSError as error:
        raise FileNotFoundError(f"the model {model} cannot be loaded: {_first_line(error)}") from error


def _quiet() -> None:
    """Leave the progress bars to ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _absolute(model: str) -> str:
    """A folder's path from anywhere, or a Hub id."""
    return os.path.realpath(model) if Path(model).exists() else model


def _budget(text: str | None, query_vectors: int, document_vectors: int) -> tuple[int, int]:
    if text is None:
        return query_vectors, document_vectors
    found = re.fullmatch(r"\(?\s*(\d+)\s*,\s*(\d+)\s*\)?", text)
    budget = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (1 <= budget[0] <= query_vectors and 1 <= budget[1] <= document_vectors):
        raise Wrong(f"--budget must be Q,D from 1,1 to {query_vectors},{document_vectors}, not {text}")
    return budget


def _condition(where: str | None) -> dict[str, Any] | None:
    from .where import read_where

    try:
        return read_where(where, "--where")
    except ValueError as error:
        raise Wrong(str(error)) from None


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({','.join(map(str, value))})"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(text: str) -> str:
    """Text on one line, without what would steer a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)


def _out(text: str) -> None:
    print(text, flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or repr(error)
    return text if len(text) <= 500 else text[:499] + "…"


@contextmanager
def _terminating() -> Iterator[None]:
    """Take SIGTERM as a reason to end, as Ctrl-C is, so that processes and files are closed."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line, and exit. An error is one line; `METAEMBED_TRACEBACK=1` shows where it comes from."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    code = FAILED
    try:
        with _terminating():
            code = app(args=arguments, prog_name="metaembed", standalone_mode=False) or OK
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        code = _explained(error)
    if code == INTERRUPTED:  # which is also what typer returns for an interrupt
        _say("metaembed: interrupted; the same command goes on where it was")
    sys.exit(code)


def _explained(error: Exception) -> int:
    """Print an error as one line, and return the exit code."""
    if os.environ.get("METAEMBED_TRACEBACK"):
        raise error
    if hasattr(error, "format_message"):  # of click: wrong arguments
        _say(f"metaembed: {' '.join(error.format_message().split())}")
        return getattr(error, "exit_code", USAGE)
    _say(f"metaembed: {_plain(_first_line(error))}")
    return USAGE if isinstance(error, Wrong) else FAILED


if __name__ == "__main__":
    main()
