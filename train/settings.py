"""Settings of a training run: the config of the command line as frozen dataclasses, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cacheclip_jax.errors import BadInput
from cacheclip_jax.prompt import PromptFormat
from train.benchmark import Benchmark
from train.corpus import Corpus
from train.dataset import Sizes
from train.losses import Loss
from train.optimizer import Optimizing
from train.student import Design
from train.teach import TARGETS, Target, Teaching


@dataclass(frozen=True)
class Stopping:
    """Held-out recall is measured every `every` steps, the mean over `budgets`; the best weights are kept, and training
    ends after `patience` measurements without a better one."""

    every: int = 25
    patience: int = 5
    budgets: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)

    def __post_init__(self) -> None:
        if self.every < 1 or self.patience < 1 or not self.budgets:
            raise BadInput(f"every={self.every}, patience={self.patience}, budgets={self.budgets}: 1 or more each")


@dataclass(frozen=True)
class Settings:
    """One run. Examples and verdicts go to `data`, which runs may share, all else to `out`. The same settings on the
    same machine give the same adapter, interrupted or not."""

    data: Path
    out: Path
    results: Path
    primary: str
    aux: str
    dtype: str
    seed: int
    devices: int
    batch: int
    teacher_batch: int
    target: Target
    min_kl: float
    log_every: int
    checkpoint_every: int
    peak_flops: float
    sizes: Sizes
    benchmark: Benchmark
    corpus: Corpus
    teaching: Teaching
    design: Design
    loss: Loss
    optimizing: Optimizing
    stopping: Stopping


def settings(config: Mapping[str, Any]) -> Settings:
    """The settings that a config describes. Raises BadInput for what is out of range, naming it."""
    if config["target"] not in TARGETS:
        raise BadInput(f"target={config['target']!r}: choose one of {', '.join(TARGETS)}")
    if config["log_every"] < 1 or config["checkpoint_every"] < 1:
        raise BadInput(f"log_every={config['log_every']}, checkpoint_every={config['checkpoint_every']}: 1 or more")
    lengths = tuple(sorted(set(config["lengths"])))
    corpus = dict(config["corpus"])
    form = PromptFormat(**corpus.pop("format", {}))
    teaching = _made(Teaching, config["teaching"])
    benchmark = _made(Benchmark, dict(config["benchmark"]) | {"lengths": lengths, "seed": config["seed"]})
    plain = ("primary", "aux", "dtype", "seed", "devices", "batch", "teacher_batch", "target", "min_kl", "log_every",
             "checkpoint_every", "peak_flops")
    return Settings(
        data=Path(config["data"]), out=Path(config["out"]), results=Path(config["results"]),
        **{name: config[name] for name in plain},
        sizes=Sizes(lengths, config["question_tokens"], teaching.answer_tokens), benchmark=benchmark,
        corpus=_made(Corpus, corpus | {"length": max(lengths), "seed": config["seed"], "format": form}),
        teaching=teaching, design=_made(Design, config["design"]), loss=_made(Loss, config["loss"]),
        optimizing=_made(Optimizing, config["optimizing"]), stopping=_made(Stopping, config["stopping"]))


def _made[T](kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of a config's values, lists as tuples."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise BadInput(f"{kind.__name__.lower()} has no setting {unknown[0]!r}: it has {', '.join(sorted(known))}")
    made = {name: tuple(value) if isinstance(value, list | tuple) else value for name, value in values.items()}
    return kind(**made)
