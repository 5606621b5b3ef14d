"""`cacheclip info`: what runs where and why, as tables or JSON."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from cacheclip_jax.cli_options import AuxOption, DtypeOption, JsonOption, PrimaryOption
from cacheclip_jax.console import out, print_json


def info(primary: PrimaryOption = "", aux: AuxOption = "none", dtype: DtypeOption = "bfloat16",
         as_json: JsonOption = False) -> None:
    """What runs where, and why: versions, devices, attention, caches; of models only the configs are read."""
    from cacheclip_jax.info import gather
    named = {"primary": primary, "aux": aux}
    found = gather({role: source for role, source in named.items() if source not in ("", "none")}, dtype)
    if as_json:
        print_json(found)
        return
    _print(", ".join(f"{name} {number}" for name, number in found["versions"].items()))
    for each in found["devices"]:
        more = f", compute capability {each['compute_capability']}" if each["compute_capability"] else ""
        more += f", {each['memory_limit'] / 1e9:,.1f} GB each" if each["memory_limit"] else ""
        _print(f"{each['count']} x {each['kind']} ({each['platform']}){more}")
    out.print(_attention(found["attention"], found["few_rows"]))
    copies = found["copies"]
    _print(f"copies to the device: {'' if copies['pinned'] else 'not '}through pinned pages. {copies['reason']}")
    _print(f"compiled programs: {found['compiled_programs']}")
    _print(f"pulled models: {found['models_directory']}")
    for role, each in found["models"].items():
        out.print(_model(role, each))


def _print(line: str) -> None:
    out.print(escape(line), highlight=False, soft_wrap=True)


def _attention(rows: list[dict[str, Any]], few_rows: int) -> Table:
    """A line for each choice, with the dtypes and head dims that it is made for."""
    cases: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for r in rows:
        same = cases.setdefault((r["rows"], r["few_rows"], r["reason"]), {})
        same.setdefault(r["dtype"], []).append(str(r["head_dim"]))
    table = Table("dtype", "head dim", "row attention", f"to {few_rows} rows", "why")
    for choice, dims in cases.items():
        table.add_row("\n".join(dims), "\n".join(", ".join(d) for d in dims.values()), *choice)
    return table


def _model(role: str, model: dict[str, Any]) -> Table:
    attention = model["attention"]
    table = Table(show_header=False, title=escape(f"{role}: {model['source']}"))
    table.add_row("shape", f"{model['family']}, {model['num_layers']} layers, width {model['d_model']}, "
                           f"mlp {model['d_mlp']}, {model['num_heads']} query heads over {model['num_kv_heads']} kv "
                           f"heads of {model['head_dim']}, vocabulary {model['vocab_size']:,}, "
                           f"{model['max_positions']:,} positions")
    table.add_row("parameters", f"{model['parameters']:,} ({model['weight_bytes'] / 1e9:,.2f} GB in {model['dtype']})")
    table.add_row("cached token", f"{model['bytes_per_token']:,} bytes in {model['dtype']}")
    table.add_row("row attention", f"{attention['rows']}: {attention['reason']}")
    return table
