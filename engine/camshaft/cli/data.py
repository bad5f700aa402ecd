"""``camshaft data``: tokenise text to indexed datasets, and look into them. Without torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from camshaft.cli.console import say, table, warn
from camshaft.errors import MachineError, Problem, RecipeError

if TYPE_CHECKING:
    from camshaft.data.build import Built, Progress
    from camshaft.data.corpus import TextFiles
    from camshaft.data.tokenizer import Tokenizer

_LINE_EVERY_S = 5.0


def register(app: typer.Typer) -> None:
    """Add the commands to the root app."""
    group = typer.Typer(no_args_is_help=True)
    group.callback()(data)
    group.command("build", no_args_is_help=True)(build)
    group.command("inspect")(inspect)
    app.add_typer(group, name="data")


def data() -> None:
    """Build tokenised datasets in Megatron's indexed format, and look into them."""


def build(
    files: Annotated[list[Path], typer.Argument(help="Text files (one document each) and .jsonl files (one a line).")],
    output: Annotated[Path, typer.Option(help="Path of the dataset, without .bin and .idx.")],
    tokenizer: Annotated[Path | None, typer.Option(help="A local tokenizer.json.")] = None,
    byte: Annotated[bool, typer.Option("--byte", help="One id a byte; no tokenizer file.")] = False,
    train_bpe: Annotated[
        int | None, typer.Option(min=258, help="Train a BPE of so many ids on the files; kept beside the output.")
    ] = None,
    json_key: Annotated[str, typer.Option(help="Key of the text in a .jsonl line.")] = "text",
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that tokenise; default: all cores.")] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Shuffle documents, so that the tail is a fair validation set.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.")] = False,
) -> None:
    """Tokenise FILES and write OUTPUT.bin and OUTPUT.idx. They appear only when they are complete."""
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # read by the tokenizers library when it starts its threads
    from camshaft.data.build import write_tokens
    from camshaft.data.corpus import TextFiles

    corpus = TextFiles(files, json_key)
    _refuse(output, corpus, overwrite, sum((tokenizer is not None, byte, train_bpe is not None)))
    began = time.monotonic()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _progress() as progress:
            used, saved = _tokenizer(corpus, output, tokenizer, train_bpe, progress)
            texts = corpus.documents() if shuffle else corpus.in_order()
            built = write_tokens(texts, used, output, total_bytes=corpus.size(), progress=progress)
    except OSError as error:
        raise MachineError(f"{output} cannot be written: {error.strerror or error}") from error
    _report(output, saved, used, built, time.monotonic() - began)


def inspect(
    prefix: Annotated[Path, typer.Argument(help="Path of the dataset, without .bin and .idx.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Show the first document with this tokenizer.json.")] = None,
) -> None:
    """Check a dataset and show what it holds. Ids are looked at in up to 64 MiB spread over the file."""
    from camshaft.data.indexed import IndexedDataset
    from camshaft.data.tokenizer import FileTokenizer

    found = IndexedDataset(prefix)
    low, high = found.id_range()
    first = found.read(0, min(found.start(1), 64)).tolist()
    rows = [
        ("documents", f"{found.documents:,}"),
        ("sequences", f"{found.sequences:,}"),
        ("tokens", f"{found.tokens:,}"),
        ("tokens a document", f"{found.tokens / found.documents:.1f}"),
        ("ids", f"{low} to {high}, stored as {found.dtype.name}"),
        ("bytes", f"{found.bin.stat().st_size + found.idx.stat().st_size:,}"),
        ("first tokens", " ".join(map(str, first))),
    ]
    if tokenizer is not None:
        rows.append(("first text", repr(FileTokenizer(tokenizer).decode(first))))
    table((), rows)


def _refuse(output: Path, corpus: TextFiles, overwrite: bool, ways: int) -> None:
    """Every fault of the arguments at once."""
    problems = [
        Problem("there is no such file", file=str(file), fix="correct the path")
        for file in corpus.files
        if not file.is_file()
    ]
    if ways != 1:
        said = "say how to tokenise" if ways == 0 else "there is more than one way to tokenise"
        problems.append(Problem(said, fix="give one of --tokenizer FILE, --byte and --train-bpe N"))
    if output.with_name(output.name + ".idx").exists() and not overwrite:
        problems.append(Problem("the dataset exists already", file=str(output), fix="add --overwrite"))
    if problems:
        raise RecipeError(problems)


def _tokenizer(
    corpus: TextFiles, output: Path, file: Path | None, bpe_size: int | None, progress: Progress
) -> tuple[Tokenizer, Path | None]:
    """The tokenizer and its file; a BPE is trained and written beside the output."""
    from camshaft.data.sources import training_sample
    from camshaft.data.tokenizer import ByteTokenizer, FileTokenizer, train_bpe

    if file is not None:
        return FileTokenizer(file), file
    if bpe_size is None:
        return ByteTokenizer(), None
    path = output.with_name(output.name + ".tokenizer.json")
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        work.write_text(train_bpe(training_sample(corpus, progress), bpe_size))
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)
    return FileTokenizer(path), path


def _report(output: Path, saved: Path | None, used: Tokenizer, built: Built, seconds: float) -> None:
    speed = built.text_bytes / 1e6 / max(seconds, 1e-9)
    say(
        f"{built.documents:,} documents, {built.tokens:,} tokens, {built.text_bytes:,} bytes of text"
        f" in {seconds:.1f} s ({speed:.1f} MB/s)"
    )
    say(f"wrote {output}.bin and {output}.idx. In a recipe:")
    say(f"  data: {{train: {{blend: [{{prefix: {output.resolve()}}}]}}}}")
    if saved is None:
        say("  tokenizer: {type: byte}")
    else:
        say(f"  tokenizer: {{type: file, path: {saved.resolve()}}}    # {used.vocab_size:,} ids")


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, a line every five seconds elsewhere."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage)
            bar.update(tasks[stage], completed=done, total=total or None)

        yield show


def _lines() -> Progress:
    last = time.monotonic()

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            share = f" of {total / 1e6:,.1f}" if total else ""
            warn(f"{stage}: {done / 1e6:,.1f}{share} MB")

    return show
