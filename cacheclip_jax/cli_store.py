"""`cacheclip store`: what a chunk store holds, its checks, removal, export and import."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cacheclip_jax.cli_options import STORE, JsonOption, StoreOption, open_store
from cacheclip_jax.console import bar, err, out, print_json
from cacheclip_jax.errors import BadInput

store_app = typer.Typer(no_args_is_help=True, help="Look after a chunk store.")


@store_app.command()
def stats(store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """What a store holds, by model, dtype and prefix."""
    s = open_store(store).stats()
    rows = [{"model": x.space.model_name, "fingerprint": x.space.model, "dtype": x.space.dtype, "kv": x.space.kv,
             "prefix_tokens": len(x.space.prefix_ids), "chunks": x.chunks, "tokens": x.tokens, "bytes": x.nbytes,
             "bytes_per_token": x.bytes_per_token} for x in s.spaces]
    if as_json:
        print_json({"documents": s.documents, "passages": s.passages, "chunks": s.chunks, "tokens": s.tokens,
                     "bytes": s.nbytes, "spaces": rows})
        return
    table = Table("model", "dtype", "stored", "prefix", "chunks", "tokens", "MB", "kB/token",
                  title=f"{s.documents} documents, {s.passages} passages")
    for r in rows:
        table.add_row(r["model"], r["dtype"], r["kv"], f"{r['prefix_tokens']} tokens", str(r["chunks"]),
                      f"{r['tokens']:,}", f"{r['bytes'] / 1e6:,.1f}", f"{r['bytes_per_token'] / 1e3:.1f}")
    out.print(table)


@store_app.command()
def ls(store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """The stored passages: id, document, span, how they begin."""
    found = open_store(store).passages()
    if as_json:
        print_json([dataclasses.asdict(p) for p in found])
        return
    for p in found:
        start = " ".join(p.text[:70].split())
        print(f"{p.id}  {p.document}:{p.start}-{p.end}  {start}")


@store_app.command("verify")
def store_verify(store: StoreOption = STORE,
                 workers: Annotated[int, typer.Option(help="Chunk caches to check at once.")] = 2,
                 resume: Annotated[Path | None, typer.Option(metavar="FILE", help="Note here what was found whole, "
                                                             "and go on from it after an interruption.")] = None,
                 as_json: JsonOption = False) -> None:
    """Read everything and check every checksum; exits with 1 when something is damaged."""
    if workers < 1:
        raise BadInput(f"--workers {workers} is out of range: 1 or more")
    opened = open_store(store)
    with bar("checking") as step:
        problems = opened.verify(progress=step, workers=workers, resume=resume)
    if as_json:
        print_json([{**dataclasses.asdict(p), "harmless": p.harmless} for p in problems])
    else:
        for p in problems:
            colour = "yellow" if p.harmless else "red"
            out.print(f"[{colour}]{p.kind}[/] {escape(p.file)}: {escape(p.message)}", highlight=False, soft_wrap=True)
        damaged = sum(not p.harmless for p in problems)
        out.print(f"{damaged} damaged, {len(problems) - damaged} harmless findings" if problems else "all is well")
    if any(not p.harmless for p in problems):
        raise typer.Exit(1)


@store_app.command()
def rm(ids: Annotated[list[str] | None, typer.Argument(help="Passage ids, or their beginnings.")] = None,
       document: Annotated[list[str] | None, typer.Option("--document", "-d", help="A whole document, by the name that "
                                                          "`store ls` shows; repeatable.")] = None,
       store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """Remove passages or documents, and their chunk caches."""
    if not (ids or document):
        raise BadInput("there is nothing to remove: give passage ids or --document NAME, as `cacheclip store ls` shows")
    opened = open_store(store)
    whole_ids = {opened.resolve(id) for id in ids or ()}
    dropped, removed = 0, len(whole_ids)
    for name in document or ():
        if not (own := {p.id for p in opened.passages() if p.document == name}):
            raise BadInput(f"{opened.url} has no document {name!r}: `cacheclip store ls` lists what it has")
        dropped += opened.withdraw(name)
        removed += len(own - whole_ids)
        whole_ids -= own
    dropped += opened.remove(*whole_ids) if whole_ids else 0
    if as_json:
        print_json({"passages": removed, "chunks": dropped})
    else:
        out.print(f"{removed} passages and {dropped} chunk caches removed", highlight=False)


@store_app.command()
def gc(max_bytes: Annotated[int, typer.Option(help="Keep at most this many bytes of chunk caches, the newest.")],
       store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """Remove what unfinished writes left, and the oldest chunk caches beyond a size. Texts stay."""
    if max_bytes < 0:
        raise BadInput(f"--max-bytes {max_bytes} is out of range: 0 or more")
    report = open_store(store).gc(max_bytes)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        out.print(f"{report.chunks} chunk caches and {report.orphans} unfinished writes removed; "
                  f"{report.bytes_left / 1e6:,.1f} MB left", highlight=False)


@store_app.command("export")
def export_store(file: Annotated[Path, typer.Argument(help="The tar file to write; - for stdout.")],
                 store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """Write passages, documents and chunk caches as one tar stream; exits with 1 when damaged ones were left out."""
    opened, to_stdout = open_store(store), str(file) == "-"
    with bar("exporting") as step, (nullcontext(sys.stdout.buffer) if to_stdout else _file(file, "wb")) as stream:
        transfer = opened.export_to(stream, step)
    _report_transfer(transfer, as_json, to_stderr=to_stdout)


@store_app.command("import")
def import_store(file: Annotated[Path, typer.Argument(help="What `store export` wrote; - for stdin.")],
                 store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """Add an export to a store, which is made if it isn't there; every part is checked first."""
    with (nullcontext(sys.stdin.buffer) if str(file) == "-" else _file(file, "rb")) as stream:
        opened = open_store(store, create=True)
        with bar("importing") as step:
            transfer = opened.import_from(stream, lambda done, total: step(done, None))
        opened.flush()
    _report_transfer(transfer, as_json)


def _file(path: Path, mode: str):
    try:
        return path.open(mode)
    except OSError as e:
        raise BadInput(f"{path} can't be opened: {e.strerror}") from None


def _report_transfer(transfer, as_json: bool, to_stderr: bool = False) -> None:
    console = err if to_stderr else out
    if as_json and not to_stderr:
        print_json(dataclasses.asdict(transfer))
    else:
        console.print(f"{transfer.passages} passages, {transfer.documents} documents, {transfer.chunks} chunk caches; "
                      f"{transfer.found} were there already", highlight=False)
        for name in transfer.damaged:
            console.print(f"[red]damaged, left out:[/] {escape(name)}", highlight=False, soft_wrap=True)
    if transfer.damaged:
        raise typer.Exit(1)


@store_app.command()
def pin(documents: Annotated[list[str] | None, typer.Argument(help="Names that `store ls` shows; none lists the pins.")
                             ] = None,
        remove: Annotated[bool, typer.Option("--remove", help="Unpin them.")] = False,
        store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """Keep documents' chunk caches from gc and from eviction off a local tier."""
    opened = open_store(store)
    known = {p.document for p in opened.passages()} | set(opened.pinned()) if documents else set()
    if unknown := sorted(set(documents or ()) - known):
        raise BadInput(f"{opened.url} has no document {unknown[0]!r}: `cacheclip store ls` lists what it has")
    for name in documents or ():
        (opened.unpin if remove else opened.pin)(name)
    if as_json:
        print_json({"pinned": opened.pinned()})
    else:
        out.print(*(escape(name) for name in opened.pinned()), sep="\n", highlight=False)
