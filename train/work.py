"""Work: floating-point operations of a training step, as the model needs them, for MFU."""

from __future__ import annotations

from collections.abc import Sequence

from cacheclip_jax.model.config import ModelConfig
from train.dataset import Lesson
from train.student import Design


def step_flops(cfg: ModelConfig, design: Design, chosen: Sequence[Lesson]) -> float:
    """Operations of a training step over lessons, without padding and recomputation.

    A row costs 2 per weight and layer, and 4 N H per slot that it sees. Frozen weights need no gradient of their own,
    so a row that gradients pass through costs its forward pass once more; chunks are such rows where `design.rows` is
    "all".
    """
    depth = design.scoring().depth(cfg.num_layers)
    per_row = cfg.d_model * cfg.head_dim * (2 * cfg.num_heads + 2 * cfg.num_kv_heads) + 3 * cfg.d_model * cfg.d_mlp
    total = 0.0
    for each in chosen:
        P, chunks, Q = len(each.prompt.prefix), each.prompt.chunk_lengths, len(each.prompt.question)
        context = P + sum(chunks)
        seen = P * P / 2 + sum(n * P + n * n / 2 for n in chunks) if design.context == "cached" else context**2 / 2
        encode = _forward(cfg, depth, per_row, context, seen)
        ask = _forward(cfg, depth, per_row, Q, Q * (context + Q / 2))
        total += encode * (2 if design.rows == "all" else 1) + 2 * ask
    return total


def _forward(cfg: ModelConfig, depth: int, per_row: int, rows: float, seen: float) -> float:
    return depth * (2 * per_row * rows + 4 * cfg.num_heads * cfg.head_dim * seen)
