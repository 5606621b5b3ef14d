"""CacheClip and its rivals as a model of lm-eval (EleutherAI's harness), for any of its tasks with a context to reuse.

    python -m eval.lm_eval_model --model cacheclip --tasks my_task --include_path my_tasks/ \\
      --model_args primary=qwen2.5-coder-1.5b,aux=qwen2.5-coder-0.5b,method=cacheclip,preset=late,ratio=0.1

It is the command `lm_eval` with one more model: the harness has no way to be told of one from outside. Prompts are cut
into instructions, chunks and question as `flat.Rule` says, and the tokens of each part are made alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from rich.progress import track

from cacheclip_jax import compiles
from cacheclip_jax.bucket import bucket
from cacheclip_jax.caches import Fetched
from cacheclip_jax.clock import Clock
from cacheclip_jax.decode import Sampling, TextStream
from cacheclip_jax.engine import Prefill, enable_compilation_cache
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.load import Model
from cacheclip_jax.model.tokenizer import nfc
from cacheclip_jax.online import execute, padded
from cacheclip_jax.recompute import continuation_logits
from cacheclip_jax.stream import DECODE_STEPS, AnswerStream
from eval.flat import Rule, cut
from eval.lab import Lab, adapter_of, load_lab, prompt_of, request
from eval.presets import ADAPTER, columns
from eval.tasks import Sample

_SLOTS = 1024, 2  # caches of prompts have few sizes, two per doubling: every one takes minutes to compile
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # names of one thing, as tasks have them
_GENERATION = {*_LENGTHS, "until", "do_sample", "temperature", "top_k", "top_p"}


@register_model("cacheclip")
class CacheClipLM(LM):
    """A method over a pair of models. A request's chunk caches are made anew, so this measures quality, not time.

    primary, aux, dtype, aux_adapter: as in configs/quality/defaults.py.
    method, preset, ratio, settings: a column of an evaluation, see `presets.entries`. With an adapter and no preset
      CacheClip takes the preset "adapter".
    chunk_tokens, instructions, question: how prompts are cut, see `flat.Rule`.
    chat: whether a prompt is put into the model's chat template, as one user message.
    max_gen_toks: tokens of an answer where a task doesn't say.
    batch_size, max_batch_size: requests are answered one by one. device: has no effect, since JAX takes the accelerator
      that is there (JAX_PLATFORMS=cpu: the CPU).
    """

    def __init__(self, primary: str, aux: str = "", *, method: str = "cacheclip", preset: str | None = "",
                 ratio: float | None = None, dtype: str = "bfloat16", aux_adapter: str = "", chunk_tokens: int = 512,
                 instructions: int = 1, question: int | None = None, chat: bool = False, max_gen_toks: int = 256,
                 batch_size: int | str = 1, max_batch_size: int | None = None, device: str | None = None,
                 **settings: Any):
        super().__init__()
        if str(batch_size) != "1" or max_batch_size is not None:
            raise BadInput(f"batch_size={batch_size}, max_batch_size={max_batch_size}: requests are answered one by "
                           "one, so leave both out")
        del device  # the command line always names one of torch's
        self._rule = Rule(chunk_tokens, instructions, question)
        self._chat, self._longest = chat, max_gen_toks
        adapter = adapter_of(aux_adapter, aux)
        preset = ADAPTER if adapter is not None and method == "cacheclip" and preset == "" else preset
        asked = {"method": method, "preset": preset, "ratios": () if ratio is None else (ratio,), **settings}
        # The harness reads the word "none", which some settings have as a value, as no value.
        asked = {name: "none" if value is None else value for name, value in asked.items()}
        self._entry, = columns([asked], adapter)
        enable_compilation_cache()
        self._lab: Lab = load_lab(primary, aux, dtype, adapter)
        self._watching = ThreadPoolExecutor(1)
        self._recomputed = self._context = 0

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut before the first of its stop strings."""
        out = []
        for context, given in track([r.args for r in requests], "answering", disable=disable_tqdm):
            until, limit, sampling = generation(given, self._longest)
            text = TextStream(self._lab.primary.tokenizer.decode, until)
            stream = AnswerStream(self._lab.primary, self._prefill(context, limit), text, sampling, limit)
            for _ in stream:
                pass
            out.append(stream.result.text)
            self.cache_hook.add_partial("generate_until", (context, given), out[-1])
        return out

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation, and whether greedy decoding would give it. White space between
        context and continuation counts to the latter, whose tokens are made alone.

        Neighbours with the same context, as a question's choices have, share its repaired cache.
        """
        out = []
        shown = track([r.args for r in requests], "judging", disable=disable_tqdm)
        for context, group in itertools.groupby(shown, key=lambda args: args[0]):
            texts = [continuation for _, continuation in group]
            stem = context.rstrip()
            answers = [self._lab.primary.tokenizer.encode(nfc(context[len(stem) :] + text)).ids for text in texts]
            if not all(answers):
                raise BadInput(f"a continuation of {context[-60:]!r} is empty: there is nothing to judge")
            prefill = self._prefill(stem, max(map(len, answers)))
            for text, ids in zip(texts, answers, strict=True):
                out.append(judge(self._lab.primary, prefill, ids))
                self.cache_hook.add_partial("loglikelihood", (context, text), out[-1])
        return out

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refused: a text that is judged from its first token on has no context that could be reused."""
        raise BadInput("loglikelihood_rolling asks for the likelihood of whole texts, where no context is reused: take "
                       "a task of generate_until, loglikelihood or multiple_choice")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refused: a prompt with the template's control tokens written out would be read as plain text."""
        raise BadInput("--apply_chat_template isn't for this model: give chat=true in --model_args, which puts a "
                       "prompt into the chat template once it is cut")

    @property
    def tokenizer_name(self) -> str:
        """The primary's name, which has its tokenizer."""
        return self._lab.primary.name

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's report: the method, and the share of context tokens that was recomputed."""
        return {"method": str(self._entry), "context_tokens": self._context,
                "realised_ratio": self._recomputed / max(self._context, 1)}

    def _prefill(self, context: str, room: int) -> Prefill:
        """A prompt's repaired cache with `room` for an answer."""
        compiled, clock, model = compiles.count(), Clock(self._watching), self._lab.primary
        parts = cut(nfc(context), self._rule, lambda text: model.tokenizer.encode(text).spans)
        sample = Sample(id="prompt", task="lm-eval", instructions=parts.instructions, context=parts.chunks,
                        question=parts.question, answer_prefix="", references=(), metric="", max_new_tokens=room,
                        meta={"chat": self._chat})
        room += DECODE_STEPS
        slots = bucket(len(prompt_of(sample, model.tokenizer).ids) + room, *_SLOTS)
        sides = self._lab.sides(sample, slots, room)
        over = request(sides.behind(self._entry.lead_in), self._entry.adapted)
        plan, method = self._entry.method.plan(over), self._entry.method
        done = execute(over, plan, method.caches)
        prefill = Prefill(over.prompt, (), method.name, plan, done.logits, done.cache, done.tail, Fetched(), clock,
                          compiled)
        self._context += over.prompt.context_tokens
        self._recomputed += int(prefill.plan.recompute.sum())
        return prefill

def judge(model: Model, prefill: Prefill, ids: Sequence[int]) -> tuple[float, bool]:
    """A continuation's log-probability in nats, and whether each of its tokens is the most likely one. The cache, which
    has room for them, stays as it is."""
    logits, fed = np.asarray(prefill.logits, np.float32)[None], ids[:-1]
    if fed:
        rows, slots = padded(fed, int(prefill.tail.slot) + np.arange(len(fed)), bucket(len(fed), 16))
        further = continuation_logits(model.params, model.config, rows, slots, prefill.cache, model.attention.name,
                                      prefill.decode_tail)
        logits = np.concatenate([logits, np.asarray(further, np.float32)[: len(fed)]])
    chosen = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids)), list(ids)]
    return float(chosen.sum(dtype=np.float64)), bool((logits.argmax(-1) == ids).all())


def generation(given: Mapping[str, Any], longest: int) -> tuple[list[str], int, Sampling]:
    """Stop strings, most tokens and sampling of a task's generation_kwargs. Raises BadInput for others than these."""
    unknown = sorted(set(given) - _GENERATION)
    if unknown:
        raise BadInput(f"generation_kwargs has {unknown[0]}={given[unknown[0]]!r}: this model takes "
                       f"{', '.join(sorted(_GENERATION))}")
    until = given.get("until") or []
    limit = next((int(given[name]) for name in _LENGTHS if given.get(name) is not None), longest)
    if limit < 1:
        raise BadInput(f"an answer of {limit} tokens is out of range: 1 or more")
    sampled = given.get("do_sample", bool(given.get("temperature")))
    sampling = Sampling(float(given.get("temperature", 1.0)), given.get("top_k", 0), given.get("top_p", 1.0))
    return [until] if isinstance(until, str) else list(until), limit, sampling if sampled else Sampling()


if __name__ == "__main__":
    cli_evaluate()
