"""Presets: named settings of methods, in one place for configs, reports and docs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cacheclip_jax.errors import BadInput
from cacheclip_jax.groups import Grouping, Groups, Sentences, Windows
from cacheclip_jax.methods import METHODS, Method
from cacheclip_jax.model.adapter import Adapter
from cacheclip_jax.prompt import LEAD_IN
from cacheclip_jax.ranking import Ranking
from cacheclip_jax.score import SCORINGS, Scoring
from cacheclip_jax.select import Budget
from eval.teacher import Teacher

KINDS: dict[str, Any] = {**METHODS, Teacher.name: Teacher}
ADAPTER = "adapter"  # CacheClip's preset with a finetuned aux model and its scoring, where a run names one
_SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"scoring": scoring} for name, scoring in SCORINGS.items()},
    # The paper's second version, as far as known: of the best tokens, windows of 8 that hold at least 5 of them.
    "paper-windows": {"scoring": SCORINGS["paper"], "grouping": Windows()},
    "look-ahead": {"scoring": Scoring(look_ahead=8)},
    "second-pass": {"scoring": Scoring(second_pass=0.1)},
    "refined": {"scoring": Scoring(second_pass=0.1, look_ahead=8)},
    "chunk-heads": {"heads_of_chunks": 8},
    "no-prefix": {"prefix": "none"},
}
# Rivals with what helps them here too: chunks behind the shared prefix, or behind a lead-in as well.
_CALIBRATED: dict[str, dict[str, Any]] = {
    "shared": {"prefix": "shared"},
    "lead-in": {"prefix": "shared", "lead_in": True},
}
# method -> preset -> settings; `lead_in` says how chunks are encoded. A method without a preset is as it comes.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "cacheclip": {
        "lead-in": {"lead_in": True},  # the default of `CacheClip.load`
        "no-discount": {"lead_in": True, "discount": 0.0},
        "no-words": {"lead_in": True, "ranking": Ranking()},  # by attention alone
        "discount": {},  # the default without a lead-in
        **{name: {"discount": 0.0, "grouping": Groups(8), "ranking": Ranking(), **settings}
           for name, settings in _SETTINGS.items()},
    },
    "naive": {"none": {"prefix": "none"}, "lead-in": {"lead_in": True}},
    "prophetkv": {name: {"grouping": Groups(8), **settings} for name, settings in _CALIBRATED.items()},
    **{method: _CALIBRATED for method in ("cacheblend", "epic", "a3")},
}


@dataclass(frozen=True)
class Entry:
    """A column of an evaluation: a configured method, what reports call it, whether the finetuned aux model scores for
    it, in place of the one that it was trained from, and the lead-in that chunks are encoded behind ("": none)."""

    method: Method
    preset: str
    ratio: float | None
    adapted: bool = False
    lead_in: str = ""

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:.0%}"
        return " ".join(s for s in (self.method.name, self.preset, ratio) if s)


def columns(asked: Sequence[Mapping[str, Any]], adapter: Adapter | None = None) -> list[Entry]:
    """The columns of several entries. Raises BadInput for an adapter that none of them asks for."""
    out = [e for one in asked for e in entries(one, None if adapter is None else adapter.scoring)]
    if adapter is not None and not any(e.adapted for e in out):
        raise BadInput(f"the adapter of {adapter.base_name} is of no use: give cacheclip the preset {ADAPTER}, or "
                       "leave aux_adapter out")
    return out


def entries(asked: Mapping[str, Any], adapter: Scoring | None = None) -> list[Entry]:
    """The columns of a config's entry: {"method": name, "preset": name, "ratios": (...), "label": ..., settings...}.

    Settings go over the preset's; where a setting is an object (scoring, grouping, ranking, budget) a dict of its
    fields will do: {"size": 16} are groups, with `density` sliding windows, with `longest` sentences. `lead_in` is
    the text that chunks are encoded behind, True the default one. `label` is what
    reports call it, the preset's name by default. `adapter` is the scoring of CacheClip's preset "adapter". Raises
    BadInput for an unknown method, preset or setting, and for that preset without an adapter.
    """
    given = dict(asked)
    name, preset = given.pop("method"), given.pop("preset", "")
    label, ratios = given.pop("label", preset), given.pop("ratios", ())
    if name not in KINDS:
        raise BadInput(f"method {name!r} is unknown: choose one of {', '.join(KINDS)}")
    adapted = (name, preset) == ("cacheclip", ADAPTER)
    if adapted and adapter is None:
        raise BadInput(f"the preset {ADAPTER} needs a finetuned aux model: name its directory as "
                       "aux_adapter")
    named = {**PRESETS.get(name, {}), **({ADAPTER: {"scoring": adapter, "lead_in": True}} if adapted else {})}
    if preset and preset not in named:
        raise BadInput(f"{name} has no preset {preset!r}: choose one of {', '.join(named) or 'none'}")
    known = KINDS[name].__dataclass_fields__
    if ratios and "budget" not in known:
        raise BadInput(f"the method {name} recomputes a fixed share of the context: leave ratios out")
    settings = {**named.get(preset, {}), **given}
    lead_in = settings.pop("lead_in", "")
    lead_in = LEAD_IN if lead_in is True else lead_in or ""
    if ratios and "budget" in settings:
        raise BadInput(f"{name} {label}: give ratios or a budget, not both")
    try:
        settings = {key: _made(key, value) for key, value in settings.items()}
        budgets = [Budget(ratio=ratio) for ratio in ratios] or [settings.pop("budget", None)]
        return [Entry(KINDS[name](**settings) if budget is None else KINDS[name](budget=budget, **settings), label,
                      None if budget is None else budget.ratio, adapted, lead_in) for budget in budgets]
    except TypeError as e:
        raise BadInput(f"{name} can't be made of {', '.join(settings)}: it has {', '.join(known)} ({e})") from None


def _made(key: str, value: Any) -> Any:
    kinds: dict[str, Callable[..., Any]] = {"scoring": Scoring, "ranking": Ranking, "budget": Budget,
                                            "grouping": _grouping}
    if key not in kinds or not isinstance(value, Mapping):
        return value
    return kinds[key](**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def _grouping(**fields: Any) -> Grouping:
    kind = Windows if "density" in fields else Sentences if "longest" in fields else Groups
    return kind(**fields)
