"""How much better could a selection be? A greedy search for what to recompute, by its effect on the answer.

    python -m eval.headroom --config=configs/quality/headroom.py --config.data=DIR

The search begins with nothing recomputed and adds, one at a time, the group of tokens that takes most from the distance
to full attention for each token that it costs: KL(full || this) in nats, the mean over the first tokens of full
attention's answer. So it knows the answer, which no method does. It isn't the best set either, since it never looks at
two groups together: there is at least this much room. Writes OUT.jsonl (a row for each sample, method and ratio) and
OUT.md (a table).
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from ml_collections import ConfigDict
from rich.progress import track

from cacheclip_jax.engine import enable_compilation_cache
from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods import AuxGuided, Full
from cacheclip_jax.model.load import Model
from cacheclip_jax.online import Repaired, execute
from cacheclip_jax.plan import Discount, Plan
from cacheclip_jax.recompute import continuation_logits
from cacheclip_jax.request import Request
from cacheclip_jax.select import Budget, Windows
from eval import machine
from eval.batch_decode import Reference, first_tokens
from eval.lab import MANY_SIZES, Lab, load_lab, located, request
from eval.ledger import rows_into
from eval.presets import Entry, columns
from eval.samples import jobs, made, rounds
from eval.script import start
from eval.statistics import kl_divergence, top1_agreement
from eval.tasks import Sample

SEARCH = "search"  # what its rows have as method
HEAD = 32  # tokens of a chunk, for the share of groups that begin there
Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A group that the search has added, and the distance with it."""

    group: int
    distance: float


def search(distance: Callable[[Sequence[int]], float], sizes: Sequence[int], most: int, width: int) -> list[Step]:
    """Groups in the order in which they are added, of at most `most` tokens; `distance` is that of a set of them.

    In the first round every group is tried, later the `width` best that fit, by what they took off when last tried,
    then the next `width` until one of them takes anything off; where none does, the search ends.
    """
    chosen: list[int] = []
    steps: list[Step] = []
    now, spent = distance(chosen), 0
    gains = dict.fromkeys(range(len(sizes)), float("inf"))
    while True:
        fitting = sorted((g for g in gains if spent + sizes[g] <= most), key=lambda g: -gains[g])
        best, tried, round_of = None, {}, len(fitting) if not steps else width
        for at in range(0, len(fitting), max(round_of, 1)):
            for group in fitting[at : at + round_of]:
                tried[group] = distance([*chosen, group])
                gains[group] = (now - tried[group]) / sizes[group]
            best = max(tried, key=lambda g: gains[g])
            if gains[best] > 0:
                break
        if best is None or gains.pop(best) <= 0:
            return steps
        now, spent = tried[best], spent + sizes[best]
        chosen.append(best)
        steps.append(Step(best, now))


@dataclass(frozen=True)
class Judge:
    """How far an answer is from full attention's, along its first tokens."""

    model: Model
    reference: Reference

    @classmethod
    def of(cls, over: Request, tokens: int) -> Judge:
        """Of the first `tokens` of full attention's answer."""
        model, done = over.primary.model, execute(over, Full().plan(over), None)
        return cls(model, first_tokens(model, done.logits, len(over.prompt.ids), done.cache, tokens))

    def __call__(self, repaired: Repaired) -> tuple[float, float]:
        """Mean KL(full || this) in nats, and the share of tokens that this would choose too."""
        fed = self.reference.ids[:-1]
        slots = repaired.tail.slot + np.arange(len(fed))
        further = continuation_logits(self.model.params, self.model.config, fed, slots, repaired.cache,
                                      self.model.attention.name, repaired.tail)
        counted = np.asarray(self.reference.counted)
        full = np.asarray(self.reference.logits, np.float32)[counted]
        this = np.concatenate([np.asarray(repaired.logits, np.float32)[None], np.asarray(further, np.float32)])[counted]
        return float(kl_divergence(full, this).mean()), top1_agreement(full, this)


def groups_of(over: Request, method: AuxGuided) -> list[Int[np.ndarray, "n"]]:
    """The context tokens of each group that a method ranks. Raises BadInput for one that ranks tokens."""
    if isinstance(method.grouping, Windows):
        raise BadInput("the sliding window has no groups to search among: give the searched method Groups or Sentences")
    sizes = method.grouping.sizes(over.prompt.chunk_lengths, over.prompt.chunks)
    return np.split(np.arange(over.prompt.context_tokens), np.cumsum(sizes)[:-1])


def at_heads(over: Request, groups: Sequence[Int[np.ndarray, "n"]]) -> Bool[np.ndarray, "G"]:
    """Which groups begin within a chunk's first tokens, the first chunk's not among them: it follows the prefix in a
    prompt, too."""
    lengths = over.prompt.chunk_lengths
    offsets = np.concatenate([np.arange(length) for length in lengths])
    first = np.array([tokens[0] for tokens in groups])
    return (offsets[first] < HEAD) & (first >= lengths[0])


def compare(lab: Lab, sample: Sample, slots: int, searched: Entry, others: Sequence[Entry], ratios: Sequence[float],
            judged: int, width: int) -> Iterator[Row]:
    """A row for the search, among the groups of `searched`, at each ratio, and one for each other method."""
    sides = lab.sides(sample, slots, judged)
    over = {lead_in: request(sides.behind(lead_in)) for lead_in in {e.lead_in for e in (searched, *others)}}
    mine, method = over[searched.lead_in], searched.method
    assert isinstance(method, AuxGuided)
    judge, groups = Judge.of(mine, judged), groups_of(mine, method)
    discount = Discount.of(mine.prompt, method.prefix, method.discount)

    def mask(chosen: Sequence[int]) -> Bool[np.ndarray, "C"]:
        out = np.zeros(mine.prompt.context_tokens, bool)
        for group in chosen:
            out[groups[group]] = True
        return out

    def judged_with(chosen: Sequence[int]) -> tuple[float, float]:
        return judge(execute(mine, Plan(mask(chosen), discount=discount), method.caches))

    def budget(ratio: float) -> int:
        return Budget(ratio=ratio).target(mine.prompt.context_tokens)

    sizes, heads = [len(tokens) for tokens in groups], at_heads(mine, groups)
    steps = search(lambda chosen: judged_with(chosen)[0], sizes, budget(max(ratios)), width)
    spent = np.cumsum([sizes[step.group] for step in steps])
    best: dict[float | None, np.ndarray] = {}
    for ratio in ratios:
        taken = steps[: int(np.searchsorted(spent, budget(ratio), side="right"))]
        chosen = [step.group for step in taken]
        best[ratio] = mask(chosen)
        distance, same = judged_with(chosen)
        yield {"method": SEARCH, "ratio": ratio, "recomputed": int(best[ratio].sum()), "kl": distance, "same": same,
               "groups": [[int(groups[step.group][0]), sizes[step.group], step.distance] for step in taken],
               "at_heads": int(heads[chosen].sum()), "at_heads_of_all": float(heads.mean())}
    for entry in others:
        plan = entry.method.plan(over[entry.lead_in])
        recompute = plan.fetched(mine.prompt.context_tokens).recompute
        distance, same = judge(execute(over[entry.lead_in], plan, entry.method.caches))
        theirs = best.get(entry.ratio)
        found = None if theirs is None or not theirs.any() else float(recompute[theirs].mean())
        yield {"method": f"{entry.method.name} {entry.preset}".strip(), "ratio": entry.ratio,
               "recomputed": int(recompute.sum()), "kl": distance, "same": same, "found": found}


def summary(rows: Sequence[Row]) -> str:
    """A Markdown table: the mean over samples of every method at every ratio, the search first."""
    lines = ["| method | ratio | mean KL first tokens | same first tokens | of the search's tokens |",
             "|---|---|---|---|---|"]
    kinds = dict.fromkeys((r["method"], r["ratio"]) for r in sorted(rows, key=lambda r: r["ratio"] or 0))
    for method, ratio in kinds:
        of = [r for r in rows if (r["method"], r["ratio"]) == (method, ratio)]
        found = [r["found"] for r in of if r.get("found") is not None]
        cells = (method, "" if ratio is None else f"{ratio:.0%}", f"{np.mean([r['kl'] for r in of]):.3f}",
                 f"{np.mean([r['same'] for r in of]):.0%}", f"{np.mean(found):.0%}" if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    searched = [r for r in rows if r["method"] == SEARCH]
    found = [r for r in searched if r["ratio"] == max(r["ratio"] for r in searched)]
    lines += ["", f"Of the {sum(len(r['groups']) for r in found)} groups that the search adds up to "
              f"{found[0]['ratio']:.0%}, {sum(r['at_heads'] for r in found)} begin within the first {HEAD} tokens of a "
              f"chunk other than the first; of all groups {np.mean([r['at_heads_of_all'] for r in found]):.0%} do."]
    return "\n".join(lines) + "\n"


def run(config: ConfigDict) -> list[Path]:
    """Search and compare, and write the two files. Raises BadInput where they exist, a task has no samples, or the time
    is over before the first one."""
    until = time.monotonic() + config.budget_seconds if config.budget_seconds else float("inf")
    targets = [Path(f"{config.out}.{kind}") for kind in ("jsonl", "md")]
    if found := [str(t) for t in targets if t.exists()]:
        raise BadInput(f"{found[0]} exists: name another --config.out, or delete it")
    if not config.ratios or config.width < 1 or config.judged < 1:
        raise BadInput(f"ratios={config.ratios}, width={config.width}, judged={config.judged}: give one ratio or more, "
                       "and a width and a number of tokens of 1 or more")
    searched, = columns([config.search])
    if not isinstance(searched.method, AuxGuided):
        raise BadInput(f"the search is among cacheclip's groups, not {searched.method.name}'s: change config.search")
    others = columns(config.methods)
    enable_compilation_cache()
    tokenizer, commit = located(config.primary), machine.commit()
    lab = replace(load_lab(config.primary, config.aux, config.dtype, None), sizes=MANY_SIZES)
    asked = jobs(config.tasks, config.lengths, config.data or None, count=config.count, split=config.split,
                 seed=config.seed)
    turns = list(rounds((made(job, tokenizer, config.judged) for job in asked), 1))  # a run that stops has some of all
    rows: list[Row] = []
    with rows_into(targets[0]) as write:
        for turn in track(turns, "searching"):
            if time.monotonic() > until:
                break
            sample, = turn.samples
            for row in compare(lab, sample, turn.slots, searched, others, config.ratios, config.judged, config.width):
                rows.append({"run": config.run, "task": turn.job.name, "sample": sample.id, **row})
                write(rows[-1])
        if not rows:
            raise BadInput(f"the {config.budget_seconds} seconds were over before the first sample: give more")
    answered = {(row["task"], row["sample"]) for row in rows}
    about = (f"{config.primary} (primary), {config.aux} (aux), {config.dtype}, {machine.device()}, "
             f"{datetime.date.today().isoformat()}, commit {commit}; {len(answered)} samples of "
             f"{', '.join(dict.fromkeys(task for task, _ in sorted(answered)))} at "
             f"{', '.join(map(str, config.lengths))} tokens.")
    targets[1].write_text(f"{about}\n\n{summary(rows)}", encoding="utf-8")
    return targets


def main(config: ConfigDict) -> None:
    """The script."""
    print(*run(config), sep="\n")


if __name__ == "__main__":
    start(main, "What to search, see configs/quality/headroom.py.")
