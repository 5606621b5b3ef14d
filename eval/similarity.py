"""Do two models look at the same context? Similarity of attention, layer by layer (CacheClip's figure 2).

    python -m eval.similarity --config=configs/quality/similarity.py --config.data=DIR

What the primary's question attends to in a full prefill, at each layer, is compared with the aux model's later layers,
over its chunk caches and in a full prefill of its own, and with the primary's own early layers. Writes OUT.jsonl (a row
for each sample and pair of layers), OUT.md (a table) and OUT.svg.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from rich.progress import track

from cacheclip_jax.assemble import KVCache, place
from cacheclip_jax.engine import enable_compilation_cache
from cacheclip_jax.errors import BadInput
from cacheclip_jax.online import padded, prefill
from cacheclip_jax.request import scores_between
from cacheclip_jax.score import Scoring, embed_and_score
from eval import machine
from eval.lab import ResidentSide, load_lab, located
from eval.ledger import rows_into
from eval.plot_similarity import draw
from eval.samples import jobs, made
from eval.script import start
from eval.tasks import Sample

Context = Literal["joint", "cached"]
Row = dict[str, Any]

TOP = 0.2  # of the context's tokens, for the two overlaps
FLOOR = 1e-10  # added to every token's share, so that one which underflowed leaves a divergence finite
ROWS: tuple[Literal["mean", "last"], ...] = ("mean", "last")
CONTEXTS: tuple[Context, ...] = ("joint", "cached")
MEASURES = ("kl", "cosine", "jaccard20", "recall20")

_placed = partial(jax.jit, static_argnums=0)(place)


def measures(theirs: Float[np.ndarray, "C"], ours: Float[np.ndarray, "C"]) -> dict[str, float]:
    """How near `theirs` comes to `ours`, two non-negative scores of the same tokens.

    kl: KL(ours || theirs) in nats, both as shares of their sum. cosine: of the two vectors. jaccard20: tokens that are
    among the best 20% (rounded up; of equal ones the earlier) of both, over those that are of either. recall20: over
    those that are of ours.
    """
    p, q = (x / x.sum() + FLOOR for x in (ours.astype(np.float64), theirs.astype(np.float64)))
    p, q = p / p.sum(), q / q.sum()
    best, other = (set(np.argsort(-x, kind="stable")[: int(np.ceil(TOP * len(x)))].tolist()) for x in (ours, theirs))
    both = len(best & other)
    return {"kl": float((p * np.log(p / q)).sum()), "cosine": float(p @ q / np.linalg.norm(p) / np.linalg.norm(q)),
            "jaccard20": both / len(best | other), "recall20": both / len(best)}


def attention(side: ResidentSide, context: Context) -> dict[str, Float[np.ndarray, "L S"]]:
    """The question's attention to every slot at each layer, the mean over heads, for each reduction over rows.

    A layer's is what `Scoring(layers=(i,))` gives, but all come from one pass: as the scores of as many sets of head
    weights, which are zero but for one layer's.
    """
    model, prompt = side.model, side.prompt
    cfg, start, end = model.config, prompt.question_start, len(prompt.ids)
    cache = prefill(side, start)[1] if context == "joint" else _assembled(side)
    ids, positions = padded(prompt.question, np.arange(start, end), side.rows(end - start, "question"))
    each = np.eye(cfg.num_layers, dtype=np.float32)[:, :, None] * np.full(cfg.num_heads, 1 / cfg.num_heads, np.float32)
    out: dict[str, np.ndarray] = {}
    for rows in ROWS:
        def scores(weights, rows=rows, cache=cache):
            return embed_and_score(model.params, cfg, Scoring(layers="all", rows=rows), ids, positions,
                                   np.int32(end - start - 1), cache, model.attention.name, weights)

        _, by_layer, cache = jax.vmap(scores, out_axes=(None, 0, None))(each)
        out[rows] = np.asarray(by_layer)
    return out


def _assembled(side: ResidentSide) -> KVCache:
    feed = side.feed("shared", side.model.config.num_layers)
    layers = [_placed(side.model.config, rows, feed.where) for number in range(len(feed.blocks))
              for rows in feed.take(number)]
    return KVCache(*zip(*layers, strict=True))


def compare(primary: ResidentSide, aux: ResidentSide) -> Iterator[Row]:
    """A row for every pair of layers worth a look: the aux's later half with each of the primary's layers, and the
    primary's first half with its second.

    `aux_layer` is the scorer's layer, whichever model that is; "late" the mean of the layers that `Scoring` calls so.
    """
    depth = primary.model.config.num_layers

    def by_layer(side: ResidentSide, context: Context) -> dict[str, list[np.ndarray]]:
        prefix = len(side.prompt.prefix)
        return {rows: [scores_between(scores[prefix:], side.prompt, primary.prompt) for scores in layers]
                for rows, layers in attention(side, context).items()}

    ours = by_layer(primary, "joint")
    for rows, own in ours.items():
        for early in range(depth // 2):
            for deep in range(depth // 2, depth):
                yield {"scorer": "primary", "context": "joint", "rows": rows, "aux_layer": early,
                       "primary_layer": deep, **measures(own[early], own[deep])}
    for context in CONTEXTS:
        for rows, theirs in by_layer(aux, context).items():
            late = np.mean([theirs[i] for i in Scoring(layers="late").layer_indices(len(theirs))], axis=0)
            for layer, scored in [*list(enumerate(theirs))[len(theirs) // 2 :], ("late", late)]:
                for deep in range(depth):
                    yield {"scorer": "aux", "context": context, "rows": rows, "aux_layer": layer,
                           "primary_layer": deep, **measures(scored, ours[rows][deep])}


def summary(rows: list[Row], aux_layers: int, primary_layers: int) -> str:
    """A Markdown table: how near each scorer comes to the primary's second half of layers, the mean over these and
    over samples."""
    lines = ["| attention of | context | rows | KL (nats) | cosine | top 20%: Jaccard | top 20%: recall |",
             "|---|---|---|---|---|---|---|"]
    kinds = [*(("aux", context, layer) for context in CONTEXTS for layer in (aux_layers - 1, "late")),
             *(("primary", "joint", layer) for layer in range(primary_layers // 2))]
    for reduction in ROWS:
        for scorer, context, layer in kinds:
            chosen = [r for r in rows if (r["scorer"], r["context"], r["aux_layer"]) == (scorer, context, layer)
                      and r["rows"] == reduction and r["primary_layer"] >= primary_layers // 2]
            name = f"{scorer}, late layers" if layer == "late" else f"{scorer}, layer {layer}"
            values = " | ".join(f"{np.mean([r[m] for r in chosen]):.3f}" for m in MEASURES)
            lines.append(f"| {name} | {context} | {reduction} | {values} |")
    return "\n".join(lines) + "\n"


def run(config: ConfigDict) -> list[Path]:
    """Compare, and write the three files. Raises BadInput where they exist, or the task has no samples."""
    targets = [Path(f"{config.out}.{kind}") for kind in ("jsonl", "md", "svg")]
    if found := [str(t) for t in targets if t.exists()]:
        raise BadInput(f"{found[0]} exists: name another --config.out, or delete it")
    enable_compilation_cache()
    tokenizer, commit = located(config.primary), machine.commit()
    lab = load_lab(config.primary, config.aux, config.dtype, None)
    asked: list[tuple[str, Sample, int]] = []
    for job in jobs(config.tasks, config.lengths, config.data or None, count=config.count, split=config.split,
                    seed=config.seed):
        of = made(job, tokenizer, judged=1)
        asked += [(job.name, sample, of.slots) for sample in of.samples]
    rows: list[Row] = []
    with rows_into(targets[0]) as write:
        for task, sample, slots in track(asked, "comparing"):
            sides = lab.sides(sample, slots, 1)
            assert sides.aux is not None
            for row in compare(sides.primary, sides.aux):
                rows.append({"run": config.run, "task": task, "sample": sample.id, **row})
                write(_rounded(rows[-1]))
    tokens = [len(sample.context) for _, sample, _ in asked]
    about = (f"{config.primary} (primary), {config.aux} (aux), {config.dtype}, {machine.device()}, "
             f"{datetime.date.today().isoformat()}, commit {commit}; {len(asked)} samples of "
             f"{', '.join(dict.fromkeys(task for task, *_ in asked))} at {', '.join(map(str, config.lengths))} tokens, "
             f"{min(tokens)} to {max(tokens)} chunks.")
    layers = [model.config.num_layers for model in (lab.aux, lab.primary) if model is not None]
    targets[1].write_text(f"{about}\n\n{_HEAD}\n{summary(rows, *layers)}", encoding="utf-8")
    draw(rows, *layers).savefig(targets[2], bbox_inches="tight")
    return targets


_HEAD = f"""Similarity to the question's attention in the primary's second half of layers in a full prefill: the mean
over these layers and over samples. Layers count from 0. Two random choices of {TOP:.0%} have a recall of {TOP}.
"""


def _rounded(row: Row) -> Row:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def main(config: ConfigDict) -> None:
    """The script."""
    print(*run(config), sep="\n")


if __name__ == "__main__":
    start(main, "What to compare, see configs/quality/similarity.py.")
