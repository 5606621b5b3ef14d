"""The decoder against transformers + torch: golden logits of tiny checkpoints, greedy text of real models."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from cacheclip_jax.assemble import empty
from cacheclip_jax.decode import decode, first_token
from cacheclip_jax.model.load import load_params
from cacheclip_jax.recompute import continuation_logits, recompute
from tests.conftest import max_diff

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(p.parent.name for p in GOLDEN.glob("*/logits.npz"))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_cached_decode_logits_equal_torch(family):
    cfg, params, _ = load_params(GOLDEN / family, "float32")
    golden = np.load(GOLDEN / family / "logits.npz")
    ids, answer = golden["ids"], golden["decode_ids"]
    positions = np.arange(len(ids), dtype=np.int32)
    every = continuation_logits(params, cfg, ids, positions, empty(cfg, 128, np.float32))
    assert max_diff(every[golden["positions"]], golden["prefill"]) < 1e-3
    _, cache = recompute(params, cfg, ids, positions, np.int32(len(ids) - 1), empty(cfg, 128, np.float32))
    decoded = continuation_logits(params, cfg, answer, len(ids) + np.arange(len(answer)), cache)
    assert max_diff(decoded, golden["decode"]) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compiled_decode_loop_picks_the_tokens_that_torch_picks(family):
    cfg, params, _ = load_params(GOLDEN / family, "float32")
    golden = np.load(GOLDEN / family / "logits.npz")
    assert greedy(params, cfg, golden["ids"], len(golden["decode_ids"]), (-1,), 128) == golden["decode_ids"].tolist()


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_greedy_text_of_real_models_equals_torch_token_by_token(name, real_model_path):
    path = real_model_path(name)
    golden = json.loads((GOLDEN / "greedy.json").read_text())[name]
    with (path / "model.safetensors").open("rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != golden["sha256"]:
            pytest.skip(f"{path} holds other weights of {name} than the golden file was made with")
    cfg, params, _ = load_params(path, "float32")
    for case in golden["cases"]:
        text = greedy(params, cfg, np.array(case["input_ids"]), len(case["output_ids"]), golden["eos_token_ids"], 512)
        assert text == case["output_ids"]


def greedy(params, cfg, ids, steps, stop, slots):
    """Greedy tokens by the same functions that the engine decodes with; the prompt padded to one bucket."""
    width = -(-len(ids) // 128) * 128
    rows, positions = np.zeros(width, np.int32), np.full(width, -1, np.int32)
    rows[: len(ids)], positions[: len(ids)] = ids, np.arange(len(ids))
    logits, cache = recompute(params, cfg, rows, positions, np.int32(len(ids) - 1), empty(cfg, slots, np.float32))
    import jax
    settings = (np.float32(0), np.int32(0), np.float32(1), np.array(stop, np.int32))
    state = first_token(logits, np.int32(len(ids)), jax.random.key(0), *settings, greedy=True)
    out = [int(state.token)]
    while len(out) < steps:
        tokens, state, cache = decode(params, cfg, state, cache, *settings, steps=4, greedy=True)
        out += [int(t) for t in tokens]
    return out[:steps]
