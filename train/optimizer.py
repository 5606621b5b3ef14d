"""The optimizer: Adam with warm-up and cosine decay, clipped, in two learning rates."""

from __future__ import annotations

from dataclasses import dataclass

import optax

from cacheclip_jax.errors import BadInput
from train.student import Student


@dataclass(frozen=True)
class Optimizing:
    """How weights move.

    steps: batches in all; an update is made of `accumulation` of them. lr, head_lr: highest learning rates of low-rank
    factors and of head weights' logits, reached after `warmup` updates and gone after the last. clip: largest norm of
    an update's gradient.
    """

    steps: int = 300
    lr: float = 2e-3
    head_lr: float = 3e-2
    warmup: int = 20
    clip: float = 1.0
    weight_decay: float = 0.0
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.accumulation < 1 or self.steps < self.accumulation or not 0 <= self.warmup < self.updates:
            raise BadInput(f"steps={self.steps}, accumulation={self.accumulation}, warmup={self.warmup}: at least one "
                           "update, and warm-up ends before the last")

    @property
    def updates(self) -> int:
        """Updates in all."""
        return self.steps // self.accumulation

    def make(self) -> optax.GradientTransformation:
        """The transformation of a Student's gradients."""
        def adam(peak: float) -> optax.GradientTransformation:
            rate = optax.warmup_cosine_decay_schedule(0.0, peak, self.warmup, self.updates)
            return optax.adamw(rate, b2=0.99, weight_decay=self.weight_decay)

        def kinds(student: Student) -> Student:
            return Student("lora", "heads")  # type: ignore[arg-type]

        each = optax.partition({"lora": adam(self.lr), "heads": adam(self.head_lr)}, kinds)
        chain = optax.chain(optax.clip_by_global_norm(self.clip), each)
        return optax.MultiSteps(chain, self.accumulation).gradient_transformation()
