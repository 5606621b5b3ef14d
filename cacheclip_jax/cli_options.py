"""The options that commands share, and the store that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

PrimaryOption = Annotated[str, typer.Option("--primary", envvar="CACHECLIP_PRIMARY", metavar="MODEL", help=
                                            "The model that answers: a known name, a directory, a hub id or a .gguf.")]
AuxOption = Annotated[str, typer.Option("--aux", envvar="CACHECLIP_AUX", metavar="MODEL",
                                        help="The small model that scores tokens; 'none' to do without.")]
AdapterOption = Annotated[Path | None, typer.Option("--aux-adapter", envvar="CACHECLIP_AUX_ADAPTER", metavar="FOLDER",
                                                    help="A finetuned aux's adapter; give the same when indexing.")]
LeadInOption = Annotated[bool, typer.Option("--lead-in/--no-lead-in", help="Encode passages behind a neutral text "
                                            "that is in no prompt. Ask as you indexed.")]
StoreOption = Annotated[str, typer.Option("--store", envvar="CACHECLIP_STORE", metavar="URL",
                                          help="Where chunk caches live: a path, or an s3:// or gs:// URL.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Of weights and caches: bfloat16, float32 or float16.")]
KvOption = Annotated[str, typer.Option("--kv", envvar="CACHECLIP_KV", metavar="KIND", help="How caches are stored: "
                                       "exact, or int8 or fp8 (half the bytes). Ask as you indexed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]

store_options: dict[str, Any] = {}  # what the options before the command say about the store
opened_stores: list[Any] = []  # the stores of this command, for their metrics

PRIMARY = "qwen2.5-coder-0.5b"
AUX = "qwen2.5-coder-0.5b"
STORE = "cacheclip-store"


def open_store(store: str, **options: Any):
    """The namespace of a store that the command line names; it has to exist unless `create` is given."""
    from cacheclip_jax.store import ChunkStore
    opened = ChunkStore.open(store, **{"create": False} | store_options | options)
    opened_stores.append(opened)
    return opened
