"""The aux adapter: merged exactly, kept on disk, refused where it doesn't belong, and used by the engine."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cacheclip_jax
from cacheclip_jax import CacheClip
from cacheclip_jax.cli import configured_method
from cacheclip_jax.errors import BadInput, BadModelFile
from cacheclip_jax.model import decoder
from cacheclip_jax.model.adapter import Adapter, Factors, Lora, add_lora, load_adapter, save_adapter
from cacheclip_jax.model.load import load_model
from cacheclip_jax.score import SCORINGS, Scoring
from tests.conftest import max_diff

CHUNKS = ["the cat sat on the mat", "the end of the mat is at the end", "a cat is not a mat"]
QUESTION = "where is the cat?"


def random_adapter(model, rows="question", parts=("q", "k"), seed=0, size=0.05) -> Adapter:
    """Low-rank changes of the last layer and uneven head weights, for a model."""
    cfg, rng = model.config, np.random.default_rng(seed)
    out = {"q": cfg.num_heads * cfg.head_dim, "k": cfg.num_kv_heads * cfg.head_dim}

    def factors(part):
        return Factors(rng.standard_normal((4, cfg.d_model), np.float32),
                       size * rng.standard_normal((out[part], 4)).astype(np.float32))

    lora = (None,) * (cfg.num_layers - 1) + (Lora(**{part: factors(part) for part in parts}),)
    heads = tuple(float(w) for w in rng.dirichlet(np.ones(cfg.num_heads)))
    return Adapter(lora, Scoring(layers=(-1,), head_weights=(heads,)), rows, model.fingerprint, model.name,
                   {"note": "random"})


@pytest.fixture(scope="module")
def aux(pair):
    return load_model(pair[1], dtype="float32")


def test_merged_weights_project_as_the_base_and_the_low_rank_product_beside_it(tiny):
    cfg, params = tiny
    rng = np.random.default_rng(1)
    outs = {"q": cfg.num_heads * cfg.head_dim, "k": cfg.num_kv_heads * cfg.head_dim}
    lora = Lora(**{part: Factors(rng.standard_normal((3, cfg.d_model)).astype(np.float32),
                                 rng.standard_normal((n, 3)).astype(np.float32)) for part, n in outs.items()})
    plain = dataclasses.replace(cfg, qk_norm=False)  # a norm follows the sum, so that the parts wouldn't add up
    x = jnp.asarray(rng.standard_normal((7, cfg.d_model)), jnp.float32)
    layer = params.layers[1].replace(attn_norm=jnp.ones(cfg.d_model))
    changed = add_lora(params, cfg, (None, lora, *(None,) * (cfg.num_layers - 2))).layers[1]
    q, k, v = decoder.project(x, changed.replace(attn_norm=layer.attn_norm), plain)
    base_q, base_k, base_v = decoder.project(x, layer, plain)
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + cfg.norm_eps)
    assert max_diff(q, base_q + (h @ lora.q.a.T @ lora.q.b.T).reshape(q.shape)) < 1e-4
    assert max_diff(k, base_k + (h @ lora.k.a.T @ lora.k.b.T).reshape(k.shape)) < 1e-4
    assert np.array_equal(v, base_v)


def test_an_adapter_comes_back_from_disk_as_it_was(aux, tmp_path):
    adapter = random_adapter(aux)
    loaded = load_adapter(save_adapter(adapter, tmp_path / "adapter"))
    assert loaded.digest() == adapter.digest()
    assert loaded.rows == "question" and loaded.base == aux.fingerprint and loaded.card == {"note": "random"}
    assert np.allclose(loaded.scoring.head_weights, adapter.scoring.head_weights, atol=1e-7)


def test_another_base_model_is_refused_by_both_names(pair, aux):
    adapter = random_adapter(load_model(pair[0], dtype="float32"))
    with pytest.raises(BadInput, match=r"belongs to primary .* and the aux model is aux"):
        adapter.adapted(aux)


@pytest.mark.parametrize("damage, message", [
    (lambda d: (d / "adapter.safetensors").unlink(), "lacks adapter.safetensors"),
    (lambda d: (d / "adapter.json").write_text("{"), "isn't an adapter"),
    (lambda d: (d / "adapter.json").write_text(json.dumps(json.loads((d / "adapter.json").read_text())
                                                          | {"format": 9})), "format 9"),
    (lambda d: (d / "adapter.json").write_text(json.dumps(json.loads((d / "adapter.json").read_text())
                                                          | {"digest": "0"})), "describes another"),
])
def test_a_damaged_adapter_is_refused(aux, tmp_path, damage, message):
    directory = save_adapter(random_adapter(aux), tmp_path / "adapter")
    damage(directory)
    with pytest.raises(BadModelFile, match=message):
        load_adapter(directory)


def test_head_weights_of_another_shape_are_refused(aux):
    adapter = dataclasses.replace(random_adapter(aux), scoring=Scoring(layers=(-1,), head_weights=((1.0,),)))
    with pytest.raises(BadInput, match="head_weights"):
        adapter.adapted(aux)


def test_changes_of_question_rows_leave_chunk_caches_valid_and_changes_of_all_rows_make_others(aux):
    tuned = random_adapter(aux).adapted(aux)
    assert tuned.fingerprint == aux.fingerprint and tuned.params is aux.params
    assert max_diff(tuned.asking.layers[-1].qkv, aux.asking.layers[-1].qkv) > 0
    tuned = random_adapter(aux, rows="all").adapted(aux)
    assert tuned.fingerprint != aux.fingerprint and tuned.asking is tuned.params


@pytest.mark.parametrize("rows", ["question", "all"])
def test_the_engine_selects_by_the_adapter(pair, aux, tmp_path, rows):
    directory = save_adapter(random_adapter(aux, rows, size=2.0), tmp_path / "adapter")
    options = dict(store=tmp_path / "store", dtype="float32")
    base = CacheClip.load(*pair, **options)
    base.index(CHUNKS)
    tuned = CacheClip.load(*pair, aux_adapter=directory, **options)
    before, after = (clip.prefill(QUESTION, CHUNKS).plan.scores for clip in (base, tuned))
    assert not np.allclose(before, after)
    again = tuned.prefill(QUESTION, CHUNKS)
    assert not again.fetched.encoded
    assert np.array_equal(again.plan.scores, after)


def test_the_command_line_scores_as_the_adapter_unless_told_otherwise(aux, tmp_path):
    adapter = load_adapter(directory := save_adapter(random_adapter(aux), tmp_path / "adapter"))
    nothing = (None, None, None)
    assert configured_method("cacheclip", *nothing, None, directory).scoring == adapter.scoring
    assert configured_method("cacheclip", *nothing, "paper", directory).scoring == SCORINGS["paper"]
    assert configured_method("cacheclip", *nothing, None).scoring == SCORINGS["late"]


def test_an_adapter_without_an_aux_model_is_refused(pair, aux, tmp_path):
    directory = save_adapter(random_adapter(aux), tmp_path / "adapter")
    with pytest.raises(BadInput, match="needs that aux model"):
        CacheClip.load(pair[0], None, tmp_path / "store", aux_adapter=directory)


def test_the_adapter_that_comes_with_the_package_is_whole_and_says_where_it_comes_from():
    directory = Path(cacheclip_jax.__file__).with_name("adapters") / "qwen2.5-coder"
    adapter = load_adapter(directory)
    assert (adapter.base_name, adapter.rows, len(adapter.lora)) == ("qwen2.5-coder-0.5b", "question", 24)
    assert {"device", "date", "commit", "command"} <= set(adapter.card)
    assert sum(f.stat().st_size for f in directory.iterdir()) <= 10e6
