"""Presets: named settings of methods, in one place for configs, reports and docs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods import METHODS, Method, make, takes_budget
from cacheclip_jax.score import SCORINGS, Scoring
from cacheclip_jax.select import Budget, Groups, Windows

# method -> preset -> settings. The preset "" is the method as it comes.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "cacheclip": {
        **{name: {"scoring": scoring} for name, scoring in SCORINGS.items()},
        # What is known of the paper's two versions: groups of 8, and windows of 8 with at least 5 of the best tokens.
        "paper-windows": {"scoring": SCORINGS["paper"], "grouping": Windows()},
    },
    "naive": {"none": {"prefix": "none"}},
}


@dataclass(frozen=True)
class Entry:
    """A column of an evaluation: a configured method, and what reports call it."""

    method: Method
    preset: str
    ratio: float | None

    def __str__(self) -> str:
        return " ".join(s for s in (self.method.name, self.preset, "" if self.ratio is None else f"{self.ratio:.0%}") if s)


def entries(asked: Mapping[str, Any]) -> list[Entry]:
    """The columns of a config's entry: {"method": name, "preset": name, "ratios": (...), "label": ..., settings...}.

    Settings go over the preset's; those of `scoring` and `grouping` may be dicts of fields ({"size": 16}; a `density`
    makes it a sliding window). `label` is what reports call it, the preset's name by default. Raises BadInput for an
    unknown method, preset or setting.
    """
    given = dict(asked)
    name, preset = given.pop("method"), given.pop("preset", "")
    label, ratios = given.pop("label", preset), given.pop("ratios", ())
    if name not in METHODS:
        raise BadInput(f"method {name!r} is unknown: choose one of {', '.join(METHODS)}")
    named = PRESETS.get(name, {})
    if preset and preset not in named:
        raise BadInput(f"{name} has no preset {preset!r}: choose one of {', '.join(named) or 'none'}")
    if ratios and not takes_budget(name):
        raise BadInput(f"the method {name} recomputes a fixed share of the context: leave ratios out")
    settings = {**named.get(preset, {}), **given}
    for key, kind in (("scoring", _scoring), ("grouping", _grouping)):
        if isinstance(fields := settings.get(key), Mapping):
            settings[key] = kind(fields)
    try:
        return [Entry(make(name, None if ratio is None else Budget(ratio=ratio), **settings), label, ratio)
                for ratio in ratios or (None,)]
    except TypeError as e:
        known = ", ".join(METHODS[name].__dataclass_fields__)
        raise BadInput(f"{name} can't be made of {', '.join(settings) or 'no settings'} ({e}): it has {known}") from None


def _scoring(fields: Mapping[str, Any]) -> Scoring:
    layers = fields.get("layers", Scoring.layers)
    return Scoring(**{**fields, "layers": layers if isinstance(layers, str) else tuple(layers)})


def _grouping(fields: Mapping[str, Any]) -> Groups | Windows:
    return Windows(**fields) if "density" in fields else Groups(**fields)
