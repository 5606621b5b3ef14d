"""Similarity of attention: the four measures by definition, layers as methods score them, and a run's files."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.load import load_model
from cacheclip_jax.request import scores_between
from cacheclip_jax.score import Scoring
from configs.quality import similarity as config_file
from eval.lab import Lab, request
from eval.similarity import attention, measures, run
from tests.conftest import max_diff
from tests.test_lab import sample


def test_the_measures_are_those_that_their_names_say():
    ours, theirs = np.array([4, 3, 2, 1, 0.5, 0.5, 1, 1, 1, 2]), np.array([1, 5, 1, 1, 1, 1, 1, 6, 2, 1.0])
    p, q = ours / 16, theirs / 20
    got = measures(theirs, ours)
    assert got["kl"] == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-6)
    assert got["cosine"] == pytest.approx(p @ q / np.sqrt(p @ p) / np.sqrt(q @ q), abs=1e-6)
    assert got["jaccard20"] == 1 / 3  # the best two: {0, 1} and {7, 1}
    assert got["recall20"] == 1 / 2


def test_a_score_is_nearest_to_itself_and_kl_is_of_theirs_from_ours():
    ours, theirs = np.random.default_rng(0).random((2, 50))
    same = measures(7 * ours, ours)
    assert same == pytest.approx({"kl": 0, "cosine": 1, "jaccard20": 1, "recall20": 1}, abs=1e-6)
    assert measures(theirs, ours)["kl"] != pytest.approx(measures(ours, theirs)["kl"], rel=1e-3)


def test_a_token_without_any_attention_leaves_the_divergence_finite():
    assert 0 < measures(np.array([1.0, 0, 0]), np.array([1.0, 1, 1]))["kl"] < 30


@pytest.mark.parametrize("context", ["joint", "cached"])
def test_a_layer_s_attention_is_the_score_that_methods_get_of_it(long_pair, context):
    lab = Lab(*(load_model(path, dtype="float32") for path in long_pair))
    sides = lab.sides(sample(), 2048, 8)
    over = request(sides)
    total = over.prompt.context_tokens
    for side in (sides.primary, sides.aux):
        assert side is not None
        for rows, by_layer in attention(side, context).items():
            for layer, scores in enumerate(by_layer):
                scoring = Scoring(layers=(layer,), rows=rows, context=context)
                wanted = over.aux_scores(scoring) if side is sides.aux else over.primary_scores(scoring, "shared")
                own = scores[len(side.prompt.prefix) :]
                assert max_diff(scores_between(own, side.prompt, over.prompt), wanted[:total]) < 1e-6


def small(pair: tuple[Path, Path], out: Path) -> ConfigDict:
    config = config_file.get_config()
    config.update({"primary": str(pair[0]), "aux": str(pair[1]), "out": str(out), "lengths": (1024,),
                   "tasks": ({"task": "niah_multikey_2", "chunk_tokens": 200},)})
    return config


def test_a_run_writes_rows_for_all_pairs_a_table_and_a_picture_once(long_pair, tmp_path):
    config = small(long_pair, tmp_path / "similarity")
    written = run(config)
    rows = [json.loads(line) for line in written[0].read_text(encoding="utf-8").splitlines()]
    # Two layers each: early with deep, then the aux's last, and its late ones, with both of the primary's.
    assert len(rows) == 2 * (1 * 1 + 2 * 2 * 2)
    assert {(r["scorer"], r["context"], r["aux_layer"]) for r in rows} == {
        ("primary", "joint", 0), *(("aux", context, layer) for context in ("joint", "cached") for layer in (1, "late"))}
    last = [r["recall20"] for r in rows if r["scorer"] == "aux" and r["context"] == "cached" and r["rows"] == "mean"
            and r["aux_layer"] == 1 and r["primary_layer"] == 1]
    table = written[1].read_text(encoding="utf-8")
    assert any(line.startswith("| aux, layer 1 | cached | mean |") and line.endswith(f"{last[0]:.3f} |")
               for line in table.splitlines())
    assert "niah_multikey_2" in table and written[2].read_text(encoding="utf-8").startswith("<?xml")
    with pytest.raises(BadInput, match=r"similarity.jsonl exists: name another --config.out"):
        run(config)
