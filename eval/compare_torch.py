"""Compares logits and aux scores with transformers and torch: other code for everything between token ids and logits.

pip install "cacheclip-jax[torch]"
cacheclip pull qwen2.5-coder-0.5b && cacheclip pull smollm2-135m
python eval/compare_torch.py --chunks 3 7 12 --json compare.json
python eval/compare_torch.py --model path/to/qwen --aux path/to/smollm2 --dtype bfloat16

The torch side computes in float32 from the prompt's ids alone. transformers encodes every chunk behind the shared
prefix (or alone); keys are rotated back, and then to their place in the prompt; the given context tokens and the
question run through a loop over the model's layers with an explicit mask; attention of the aux's question rows is
averaged, carried to the primary's tokens byte by byte, and the best groups are taken. The package computes in --dtype.
Its part is only what is public: CacheClip.load, prefill and ask with methods.

Prints a table. Exits with 1 when a cosine is below 0.999, a top-1 differs, an entry differs by more than 1e-4 of the
largest one, or `ask` reports another ratio than the one it was given. In bfloat16 and float16 only logits are judged,
and only by a cosine below 0.99: two groups that score nearly alike may change places. Takes half an hour and 8 GB on
two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from cacheclip_jax import Budget, CacheClip, Groups, Ranking, Scoring
from cacheclip_jax.methods import AuxGuided, Full, Given, Naive
from cacheclip_jax.model.pull import stored

QUESTION = "Who is the skipper of the reserve pilot boat, and where does it lie?"
GROUP = 8
RATIO = 0.2
SCORINGS = {
    "last layer, mean of rows": Scoring(layers="last", rows="mean"),
    "late layers, last row": Scoring(layers="late", rows="last"),
    "late layers, last row, joint": Scoring(layers="late", rows="last", context="joint"),
}
ODD_CHUNKS = (
    "The crew\u2019s log: \U0001f6a2\U0001f30a \U0001f468\u200d\U0001f469\u200d\U0001f467 aboard, cafe\u0301 open, "
    "n\u0303o\u0308 fog; q\u0323\u0307 \u6e2f\u53e3 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \U0001f1eb\U0001f1ee.",
    "7",
)


@dataclass
class Row:
    """One comparison; `same_top` says whether the largest entry is the same one."""

    what: str
    chunks: int
    prefix: str
    recomputed: str
    tokens: int
    cosine: float
    max_diff: float
    same_top: bool
    passed: bool


class Torch:
    """One model in torch: encode, assemble, recompute, and the attention that scores are made of."""

    def __init__(self, directory: Path):
        # device_map would need accelerate; float32 on the CPU is the reference.
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        config = self.model.config
        self.layers: list[Any] = list(self.model.model.layers)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        parameters = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
        if parameters.get("rope_type", "default") != "default":
            raise SystemExit(f"{directory}: this check has its own RoPE, and that knows no scaling")
        self.theta = float(parameters["rope_theta"])
        self._encoded: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def rotate(self, x: torch.Tensor, positions: Iterable[int], sign: int = 1) -> torch.Tensor:
        """x [..., T, H] turned to its positions, or with sign -1 back from them."""
        exponents = torch.arange(self.width // 2, dtype=torch.float32) * 2 / self.width
        angle = torch.tensor(list(positions), dtype=torch.float32)[:, None] * self.theta**-exponents * sign
        pairs = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous())
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle))
        return torch.cat(turned.unbind(-1), -1)

    def full(self, ids: Sequence[int]) -> torch.Tensor:
        """The last token's logits by the model's own forward pass."""
        return self.model(torch.tensor([list(ids)]), logits_to_keep=1).logits[0, -1]

    def encode(self, ids: tuple[int, ...], behind: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (rotated back) and values [L, K, C, H] of `ids` that run behind other ids, by the model's own cache."""
        if (ids, behind) not in self._encoded:
            cache = self.model.model(torch.tensor([[*behind, *ids]]), use_cache=True).past_key_values
            keys = torch.stack([layer.keys[0] for layer in cache.layers])[:, :, len(behind):]
            values = torch.stack([layer.values[0] for layer in cache.layers])[:, :, len(behind):]
            at = range(len(behind), len(behind) + len(ids))
            self._encoded[ids, behind] = self.rotate(keys, at, -1), values
        return self._encoded[ids, behind]

    def assemble(self, prompt: Any, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefix once, then every chunk, at their positions in the prompt; room for the question after them."""
        behind = (*prompt.prefix, *prompt.lead_in) if prefix == "shared" else ()
        parts = [self.encode(prompt.prefix), *(self.encode(chunk.ids, behind) for chunk in prompt.chunks)]
        return self._laid_out([keys for keys, _ in parts], [values for _, values in parts], len(prompt.question))

    def joint(self, prompt: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of one pass over prefix and context."""
        keys, values = self.encode((*prompt.prefix, *itertools.chain(*(c.ids for c in prompt.chunks))))
        return self._laid_out([keys], [values], len(prompt.question))

    def _laid_out(self, keys: list[torch.Tensor], values: list[torch.Tensor], room: int
                  ) -> tuple[torch.Tensor, torch.Tensor]:
        # NaN where the question's rows go: whatever reads them before they are written shows.
        free = torch.full((len(self.layers), self.kv_heads, room, self.width), float("nan"))
        joined = torch.cat([*keys, free], 2)
        return self.rotate(joined, range(joined.shape[2])), torch.cat([*values, free], 2)

    def recompute(self, ids: Sequence[int], positions: Sequence[int], keys: torch.Tensor, values: torch.Tensor,
                  watch: Callable[[int, torch.Tensor], None] = lambda layer, weights: None) -> torch.Tensor:
        """Rows through all layers over a cache, overwriting it; the last row's logits. `watch` sees each layer's
        attention weights [N, T, S]."""
        hidden = self.model.model.embed_tokens(torch.tensor(list(ids)))
        at = torch.tensor(list(positions))
        unseen = torch.arange(keys.shape[2])[None, :] > at[:, None]
        for number, layer in enumerate(self.layers):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            q = attention.q_proj(x).view(len(at), self.heads, self.width).transpose(0, 1)
            k = attention.k_proj(x).view(len(at), self.kv_heads, self.width).transpose(0, 1)
            v = attention.v_proj(x).view(len(at), self.kv_heads, self.width).transpose(0, 1)
            keys[number][:, at], values[number][:, at] = self.rotate(k, positions), v
            shared = self.heads // self.kv_heads
            logits = self.rotate(q, positions) @ keys[number].repeat_interleave(shared, 0).mT / self.width**0.5
            weights = logits.masked_fill(unseen, float("-inf")).softmax(-1)
            watch(number, weights)
            # 0 times NaN is NaN: a free slot must be written before any row reads the layer.
            mixed = weights @ values[number].repeat_interleave(shared, 0)
            hidden = hidden + attention.o_proj(mixed.transpose(0, 1).reshape(len(at), -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(self.model.model.norm(hidden[-1]))

    def score(self, prompt: Any, scoring: Scoring) -> np.ndarray:
        """One score per context token: attention of the question's rows, as the setting's name says."""
        count = len(self.layers)
        wanted = [count - 1] if scoring.layers == "last" else range(count // 2, count - 1)
        start, question = len(prompt.ids) - len(prompt.question), len(prompt.question)
        collected = []

        def watch(number: int, weights: torch.Tensor) -> None:
            if number in wanted:
                rows = weights[:, -1:] if scoring.rows == "last" else weights
                collected.append(rows.mean((0, 1)))

        cache = self.joint(prompt) if scoring.context == "joint" else self.assemble(prompt, "shared")
        self.recompute(prompt.question, range(start, start + question), *cache, watch)
        return torch.stack(collected).mean(0)[len(prompt.prefix):start].numpy()


class Bytes:
    """How many bytes each token of a byte-level vocabulary stands for."""

    def __init__(self, directory: Path):
        self._tokenizer = AutoTokenizer.from_pretrained(directory)

    def lengths(self, ids: Sequence[int]) -> list[int]:
        """Every character of a byte-level token's name is one byte."""
        return [len(name) for name in self._tokenizer.convert_ids_to_tokens(list(ids))]


def mapped(scores: np.ndarray, theirs: Sequence[int], ours: Sequence[int]) -> np.ndarray:
    """Scores of tokens with `theirs` bytes each, spread over their bytes and collected by tokens with `ours`."""
    if sum(theirs) != sum(ours):
        raise ValueError(f"one tokenisation has {sum(theirs)} bytes, the other {sum(ours)}")
    per_byte = np.repeat(scores / np.array(theirs), theirs)
    return np.array([per_byte[end - n:end].sum() for n, end in zip(ours, itertools.accumulate(ours), strict=True)])


def by_chunk(scores: np.ndarray, prompt: Any) -> list[np.ndarray]:
    """The scores of each chunk."""
    return np.split(scores, np.cumsum(prompt.chunk_lengths)[:-1])


def groups_of(lengths: Sequence[int]) -> list[range]:
    """Groups of context tokens: GROUP of one chunk, the chunk's last one may be smaller."""
    ends = list(itertools.accumulate(lengths))
    return [range(i, min(i + GROUP, end)) for n, end in zip(lengths, ends, strict=True)
            for i in range(end - n, end, GROUP)]


def taken(groups: Iterable[range], budget: int) -> list[int]:
    """The tokens of whole groups in order, until the budget is spent, sorted."""
    out: list[int] = []
    for group in groups:
        if len(out) >= budget:
            break
        out += group
    return sorted(out)


class Comparison:
    """All comparisons of one model pair."""

    def __init__(self, model: Path, aux: Path, dtype: str, question: str, seed: int):
        self.clip = CacheClip.load(model, aux, "memory://compare-torch/primary", dtype=dtype)
        self.aux_clip = CacheClip.load(aux, aux, "memory://compare-torch/aux", dtype=dtype)
        self.torch, self.aux_torch = Torch(model), Torch(aux)
        self.bytes, self.aux_bytes = Bytes(model), Bytes(aux)
        self.question, self.exact = question, dtype == "float32"
        self.random = np.random.default_rng(seed)
        self.rows: list[Row] = []

    def add(self, what: str, chunks: int, prefix: str, recomputed: str, ours: Any, theirs: Any,
            judged: bool = True) -> None:
        """Compare two vectors; prints the row."""
        a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        worst, same = float(np.abs(a - b).max()), int(a.argmax()) == int(b.argmax())
        if self.exact:  # written so that a NaN fails
            passed = cosine >= 0.999 and worst <= 1e-4 * float(np.abs(b).max()) and same
        else:
            passed = cosine >= 0.99 or not judged
        self.rows.append(Row(what, chunks, prefix, recomputed, len(a), cosine, worst, same, passed))
        print(f"{what:42} {chunks:6} {prefix:7} {recomputed:>10} {len(a):7} {cosine:11.8f} {worst:9.2e} "
              f"{'yes' if same else 'NO':>5} {'' if passed else 'FAILED'}", flush=True)

    def given(self, what: str, texts: list[str], prefix: str, prompt: Any, tokens: list[int]) -> None:
        """Recompute given context tokens on both sides."""
        ours = self.clip.prefill(self.question, texts, method=Given(tuple(tokens), prefix)).logits  # type: ignore[arg-type]
        theirs = self.repaired(prompt, prefix, tokens)
        self.add(what, len(texts), prefix, f"{len(tokens) / prompt.context_tokens:.1%}", ours, theirs)

    def repaired(self, prompt: Any, prefix: str, tokens: Sequence[int]) -> torch.Tensor:
        """Torch's logits after recomputing given context tokens and the question."""
        end = len(prompt.ids)
        positions = [len(prompt.prefix) + t for t in tokens] + list(range(end - len(prompt.question), end))
        return self.torch.recompute(prompt.ids[positions].tolist(), positions, *self.torch.assemble(prompt, prefix))

    def random_groups(self, lengths: Sequence[int]) -> list[int]:
        """RATIO of the context in groups drawn at random."""
        groups = groups_of(lengths)
        return taken((groups[i] for i in self.random.permutation(len(groups))), round(RATIO * sum(lengths)))

    def logits(self, texts: list[str]) -> None:
        """Full prefill, and reuse at 0 %, RATIO and 100 %."""
        full = self.clip.prefill(self.question, texts, method=Full())
        prompt = full.prompt
        self.add("full prefill, transformers' own forward", len(texts), "-", "all", full.logits,
                 self.torch.full(prompt.ids.tolist()))
        some, every = self.random_groups(prompt.chunk_lengths), list(range(prompt.context_tokens))
        for prefix in ("shared", "none"):
            naive = self.clip.prefill(self.question, texts, method=Naive(prefix)).logits
            self.add("naive", len(texts), prefix, "0.0%", naive, self.repaired(prompt, prefix, []))
            for tokens in ([], some, every):
                self.given("given tokens", texts, prefix, prompt, tokens)

    def scores(self, texts: list[str]) -> None:
        """Aux scores on the aux's tokens, on the primary's, and the logits after what they select."""
        lengths = None
        for name, scoring in SCORINGS.items():
            method = AuxGuided(Budget(ratio=RATIO), scoring, Groups(GROUP), Ranking(), discount=0.0)
            own = self.aux_clip.prefill(self.question, texts, method=method)
            theirs = self.aux_torch.score(own.prompt, scoring)
            self.add(f"scores: {name}", len(texts), "shared", "", own.plan.scores, theirs, self.exact)
            prefill = self.clip.prefill(self.question, texts, method=method)
            prompt = prefill.prompt
            lengths = prompt.chunk_lengths
            carried = np.concatenate([
                mapped(part, self.aux_bytes.lengths(a.ids), self.bytes.lengths(b.ids))
                for part, a, b in zip(by_chunk(theirs, own.prompt), own.prompt.chunks, prompt.chunks, strict=True)])
            self.add("  on the primary's tokens", len(texts), "shared", "", prefill.plan.scores, carried,
                     self.exact)
            groups = sorted(groups_of(lengths), key=lambda g: -carried[g.start:g.stop].sum())
            tokens = taken(groups, round(RATIO * sum(lengths)))
            mask = np.zeros(len(carried))
            mask[tokens] = 1
            self.add("  selected tokens (0 or 1)", len(texts), "shared", f"{mask.mean():.1%}", prefill.plan.recompute,
                     mask, self.exact)
            # Where a narrower dtype selects otherwise, other logits are right.
            same = np.flatnonzero(prefill.plan.recompute)
            self.add("  logits after it", len(texts), "shared", f"{mask.mean():.1%}", prefill.logits,
                     self.repaired(prompt, "shared", tokens if self.exact else same.tolist()))

    def odd(self, texts: list[str]) -> None:
        """Other orders, a chunk twice, characters of several bytes and code points, a chunk of hardly any tokens."""
        for what, chosen in (("order reversed", texts[::-1]), ("one chunk twice", [*texts, texts[0]]),
                             ("emoji, combining characters, tiny chunk", [*ODD_CHUNKS, *texts])):
            prompt = self.clip.prefill(self.question, chosen, method=Full()).prompt
            tokens = self.random_groups(prompt.chunk_lengths)
            self.given(what, chosen, "shared", prompt, tokens)
            result = self.clip.ask(self.question, chosen, method=Given(tuple(tokens)), max_new_tokens=1)
            self.add("  ratio that ask reports", len(chosen), "shared", f"{result.realised_ratio:.1%}",
                     [result.realised_ratio, result.recomputed_tokens],
                     [len(tokens) / sum(prompt.chunk_lengths), len(tokens)])
            chosen_ones = np.flatnonzero(result.selection.recompute).tolist()
            self.rows[-1].passed &= self.rows[-1].max_diff < 1e-9 and chosen_ones == tokens
        # A character of several bytes may be several tokens of one model and one of the other: no score is lost or
        # counted twice. Where in the chunk it goes is a matter of taste, by bytes or by characters.
        texts = [*ODD_CHUNKS, *texts]
        own = self.aux_clip.prefill(self.question, texts, method=AuxGuided(discount=0.0))
        prefill = self.clip.prefill(self.question, texts, method=AuxGuided(discount=0.0))
        theirs = self.aux_torch.score(own.prompt, Scoring())
        self.add("score of each chunk", len(texts), "shared", "",
                 [part.sum() for part in by_chunk(np.asarray(prefill.plan.scores), prefill.prompt)],
                 [part.sum() for part in by_chunk(theirs, own.prompt)], self.exact)


def directory_of(name: str) -> Path:
    """A model's directory: as given, or that of a pulled name."""
    place = Path(name).expanduser()
    if not (place / "config.json").is_file():
        place = stored(name) or place
    if not (place / "config.json").is_file():
        raise SystemExit(f"{name} is no model directory: give one, or a name after `cacheclip pull {name}`")
    return place


def paragraphs() -> list[str]:
    """The demo corpus by paragraphs, one of each document in turn."""
    documents = sorted((files("cacheclip_jax") / "demo_corpus").iterdir(), key=lambda f: f.name)
    texts = [f.read_text(encoding="utf-8").strip().split("\n\n") for f in documents if f.name.endswith(".txt")]
    return [p.strip() for row in itertools.zip_longest(*texts) for p in row if p]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b", help="a directory, or a pulled name")
    parser.add_argument("--aux", default="smollm2-135m", help="a directory, or a pulled name")
    parser.add_argument("--chunks", type=int, nargs="+", default=[3, 7, 12], help="numbers of chunks to compare at")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                        help="what the package computes in; torch is the float32 reference")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--seed", type=int, default=0, help="of the random groups")
    parser.add_argument("--json", type=Path, help="write the rows there")
    flags = parser.parse_args()
    texts = paragraphs()
    if not 1 <= min(flags.chunks) <= max(flags.chunks) <= len(texts):
        parser.error(f"--chunks: between 1 and the {len(texts)} paragraphs of the demo corpus")
    logging.disable_progress_bar()
    started = time.monotonic()
    with torch.inference_mode():
        comparison = Comparison(directory_of(flags.model), directory_of(flags.aux), flags.dtype, flags.question,
                                flags.seed)
        print(f"{'':42} {'chunks':>6} {'prefix':7} {'recomputed':>10} {'entries':>7} {'cosine':>11} {'max diff':>9} "
              f"{'top-1':>5}", flush=True)
        for count in flags.chunks:
            comparison.logits(texts[:count])
            comparison.scores(texts[:count])
        comparison.odd(texts[:min(flags.chunks)])
    failed = sum(not row.passed for row in comparison.rows)
    if flags.json:
        report = {"dtype": flags.dtype, "torch": torch.__version__, "failed": failed,
                  "rows": [asdict(row) for row in comparison.rows]}
        flags.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{len(comparison.rows)} comparisons in {time.monotonic() - started:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
