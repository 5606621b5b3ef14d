"""The forward pass of training equals what runs online: chunk caches, scores, full prefill."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacheclip_jax.errors import ContextTooLong
from cacheclip_jax.model.adapter import Factors, Lora, add_lora
from cacheclip_jax.model.params import init
from cacheclip_jax.model.tokenizer import Encoded
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.score import Scoring
from tests.conftest import TINY, assembled, full_prefill, max_diff, random_prompt, scores_over
from train.forward import encode_context, score_batch, stack_layers
from train.packed import pack, stack
from train.student import Design, all_head_weights, new_student
from train.student import score as student_score

SLOTS, ROWS = 128, 16


def prompt_of(cfg, lengths=(5, 24, 17, 30, 9), seed=0) -> Prompt:
    prefix, *chunks, question = (tuple(int(i) for i in part) for part in random_prompt(cfg, lengths, seed))
    encoded = (Encoded(c, tuple((i, i + 1) for i in range(len(c))), "x" * len(c)) for c in chunks)
    return Prompt(prefix, tuple(encoded), question)


def online(params, cfg, prompt: Prompt, scoring: Scoring, reader=None) -> np.ndarray:
    """The scores of the context as the engine computes them; `reader` are the weights that read the question."""
    if scoring.context == "joint":
        _, cache = full_prefill(params, cfg, prompt.ids[: prompt.question_start], SLOTS)
    else:
        cache = assembled(params, cfg, prompt.prefix, [c.ids for c in prompt.chunks], SLOTS)
    packed = pack(prompt, SLOTS, ROWS)
    scores = scores_over(reader or params, cfg, scoring, packed.rows, packed.positions, packed.count - 1, cache)
    return np.where(packed.context, np.asarray(scores), 0)


def random_heads(cfg, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(cfg.num_layers * cfg.num_heads)).astype(np.float32).reshape(
        cfg.num_layers, cfg.num_heads)


@pytest.mark.parametrize("family, context", [("qwen2", "cached"), ("qwen2", "joint"), ("qwen3", "cached")])
def test_scores_of_training_are_those_of_inference_whatever_is_in_the_batch(family, context):
    cfg = TINY[family]
    params = init(jax.random.key(7), cfg)
    heads = random_heads(cfg)
    scoring = Scoring(layers="all", context=context, head_weights=tuple(map(tuple, heads.tolist())))
    prompts = [prompt_of(cfg), prompt_of(cfg, (3, 7, 40, 4), 1)]
    packed = stack([pack(p, SLOTS, ROWS) for p in prompts])

    @jax.jit
    def trained(packed):
        weights = stack_layers(params)
        return score_batch(weights, cfg, packed, encode_context(weights, cfg, packed, context), heads)

    for scores, prompt in zip(trained(packed), prompts, strict=True):
        assert max_diff(scores, online(params, cfg, prompt, scoring)) < 1e-6


@pytest.mark.parametrize("layers", ["late", (1,)])
def test_a_new_student_scores_as_the_untouched_model(qwen2, layers):
    cfg, params = qwen2
    design, prompt = Design(layers=layers), prompt_of(cfg)
    student, packed = new_student(jax.random.key(0), cfg, design), stack([pack(prompt, SLOTS, ROWS)])
    scores = student_score(student, stack_layers(params), cfg, design, packed, "xla")[0]
    assert max_diff(scores, online(params, cfg, prompt, Scoring(layers=layers))) < 1e-6


def test_a_new_student_of_all_layers_begins_near_the_late_ones(qwen2):
    heads = all_head_weights(new_student(jax.random.key(0), qwen2[0], Design(layers="all")), qwen2[0], Design("all"))
    assert heads.sum() == pytest.approx(1) and heads[1].min() == pytest.approx(20 * heads[2].max())


@pytest.mark.parametrize("context", ["cached", "joint"])
def test_caches_of_training_are_the_assembled_ones_and_full_prefills(qwen2, context):
    cfg, params = qwen2
    prompt = prompt_of(cfg)
    packed = stack([pack(prompt, SLOTS, ROWS)])
    keys, values = jax.jit(lambda p: encode_context(stack_layers(params), cfg, p, context))(packed)
    if context == "joint":
        _, expected = full_prefill(params, cfg, prompt.ids[: prompt.question_start], SLOTS)
    else:
        expected = assembled(params, cfg, prompt.prefix, [c.ids for c in prompt.chunks], SLOTS)
    end = prompt.question_start
    for made, known in ((keys, expected.k), (values, expected.v)):
        assert max_diff(made[:, 0, :, :end], jnp.stack(known)[:, :, :end]) < 1e-5


@pytest.mark.parametrize("rows", ["question", "all"])
def test_low_rank_changes_of_training_are_the_merged_ones_of_inference(qwen2, rows):
    cfg, params = qwen2
    rng = np.random.default_rng(3)

    def factors(out):
        return Factors(rng.standard_normal((cfg.num_layers, 2, cfg.d_model)).astype(np.float32) / 4,
                       rng.standard_normal((cfg.num_layers, out, 2)).astype(np.float32) / 4)

    lora = Lora(factors(cfg.num_heads * cfg.head_dim), factors(cfg.num_kv_heads * cfg.head_dim))
    tuned = add_lora(params, cfg, [jax.tree.map(lambda leaf, i=i: leaf[i], lora) for i in range(cfg.num_layers)])
    heads = random_heads(cfg)
    scoring = Scoring(layers="all", head_weights=tuple(map(tuple, heads.tolist())))
    prompt = prompt_of(cfg)
    packed, weights = stack([pack(prompt, SLOTS, ROWS)]), stack_layers(params)

    @jax.jit
    def trained(packed):
        cache = encode_context(weights, cfg, packed, "cached", lora=lora if rows == "all" else None)
        return score_batch(weights, cfg, packed, cache, heads, lora)

    expected = online(tuned if rows == "all" else params, cfg, prompt, scoring, tuned)
    assert max_diff(trained(packed)[0], expected) < 1e-6
    assert max_diff(online(params, cfg, prompt, scoring), expected) > 1e-3


def test_gradients_reach_every_factor_through_chunks_and_question(qwen2):
    cfg, params = qwen2
    weights = stack_layers(params)
    packed = stack([pack(prompt_of(cfg), SLOTS, ROWS)])
    out = {"q": cfg.num_heads * cfg.head_dim, "k": cfg.num_kv_heads * cfg.head_dim}
    lora = Lora(**{p: Factors(jnp.ones((cfg.num_layers, 2, cfg.d_model)) / 9, jnp.zeros((cfg.num_layers, n, 2)))
                   for p, n in out.items()})

    @jax.jit
    def gradient(lora):
        def first(lora):
            cache = encode_context(weights, cfg, packed, "cached", lora=lora)
            return score_batch(weights, cfg, packed, cache, random_heads(cfg), lora)[0, 5]
        return jax.grad(first)(lora)

    found = gradient(lora)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert np.abs(found.q.b).max(axis=(1, 2)).min() > 0 and np.abs(found.k.b).max(axis=(1, 2)).min() > 0


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(qwen2):
    with pytest.raises(ContextTooLong, match="85 tokens, 9 of them the question's, and 8 answer tokens"):
        pack(prompt_of(qwen2[0]), SLOTS, ROWS, answer=8)


def test_groups_of_a_packed_prompt_tile_the_context_and_never_cross_a_chunk(qwen2):
    packed = pack(prompt_of(qwen2[0]), SLOTS, ROWS)
    covered = np.zeros(SLOTS, int)
    for start, size in zip(packed.starts, packed.sizes, strict=True):
        covered[start : start + size] += 1
        assert size == 0 or len(set(packed.part[start : start + size])) == 1
    assert np.array_equal(covered, packed.context.astype(int))
