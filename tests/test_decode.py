"""Decoding: sampling, the compiled loop, stop strings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheclip_jax.decode import Sampling, TextStream, decode, first_token, sample
from cacheclip_jax.errors import BadInput
from tests.conftest import full_prefill, random_prompt


def drawn(logits, n=400, temperature=1.0, top_k=0, top_p=1.0):
    keys = jax.random.split(jax.random.key(0), n)
    settings = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    return np.asarray(jax.vmap(lambda key: sample(logits, key, *settings, False))(keys))


LOGITS = jnp.log(jnp.array([0.05, 0.5, 0.15, 0.3]))


def test_sampling_follows_the_softmax():
    counts = np.bincount(drawn(LOGITS, 4000), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.05, 0.5, 0.15, 0.3], atol=0.03)


def test_top_k_and_top_p_cut_the_tail():
    assert set(drawn(LOGITS, top_k=2)) == {1, 3}
    assert set(drawn(LOGITS, top_p=0.6)) == {1, 3}  # 0.5 alone holds less than 0.6
    assert set(drawn(LOGITS, top_p=0.5)) == {1}
    assert set(drawn(LOGITS, top_p=1e-6)) == {1}


def test_a_low_temperature_is_nearly_greedy():
    assert set(drawn(LOGITS, temperature=0.01)) == {1}


def test_the_loop_equals_full_prefill_of_its_own_text(tiny):
    cfg, params = tiny
    ids = np.concatenate(random_prompt(cfg))
    settings = (np.float32(0), np.int32(0), np.float32(1), np.array([-1], np.int32))
    logits, cache = full_prefill(params, cfg, ids)
    state = first_token(logits, np.int32(len(ids)), jax.random.key(0), *settings, greedy=True)
    text = [int(state.token)]
    tokens, _, _ = decode(params, cfg, state, cache, *settings, steps=5, greedy=True)
    for token in np.asarray(tokens):
        logits, _ = full_prefill(params, cfg, np.concatenate([ids, text]))
        # A near-tie may fall either way in another summation order; these logits are not that close.
        assert int(np.argmax(logits)) == int(token)
        text.append(int(token))


def test_the_loop_ends_at_a_stop_token(qwen2):
    cfg, params = qwen2
    ids = np.concatenate(random_prompt(cfg))
    free = (np.float32(0), np.int32(0), np.float32(1), np.array([-1], np.int32))
    logits, cache = full_prefill(params, cfg, ids)
    state = first_token(logits, np.int32(len(ids)), jax.random.key(0), *free, greedy=True)
    tokens = np.asarray(decode(params, cfg, state, cache, *free, steps=6, greedy=True)[0])
    stop = int(next(t for t in tokens if t != int(state.token)))
    at = int(np.flatnonzero(tokens == stop)[0])
    _, cache = full_prefill(params, cfg, ids)
    stopped, state, _ = decode(params, cfg, state, cache, *free[:3], np.array([stop], np.int32), steps=6, greedy=True)
    np.testing.assert_array_equal(stopped, [*tokens[: at + 1], *[-1] * (5 - at)])
    assert bool(state.done)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1},
                                   {"temperature": float("nan")}])
def test_sampling_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Sampling(**wrong)


def streamed(text, stop, size):
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"), stop)
    raw = text.encode()
    pieces = [stream.push(raw[i : i + size]) for i in range(0, len(raw), size)]
    return [*pieces, stream.finish()], stream


@given(st.text(alphabet="ab·é🙂\n", max_size=30), st.integers(1, 5),
       st.lists(st.text(alphabet="ab\n", min_size=1, max_size=3), max_size=2))
def test_pieces_join_to_the_text_before_the_first_stop_string(text, size, stop):
    pieces, stream = streamed(text, stop, size)
    cuts = [text.find(s) for s in stop if s in text]
    expected = text[: min(cuts)] if cuts else text
    # Several stop strings may end in one push: what was sent must be a prefix, and nothing of a stop string is.
    assert "".join(pieces) == stream.text
    assert stream.text == expected or (len(cuts) > 1 and expected.startswith(stream.text[: min(cuts)]))
    assert stream.stopped == bool(cuts)


def test_an_unfinished_character_is_held_back():
    pieces, _ = streamed("é", (), 1)
    assert pieces == ["", "é", ""]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(BadInput, match="empty stop string"):
        TextStream(str, [""])
