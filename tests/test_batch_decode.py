"""Decoding in batches: the same tokens as one by one, and the same judgement as from logits on the host."""

import numpy as np
import pytest

from cacheclip_jax import CacheClip
from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods import Full, make
from cacheclip_jax.model.load import load_model
from cacheclip_jax.online import execute
from cacheclip_jax.plan import Discount, Plan, Reshape
from cacheclip_jax.select import Budget
from cacheclip_jax.store import ChunkStore, Passage
from eval.batch_decode import first_tokens
from eval.lab import Lab, format_of, request
from eval.pool import Pool
from eval.statistics import kl_divergence, top1_agreement
from tests.test_lab import lab, sample  # noqa: F401 (a fixture)

JUDGED, LIMITS = 4, (12, 3, 1)


class Kept:
    """A plan that isn't plain: slots and positions differ, or attention to the context is changed."""

    def __init__(self, name: str, caches, **settings):
        self.name, self.caches, self._settings = name, caches, settings

    def plan(self, over) -> Plan:
        mask = np.arange(over.prompt.context_tokens) % 5 == 0
        return Plan(mask & ("drop" in self._settings), **self._settings)


METHODS = [Full(), make("naive"), make("cacheclip", Budget(ratio=0.1)), Kept("dropped", None, drop=True),
           Kept("reshaped", "none", reshape=Reshape(0.8, 0.9)),
           Kept("discounted", "shared", discount=Discount(np.int32(90), np.int32(900), np.float32(1.5)))]


def run(models: Lab, size: int, methods=METHODS, judged: int = JUDGED):
    """(method's name, limit) -> answer, of a pool of `size`."""
    over, out = request(models.sides(sample(), 2048, 16)), {}
    full = execute(over, Full().plan(over), None)
    reference = first_tokens(models.primary, full.logits, len(over.prompt.ids), full.cache, judged)
    pool: Pool[tuple[str, int]] = Pool(models.primary, size, lambda tag, answer: out.update({tag: answer}))
    for method in methods:
        for limit in LIMITS:
            plan = method.plan(over)
            done = execute(over, plan, method.caches)
            pool.add((method.name, limit), done, limit, reference, plan.recompute)
    pool.finish()
    return out, reference


@pytest.fixture(scope="module")
def answers(lab):  # noqa: F811
    return run(lab, 4)


@pytest.fixture(scope="module")
def clip(lab) -> CacheClip:  # noqa: F811
    return CacheClip(lab.primary, lab.aux, ChunkStore.open("memory://test-batch"), prompt_format=format_of(sample()))


def prefill(clip, method):
    return clip.prefill(sample().question, list(map(Passage.make, sample().context)), method=method, reserve=16)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_tokens_equal_those_decoded_one_by_one(answers, clip, method):
    for limit in LIMITS:
        assert answers[0][method.name, limit].ids == clip.greedy(prefill(clip, method), limit)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_judgement_equals_that_from_logits(answers, clip, method):
    told, reference = answers
    ids, theirs = np.asarray(reference.ids), np.asarray(reference.logits)
    state = prefill(clip, method)
    own = np.concatenate([np.asarray(state.logits)[None], clip.continuation(state, ids[:-1])])
    counted = np.asarray(reference.counted)
    kl = kl_divergence(theirs, own)
    answer = told[method.name, 12]
    assert answer.kl_first_token == pytest.approx(kl[0], abs=1e-4, rel=1e-3)
    assert answer.kl == pytest.approx(kl[counted].mean(), abs=1e-4, rel=1e-3)
    assert answer.top1 == pytest.approx(top1_agreement(theirs[counted], own[counted]))


def test_full_attention_agrees_with_itself_and_others_less(answers):
    told, _ = answers
    assert told["full", 12].top1 == 1 and told["full", 12].kl < 1e-5
    assert told["naive", 12].kl > told["cacheclip", 12].kl > 1e-3


def test_bfloat16_judges_and_answers_as_float32_but_for_rounding(answers, long_pair):
    told, _ = run(Lab(load_model(long_pair[0], dtype="bfloat16"), None), 4, [METHODS[0], METHODS[4]])
    for tag, answer in told.items():
        assert answer.kl_first_token == pytest.approx(answers[0][tag].kl_first_token, abs=0.01, rel=0.2)
    assert told["full", 12].kl < 0.01 and told["full", 12].ids


def test_the_reference_is_full_attentions_answer(answers, clip):
    _, reference = answers
    assert tuple(np.asarray(reference.ids)) == clip.greedy(prefill(clip, Full()), JUDGED)


def test_tokens_behind_the_end_of_the_reference_do_not_count(lab, monkeypatch):  # noqa: F811
    _, reference = run(lab, 1, [])
    monkeypatch.setattr(lab.primary.tokenizer, "eos_ids", (int(reference.ids[1]),))
    ended = run(lab, 1, [])[1]
    first = list(np.asarray(ended.ids)).index(int(reference.ids[1]))
    assert list(np.asarray(ended.counted)) == [at <= first for at in range(JUDGED)]


def test_a_pools_size_changes_nothing(lab, answers):  # noqa: F811
    alone = run(lab, 1, METHODS[1:3])[0]
    for tag, answer in alone.items():
        assert answer.ids == answers[0][tag].ids
        assert answer.kl == pytest.approx(answers[0][tag].kl, abs=1e-5)


def test_one_token_may_be_judged(lab, answers):  # noqa: F811
    one = run(lab, 2, METHODS[1:2], judged=1)[0]["naive", 12]
    assert one.kl == one.kl_first_token == pytest.approx(answers[0]["naive", 12].kl_first_token, abs=1e-5)
    assert one.ids == answers[0]["naive", 12].ids


def test_a_pool_has_room_for_one_at_least(lab):  # noqa: F811
    with pytest.raises(BadInput, match="batch=0"):
        Pool(lab.primary, 0, print)
