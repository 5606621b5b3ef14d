"""The search for head-room: what it picks by definition, and that a run's rows are what methods give."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods import AuxGuided, Full, Naive
from cacheclip_jax.model.load import load_model
from cacheclip_jax.online import execute
from cacheclip_jax.select import Windows
from configs.quality import headroom as config_file
from eval.headroom import SEARCH, Judge, at_heads, groups_of, run, search
from eval.lab import Lab, request
from eval.quality import columns_of
from tests.test_lab import sample


def test_the_group_that_takes_most_off_for_a_token_comes_first():
    gains, sizes = (4.0, 9.0, 1.0, 6.0), (1, 3, 1, 1)  # 4, 3, 1 and 6 a token
    steps = search(lambda chosen: 20 - sum(gains[g] for g in chosen), sizes, 6, width=4)
    assert [(s.group, s.distance) for s in steps] == [(3, 14.0), (0, 10.0), (1, 1.0), (2, 0.0)]


def test_what_does_not_fit_is_passed_over():
    steps = search(lambda chosen: 9 - sum((1, 5, 2)[g] for g in chosen), (1, 4, 1), 2, width=3)
    assert [s.group for s in steps] == [2, 0]


def test_the_search_ends_where_nothing_helps_and_tries_all_before_it_does():
    """Groups 2 and 3 help only once 0 is there: by what they took off alone they're the last to be tried."""
    def distance(chosen):
        later = sum((2.0, 1.0)[g - 2] for g in chosen if g > 1) * (1 if 0 in chosen else -1)
        return 10 - 3 * (0 in chosen) + 0.5 * (1 in chosen) - later

    assert [s.group for s in search(distance, (1, 1, 1, 1), 4, width=1)] == [0, 3, 2]
    assert [s.group for s in search(distance, (1, 1, 1, 1), 4, width=4)] == [0, 2, 3]
    assert search(lambda chosen: len(chosen), (1, 1), 2, width=1) == []
    assert search(lambda chosen: -len(chosen), (5, 5), 4, width=1) == []


def test_later_rounds_try_only_the_best_that_were_tried():
    tried: list[tuple[int, ...]] = []

    def distance(chosen):
        tried.append(tuple(chosen))
        return 100 - sum(10 - g for g in chosen)

    search(distance, (1,) * 8, 3, width=2)
    assert tried == [(), *((g,) for g in range(8)), (0, 1), (0, 2), (0, 1, 2), (0, 1, 3)]


@pytest.fixture(scope="module")
def over(long_pair):
    return request(Lab(*(load_model(path, dtype="float32") for path in long_pair)).sides(sample(), 2048, 8))


def test_full_attention_is_at_no_distance_and_naive_reuse_is(over):
    judge = Judge.of(over, 4)
    for method, near in ((Full(), True), (Naive(), False)):
        distance, same = judge(execute(over, method.plan(over), method.caches))
        assert (distance < 1e-6) == near and 0 <= same <= 1 and (same == 1 or not near)


def test_groups_are_the_contexts_tokens_each_once(over):
    groups = groups_of(over, AuxGuided())
    assert (np.concatenate(groups) == np.arange(over.prompt.context_tokens)).all() and max(map(len, groups)) <= 96
    with pytest.raises(BadInput, match="sliding window"):
        groups_of(over, AuxGuided(grouping=Windows()))


def test_heads_are_groups_that_begin_with_a_later_chunk():
    prompt = SimpleNamespace(chunk_lengths=(40, 100, 10))
    groups = [np.arange(start, start + 5) for start in (0, 35, 40, 71, 72, 135, 140, 145)]
    assert at_heads(SimpleNamespace(prompt=prompt), groups).tolist() == [
        False, False, True, True, False, False, True, True]


@pytest.fixture
def config(long_pair, tmp_path) -> ConfigDict:
    config = config_file.get_config()
    config.update({"primary": str(long_pair[0]), "aux": str(long_pair[1]), "out": str(tmp_path / "headroom"),
                   "count": 2, "tasks": ({"task": "niah_multikey_2", "chunk_tokens": 200},), "ratios": (0.05, 0.1),
                   "methods": ({"method": "naive", "preset": "lead-in"},
                               {"method": "cacheclip", "preset": "lead-in", "ratios": (0.1, 0.3)})})
    return config


def test_a_run_writes_what_search_and_methods_reach(config):
    written = run(config)
    rows = [json.loads(line) for line in written[0].read_text(encoding="utf-8").splitlines()]
    assert [(r["method"], r["ratio"]) for r in rows] == 2 * [
        (SEARCH, 0.05), (SEARCH, 0.1), ("naive lead-in", None), ("cacheclip lead-in", 0.1), ("cacheclip lead-in", 0.3)]
    for small, large, naive, clip, more in (rows[:5], rows[5:]):
        assert small["groups"] == large["groups"][: len(small["groups"])] and large["groups"]
        for row in (small, large):
            assert row["recomputed"] == sum(tokens for _, tokens, _ in row["groups"])
            assert math.isclose(row["kl"], row["groups"][-1][2], rel_tol=1e-6) if row["groups"] else True
            assert 0 <= row["at_heads"] <= len(row["groups"]) and 0 < row["at_heads_of_all"] < 1
        assert large["kl"] <= small["kl"] and large["recomputed"] <= clip["recomputed"]
        assert naive["recomputed"] == 0 and 0 <= clip["found"] <= 1
        assert naive["found"] is None and more["found"] is None  # at ratios that the search isn't at
    table = written[1].read_text(encoding="utf-8")
    mean = np.mean([r["kl"] for r in rows if (r["method"], r["ratio"]) == (SEARCH, 0.1)])
    assert "2 samples of niah_multikey_2" in table and f"| search | 10% | {mean:.3f} |" in table
    heads = sum(r["at_heads"] for r in rows if (r["method"], r["ratio"]) == (SEARCH, 0.1))
    assert f"up to 10%, {heads} begin within" in table
    with pytest.raises(BadInput, match=r"headroom.jsonl exists: name another --config.out"):
        run(config)


def test_a_run_that_is_killed_leaves_the_rows_that_it_had(config, monkeypatch, tmp_path):
    def killed_at_the_second(lab, sample, *asked):
        if sample.id.endswith("/1"):
            raise KeyboardInterrupt
        yield {"method": SEARCH, "ratio": 0.1}
        yield {"method": "naive", "ratio": None}

    monkeypatch.setattr("eval.headroom.compare", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    part, = tmp_path.iterdir()
    rows = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
    assert part.name == "headroom.jsonl.part" and [r["method"] for r in rows] == [SEARCH, "naive"]
    with pytest.raises(BadInput, match=r"headroom.jsonl.part has the rows of a run that didn't finish"):
        run(config)
    assert len(part.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(("changes", "named"), [
    ({"ratios": ()}, "ratios="), ({"width": 0}, "width=0"), ({"judged": 0}, "judged=0"),
    ({"search": {"method": "naive"}}, "not naive's"), ({"budget_seconds": 1e-6}, "1e-06 seconds were over"),
])
def test_what_a_config_can_not_ask_is_refused(config, changes, named):
    config.update(changes)
    with pytest.raises(BadInput, match=named):
        run(config)


def test_the_configs_columns_can_be_told_apart():
    config = config_file.get_config()
    config.columns = "0/1"
    assert len(columns_of(config)) == 1 + 1 + 6 * len(config_file.RATIOS)
