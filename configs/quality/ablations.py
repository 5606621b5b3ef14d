"""What each choice in CacheClip is worth: one setting changed at a time, at 4k, on four tasks of the tuning half.

    python -m eval.quality --config=configs/quality/ablations.py --config.data=DIR         # the selection
    python -m eval.quality --config=configs/quality/ablations.py:ratios --config.data=DIR  # 2 to 50%, and adaptive
    python -m eval.quality --config=configs/quality/ablations.py:chunks --config.data=DIR  # of 128 to 1024 tokens
    python -m eval.quality --config=configs/quality/ablations.py:aux --config.data=DIR     # another aux model
    python -m eval.report runs/ablations*.jsonl --out results/ablations

A label says what differs from the default, the preset `lead-in`: chunks behind a lead-in, the aux's late half of the
layers, last question row, mean of heads, the aux's own chunk caches, the question's words counting by 0.5%, whole
sentences of up to 96 tokens, stale tokens counting half.
"""

import dataclasses
from typing import Any

import ml_collections

from cacheclip_jax.methods import AuxGuided
from configs.quality import defaults

TASKS = (
    {"task": "niah_multikey_1", "data": defaults.TEXT},
    {"task": "niah_multivalue", "data": defaults.TEXT},
    {"task": "vt"},
    {"task": "qa_2", "data": defaults.HOTPOT, "count": 0},
)
RATIOS = (0.05, 0.1)


def get_config(which: str = "selection") -> ml_collections.ConfigDict:
    """`which`: selection, ratios, chunks or aux."""
    config = defaults.base()
    config.update({
        "run": f"ablations-{which}", "out": f"runs/ablations-{which}.jsonl", "tasks": TASKS, "lengths": (4096,),
        "split": "tune",
        "methods": {"selection": selection, "ratios": ratios, "chunks": chunks, "aux": other_aux}[which](),
    })
    if which == "aux":
        config.aux = "smollm2-135m"  # its tokens aren't the primary's
    if which == "chunks":
        config.tasks = tuple({**task, "name": f"{task['task']} {size}", "chunk_tokens": size}
                             for task in TASKS[:3] for size in (128, 256, 512, 1024))
    return config


def variant(label: str, **settings: Any) -> dict[str, Any]:
    """A column: the default with other settings."""
    return {"method": "cacheclip", "preset": "lead-in", "label": label, "ratios": RATIOS, **settings}


def ranked(**changed: Any) -> dict[str, Any]:
    """The default's ranking with fields changed."""
    return {**dataclasses.asdict(AuxGuided().ranking), **changed}


def selection() -> tuple[dict[str, Any], ...]:
    """Encoding, scoring, ranking and grouping."""
    return (
        {"method": "naive"}, {"method": "naive", "preset": "none"}, {"method": "naive", "preset": "lead-in"},
        variant("default"),
        variant("no lead-in", lead_in=""), variant("prefix none", lead_in="", prefix="none"),
        *(variant(f"discount {nats:g}", discount=nats) for nats in (0.0, 0.35, 1.4)),
        *(variant(f"layers {layers}", scoring={"layers": layers}) for layers in ("last", "all")),
        *(variant(f"rows {rows}", scoring={"rows": rows}) for rows in ("mean", "max", 4)),
        variant("heads max", scoring={"heads": "max"}),
        variant("joint", scoring={"context": "joint"}),
        variant("values", scoring={"values": True}),
        variant("look-ahead 8", scoring={"look_ahead": 8}),
        variant("second pass", scoring={"second_pass": 0.1}),
        *(variant(f"groups {size}", grouping={"size": size}) for size in (1, 4, 8, 16, 32)),
        variant("windows", grouping={"size": 8, "density": 5}),
        variant("sentences 32", grouping={"longest": 32}),
        variant("smooth 13", ranking=ranked(smooth=13)),
        *(variant(f"lexical {weight:g}", ranking=ranked(lexical=weight)) for weight in (0.0, 0.02)),
        variant("no sinks", ranking=ranked(skip_first=4)),
        variant("no formatting", ranking=ranked(skip_formatting=True)),
        *(variant(f"chunk power {power}", ranking=ranked(chunk_power=power)) for power in (-0.5, 0.5)),
        *(variant(f"heads of chunks {tokens}", heads_of_chunks=tokens) for tokens in (4, 16)),
        *({"method": "cacheclip", "preset": preset, "ratios": RATIOS} for preset in ("late", "paper")),
    )


def ratios() -> tuple[dict[str, Any], ...]:
    """How much is recomputed: fixed ratios, and shares of the score mass."""
    fixed = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
    return (
        {"method": "naive", "preset": "lead-in"},
        *({"method": "cacheclip", "preset": preset, "ratios": fixed} for preset in ("lead-in", "late", "paper")),
        *({"method": "cacheclip", "preset": "lead-in", "label": f"mass {mass:.0%}",
           "budget": {"mass": mass, "at_least": 0.02, "at_most": 0.3}} for mass in (0.5, 0.7, 0.9)),
    )


def chunks() -> tuple[dict[str, Any], ...]:
    """Few methods: here the tasks differ."""
    return ({"method": "naive", "preset": "lead-in"}, variant("default"),
            {"method": "prophetkv", "preset": "lead-in", "ratios": RATIOS})


def other_aux() -> tuple[dict[str, Any], ...]:
    """What depends on the aux model."""
    return (
        {"method": "naive", "preset": "lead-in"},
        variant("default"), variant("joint", scoring={"context": "joint"}),
        variant("lexical 0", ranking=ranked(lexical=0.0)),
        *({"method": "cacheclip", "preset": preset, "ratios": RATIOS} for preset in ("late", "paper")),
        {"method": "specprefill", "ratios": RATIOS},
    )
