"""The training loop: batches in, a better student out; stops early, resumes exactly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from rich.console import Console

from cacheclip_jax import compiles
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.load import Model
from train.checkpoint import Checkpoints
from train.curves import Curves
from train.dataset import Batch, Lesson, batches
from train.devices import check_divides, replicate, spread
from train.forward import Kernel, Stacked, kernel, stack_layers
from train.holdout import holdout_recall
from train.losses import Loss
from train.settings import Settings
from train.student import Design, Student, new_student, score
from train.work import step_flops


@struct.dataclass
class State:
    """What changes on the device: the student, its optimizer's state, and the best student so far."""

    student: Student
    optimizer: Any
    best: Student


@dataclass
class Progress:
    """What changes on the host. seconds: of training, without compiling, measuring and saving; tokens and flops: of the
    steps in them. `stale` counts measurements since the best one."""

    step: int = 0
    best_step: int = 0
    best_recall: float = -1.0
    stale: int = 0
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    wall: float = 0.0


@dataclass(frozen=True)
class Trained:
    """A finished run: the best student, where it stood, and held-out recall before and after."""

    student: Student
    progress: Progress
    before: dict[str, float]
    after: dict[str, float]


@partial(jax.jit, static_argnames=("cfg", "design", "loss", "move", "how"), donate_argnames=("student", "optimizer"))
def train_step(student: Student, optimizer: Any, weights: Stacked, batch: Batch, cfg: ModelConfig, design: Design,
               loss: Loss, move: optax.GradientTransformation, how: Kernel
               ) -> tuple[Student, Any, dict[str, jax.Array]]:
    """One batch: the mean loss over prompts, its gradient, an update every `accumulation` batches. Weights of the model
    stay as they are, in their own precision; the student's are float32."""
    def objective(student):
        scores = score(student, weights, cfg, design, batch.packed, how)
        each = jax.vmap(loss)(scores, batch.target, batch.packed)
        return each["loss"].mean(), {name: value.mean() for name, value in each.items()}

    slopes, parts = jax.grad(objective, has_aux=True)(student)
    updates, optimizer = move.update(slopes, optimizer, student)
    return optax.apply_updates(student, updates), optimizer, parts | {"gradient": optax.global_norm(slopes)}


def train(run: Settings, model: Model, learnt: Sequence[Lesson], held: Sequence[Lesson], mesh: Mesh, console: Console
          ) -> Trained:
    """Train a student of `model`, from the last checkpoint in the run's folder if there is one."""
    for name, lot in (("train on", learnt), ("hold out", held)):
        if not lot:
            raise BadInput(f"there is nothing to {name}: raise benchmark.per_task and holdout_per_task, lower min_kl, "
                           "or give more documents")
    check_divides(run.batch, mesh)
    cfg, how, design = model.config, kernel(model), run.design
    weights, move = replicate(stack_layers(model.params), mesh), run.optimizing.make()
    fresh = new_student(jax.random.key(run.seed), cfg, design)
    state = replicate(State(fresh, move.init(fresh), jax.tree.map(jnp.copy, fresh)), mesh)
    stream = iter(batches(learnt, run.sizes.rows, run.batch, run.seed))
    checkpoints, progress = Checkpoints(run.out / "checkpoints"), Progress()
    mine = signature(run)
    if (found := checkpoints.restore(state)) is not None:
        state, rest = found
        if rest["settings"] != mine:
            raise BadInput(f"{run.out} holds a run with other settings: use another --config.out, or delete it")
        progress = Progress(**rest["progress"])
        stream.set_state(rest["data"])
        console.print(f"resumed at step {progress.step}")
    curves = Curves(run.out, progress.step, console)
    measure = partial(holdout_recall, weights=weights, cfg=cfg, held=held, budgets=run.stopping.budgets,
                      rows=run.sizes.rows, batch=run.batch, mesh=mesh, how=how)
    untouched = Design(layers="late", context=design.context, lora_layers=())
    before = measure(replicate(new_student(jax.random.key(0), cfg, untouched), mesh), design=untouched)
    if not progress.step:
        curves.add(0, "holdout", before)
    pace, began = Pace(progress), time.perf_counter() - progress.wall
    while progress.step < run.optimizing.steps and progress.stale < run.stopping.patience:
        batch, lessons = next(stream)
        student, optimizer, parts = train_step(state.student, state.optimizer, weights, spread(batch, mesh), cfg,
                                               design, run.loss, move, how)
        state = State(student, optimizer, state.best)
        progress.step += 1
        pace.add(lessons, step_flops(cfg, design, lessons))
        last = progress.step == run.optimizing.steps
        measured = last or progress.step % run.stopping.every == 0
        saved = last or progress.step % run.checkpoint_every == 0
        if measured or saved or progress.step % run.log_every == 0:
            numbers = {name: float(value) for name, value in parts.items()}
            curves.add(progress.step, "train", numbers | pace.stop(run.peak_flops * mesh.size))
        if measured:
            recalls = measure(state.student, design=design)
            curves.add(progress.step, "holdout", recalls)
            progress.stale += 1
            if recalls["recall"] > progress.best_recall:
                progress.best_recall, progress.best_step, progress.stale = recalls["recall"], progress.step, 0
                state = State(student, optimizer, jax.tree.map(jnp.copy, student))
        progress.wall = time.perf_counter() - began
        if saved or progress.stale == run.stopping.patience:
            checkpoints.save(progress.step, state, {"progress": vars(progress), "data": stream.get_state(),
                                                     "settings": mine})
        pace.start()
    checkpoints.close()
    curves.close()
    return Trained(state.best, progress, before, measure(state.best, design=design))


def signature(run: Settings) -> str:
    """What decides the outcome of a run, as text: a checkpoint goes on only under the same."""
    beside = ("data", "out", "results", "devices", "log_every", "checkpoint_every", "peak_flops", "teacher_batch",
              "stopping")
    return repr({name: value for name, value in vars(run).items() if name not in beside})


class Pace:
    """The pace of training between two stops. A stretch in which a program was compiled doesn't count."""

    def __init__(self, progress: Progress):
        self._progress, self._running = progress, False
        self.start()

    def start(self) -> None:
        """Begin a stretch, unless one is under way."""
        if not self._running:
            self._running, self._tokens, self._flops = True, 0, 0.0
            self._compiled, self._began = compiles.count(), time.perf_counter()

    def add(self, lessons: Sequence[Lesson], flops: float) -> None:
        """Count a step."""
        self._tokens += sum(len(each.prompt.ids) for each in lessons)
        self._flops += flops

    def stop(self, peak: float) -> dict[str, float]:
        """End the stretch: tokens per second and, where the devices' `peak` operations per second are known, MFU."""
        self._running, seconds = False, time.perf_counter() - self._began
        if compiles.count() > self._compiled:
            return {}
        self._progress.seconds += seconds
        self._progress.tokens += self._tokens
        self._progress.flops += self._flops
        return {"tokens_per_s": self._tokens / seconds} | ({"mfu": self._flops / seconds / peak} if peak else {})
