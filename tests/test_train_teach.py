"""The teacher's signals: what they are by definition, on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacheclip_jax.recompute import continuation_logits
from cacheclip_jax.score import Scoring
from tests.conftest import assembled, full_prefill, max_diff, scores_over
from tests.test_train_forward import ROWS, SLOTS, prompt_of
from train.forward import stack_layers
from train.packed import pack, stack
from train.teach import Teaching, teach

ANSWER = 4


@pytest.fixture(scope="module")
def judged(qwen2):
    """A prompt of the tiny model, with sharper weights so that reuse matters, and the verdict on it with 16 points."""
    cfg, params = qwen2
    params = params.replace(layers=tuple(layer.replace(qkv=3 * layer.qkv) for layer in params.layers))
    prompt = prompt_of(cfg)
    packed = stack([pack(prompt, SLOTS, ROWS, ANSWER)])
    verdict = teach(stack_layers(params), cfg, packed, jnp.array([-1]), Teaching(answer_tokens=ANSWER, points=16))
    return cfg, params, prompt, jax.tree.map(lambda leaf: np.asarray(leaf[0]), verdict)


@pytest.fixture(scope="module")
def answered(judged):
    """The rows of question and answer, their positions, and their logits over full prefill's cache and over chunk
    caches."""
    cfg, params, prompt, verdict = judged
    ids = np.array([*prompt.question, *verdict.answer[:-1]], np.int32)
    positions = prompt.question_start + np.arange(len(ids))
    caches = (full_prefill(params, cfg, prompt.ids[: prompt.question_start], SLOTS)[1],
              assembled(params, cfg, prompt.prefix, [c.ids for c in prompt.chunks], SLOTS))
    return ids, positions, *(continuation_logits(params, cfg, ids, positions, cache) for cache in caches)


def test_the_answer_is_the_greedy_one_after_full_prefill(judged, answered):
    assert np.array_equal(answered[2][-ANSWER:].argmax(-1), judged[3].answer)


def test_attention_is_the_mean_over_the_rows_that_make_the_answer(judged, answered):
    cfg, params, prompt, verdict = judged
    _, cache = full_prefill(params, cfg, prompt.ids[: prompt.question_start], SLOTS)
    ids, positions, *_ = answered
    scoring, last = Scoring(layers="all", rows=ANSWER), np.int32(len(ids) - 1)
    expected = scores_over(params, cfg, scoring, ids, positions, last, cache)
    context = slice(len(prompt.prefix), prompt.question_start)
    assert max_diff(verdict.scores["attention"][context], expected[context]) < 1e-5
    assert not verdict.scores["attention"][: context.start].any()


def test_deviation_is_attention_times_how_far_values_moved_and_zero_in_the_first_chunk(judged):
    _, _, prompt, verdict = judged
    start, lengths = len(prompt.prefix), prompt.chunk_lengths
    first = verdict.scores["deviation"][start : start + lengths[0]]
    rest = verdict.scores["deviation"][start + lengths[0] : prompt.question_start]
    assert first.max() < 1e-6 < rest.min()


def test_influences_add_up_to_the_divergence_of_reuse(judged, answered):
    _, _, prompt, verdict = judged
    fresh, stale = (jax.nn.log_softmax(logits[-ANSWER:]) for logits in answered[2:])
    kl = float((jnp.exp(fresh) * (fresh - stale)).sum())
    assert verdict.kl == pytest.approx(kl, rel=1e-3) and kl > 0.1
    assert verdict.scores["influence"].sum() >= 0.98 * kl  # negative shares were left out
    first = slice(len(prompt.prefix), len(prompt.prefix) + prompt.chunk_lengths[0])
    assert verdict.scores["influence"][first].max() < 1e-6  # the first chunk is as fresh as it gets


def test_tokens_after_the_end_do_not_count(judged):
    cfg, params, prompt, verdict = judged
    packed = stack([pack(prompt, SLOTS, ROWS, ANSWER)])
    ended = teach(stack_layers(params), cfg, packed, jnp.array([verdict.answer[0]]), Teaching(answer_tokens=ANSWER))
    assert ended.answer[0].tolist() == [verdict.answer[0], -1, -1, -1]
    one = scores_over(params, cfg, Scoring(layers="all"), packed.rows[0], packed.positions[0], packed.count[0] - 1,
                      full_prefill(params, cfg, prompt.ids[: prompt.question_start], SLOTS)[1])
    context = packed.context[0]
    assert max_diff(ended.scores["attention"][0][context], one[context]) < 1e-5
