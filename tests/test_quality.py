"""The runner: what it answers, that it can be stopped and gone on with, and that parts make up the whole."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import ml_collections
import pytest

from cacheclip_jax import CacheClip
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.adapter import load_adapter, save_adapter
from cacheclip_jax.model.load import load_model
from cacheclip_jax.prompt import LEAD_IN
from cacheclip_jax.store import Passage
from configs.quality import ablations, adapter, defaults, pair, presets, qa, ruler, smoke
from eval.lab import adapter_of, format_of
from eval.ledger import Ledger, key_of
from eval.presets import entries
from eval.quality import columns_of, run, target
from eval.report import write
from eval.rows import read_rows
from eval.samples import Made, heads_first, jobs, made, prepared, rounds, shard, starting_on_cpu
from tests import samples
from tests.test_adapter import random_adapter

METHODS = ({"method": "naive"}, {"method": "cacheclip", "preset": "lead-in", "ratios": (0.1, 0.3)})
COLUMNS = 4  # with full attention


@pytest.fixture(scope="module", autouse=True)
def one_commit():
    """Rows of two runs are compared as a whole, also where the working tree changes between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHECLIP_COMMIT", "tested")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    samples.squad(folder / "squad.json")
    samples.records(folder / "kv.jsonl")
    return folder


@pytest.fixture
def config(long_pair, data, tmp_path) -> ml_collections.ConfigDict:
    """Two tasks of few samples, for the tiny pair."""
    config = defaults.base()
    config.update({
        "run": "tiny", "out": str(tmp_path / "rows.jsonl"), "primary": str(long_pair[0]), "aux": str(long_pair[1]),
        "dtype": "float32", "data": str(data), "methods": METHODS, "batch": 3, "workers": 0, "examples": 1,
        "lengths": (2048,), "count": 1,
        "tasks": ({"task": "squad", "data": "squad.json", "distractors": 3, "count": 2, "lengths": ()},
                  {"task": "kv", "name": "kv-short", "data": "kv.jsonl", "records": 8})})
    return config


def behind_a_lead_in(sample):
    return replace(format_of(sample), lead_in=LEAD_IN)


def rows(path):
    """What rows say, in an order of their own."""
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda r: repr(key_of_dict(r)))


def key_of_dict(row):
    return [row[k] for k in ("task", "length", "method", "preset", "ratio", "sample")]


def close(a, b):
    """Rows that differ by rounding at most: batches are filled otherwise after an interruption."""
    for one, other in zip(a, b, strict=True):
        for name in ("kl", "kl_first_token"):
            assert one.pop(name) == pytest.approx(other.pop(name), abs=1e-5)
        assert one == other


@pytest.fixture(scope="module")
def whole(request, long_pair, data, tmp_path_factory):
    """The rows of an uninterrupted run."""
    return run(config.__wrapped__(long_pair, data, tmp_path_factory.mktemp("whole")))


def test_every_sample_is_answered_by_every_method(whole):
    found = read_rows([whole])
    assert len(found) == 3 * COLUMNS and len({key_of(r) for r in found}) == len(found)
    assert {(r.task, r.length) for r in found} == {("squad", 0), ("kv-short", 2048)}
    assert all(r.prompt_tokens and r.references and r.kl is not None for r in found)
    assert {r.realised_ratio for r in found if r.method == "full"} == {1.0}
    for row in found:
        assert bool(row.context) == bool(row.question)
        if row.ratio:
            assert 0 < row.realised_ratio <= row.ratio + 8 / 200
    assert sum(bool(r.context) for r in found) == 2 * COLUMNS


def test_answers_are_the_engines(whole, config):
    job = jobs(config.tasks, (), config.data, count=1, split=config.split, seed=0)[0]
    clip = CacheClip.load(config.primary, config.aux, "memory://test-quality", dtype="float32")
    for sample in made(job, config.primary, config.judged).samples:
        clip = CacheClip(clip.primary.model, clip.aux.model, clip.store, prompt_format=behind_a_lead_in(sample))
        for method, ratio in (("full", None), ("cacheclip", 0.3)):
            answer = clip.ask(sample.question, list(map(Passage.make, sample.context)), method=method, ratio=ratio,
                              max_new_tokens=sample.max_new_tokens)
            row, = (r for r in read_rows([whole]) if (r.sample, r.method, r.ratio) == (sample.id, method, ratio))
            assert (row.answer_ids, row.prediction) == (answer.token_ids, answer.text)
            assert row.realised_ratio == pytest.approx(answer.realised_ratio)
            assert row.score == sample.score(answer.text)


def test_selected_spans_are_the_recomputed_tokens_text(whole):
    row = next(r for r in read_rows([whole]) if r.ratio == 0.3 and r.context)
    text = "".join(row.context)
    assert all(0 <= a < b <= len(text) for a, b in row.selected)
    share = sum(b - a for a, b in row.selected) / len(text)
    assert abs(share - row.realised_ratio) < 0.15
    full = next(r for r in read_rows([whole]) if r.method == "full" and r.context)
    assert full.selected and sum(b - a for a, b in full.selected) == len("".join(full.context))


@pytest.mark.parametrize(("setting", "files"), [
    ("shard", ["rows.0of2.jsonl", "rows.1of2.jsonl"]),
    ("columns", ["rows.columns-0of2.jsonl", "rows.columns-1of2.jsonl"]),
])
def test_parts_make_up_the_whole(whole, config, setting, files):
    found = []
    for part in ("0/2", "1/2"):
        config[setting] = part
        found.append(run(config))
    assert [f.name for f in found] == files
    assert all(len(rows(f)) >= COLUMNS for f in found)
    if setting == "columns":
        assert [{r["method"] for r in rows(f)} for f in found] == [{"full", "naive"}, {"cacheclip"}]
    close(sorted((r for f in found for r in rows(f)), key=lambda r: repr(key_of_dict(r))), rows(whole))


@pytest.mark.parametrize("kept", [1, 7])
def test_a_stopped_run_goes_on_to_the_same_rows(whole, config, kept):
    lines = whole.read_text().splitlines(keepends=True)
    part = target(config).with_name("rows.jsonl.part")
    config.budget_seconds = 1e-6  # over before the first sample
    assert run(config) is None
    config.budget_seconds = 0
    part.write_text("".join(lines[:kept]) + lines[kept][:30])  # the next row was cut off
    assert not target(config).exists()
    close(rows(run(config)), rows(whole))
    assert not part.exists()


def test_a_finished_run_is_not_overwritten(whole, config):
    before = whole.read_bytes()
    config.out = str(whole)
    with pytest.raises(BadInput, match="finished run"):
        run(config)
    assert whole.read_bytes() == before


def test_a_report_can_be_written_of_it(whole, tmp_path):
    assert "cacheclip lead-in" in write(read_rows([whole]), tmp_path / "report")[1].read_text()


def test_the_adapters_column_is_scored_by_the_finetuned_aux_and_others_are_not(whole, config, long_pair, tmp_path):
    aux = load_model(long_pair[1], dtype="float32")
    tuned = save_adapter(random_adapter(aux, size=2.0), tmp_path / "tuned")
    config.update({"aux_adapter": str(tuned), "tasks": config.tasks[:1], "methods": (
        {"method": "cacheclip", "preset": "lead-in", "ratios": (0.3,)},
        {"method": "cacheclip", "preset": "adapter", "ratios": (0.3,)}, {"method": "specprefill", "ratios": (0.3,)})})
    found = {(r.sample, r.method, r.preset): r for r in read_rows([run(config)])}
    assert {r.aux_adapter for r in found.values() if r.preset != "adapter"} == {""}
    before = {r.sample: r for r in read_rows([whole]) if (r.preset, r.ratio, r.task) == ("lead-in", 0.3, "squad")}
    job = jobs(config.tasks, (), config.data, count=1, split=config.split, seed=0)[0]
    clip = CacheClip.load(config.primary, config.aux, "memory://test-adapter", dtype="float32", aux_adapter=tuned)
    for sample in made(job, config.primary, config.judged).samples:
        assert found[sample.id, "cacheclip", "lead-in"].answer_ids == before[sample.id].answer_ids
        clip = CacheClip(clip.primary.model, aux, clip.store, prompt_format=behind_a_lead_in(sample),
                         aux_adapter=load_adapter(tuned))
        answer = clip.ask(sample.question, list(map(Passage.make, sample.context)), ratio=0.3,
                          max_new_tokens=sample.max_new_tokens)
        row = found[sample.id, "cacheclip", "adapter"]
        assert (row.answer_ids, row.aux_adapter) == (answer.token_ids, "tuned")
    kl = {preset: [found[s, "cacheclip", preset].kl for s in before] for preset in ("lead-in", "adapter")}
    assert kl["lead-in"] != kl["adapter"]


def test_a_run_is_not_gone_on_with_by_an_adapter_trained_again(config, long_pair, tmp_path):
    aux = load_model(long_pair[1], dtype="float32")
    config.update({"aux_adapter": str(tmp_path / "tuned"), "budget_seconds": 1e-6, "methods": (
        {"method": "cacheclip", "preset": "adapter", "ratios": (0.3,)},)})
    save_adapter(random_adapter(aux), tmp_path / "tuned")
    assert run(config) is None
    target(config).with_name("rows.jsonl.part").touch()
    save_adapter(random_adapter(aux, seed=1), tmp_path / "tuned")
    with pytest.raises(BadInput, match="another aux_adapter"):
        run(config)


@pytest.mark.parametrize(("changes", "named"), [
    ({"aux": ""}, "belongs to .*aux model"),
    ({"methods": METHODS}, "preset adapter"),
    ({"aux_adapter": ""}, "needs a finetuned aux model"),
])
def test_an_adapter_needs_its_aux_and_a_column(config, long_pair, tmp_path, changes, named):
    tuned = save_adapter(random_adapter(load_model(long_pair[1], dtype="float32")), tmp_path / "tuned")
    config.update({"aux_adapter": str(tuned), "methods": ({"method": "cacheclip", "preset": "adapter"},), **changes})
    with pytest.raises(BadInput, match=named):
        run(config)


@pytest.mark.parametrize(("changes", "named"), [
    ({"shard": "2/2"}, "shard='2/2'"),
    ({"shard": "1"}, "shard='1'"),
    ({"columns": "3/3"}, "columns='3/3'"),
    ({"columns": "0/9"}, "columns='0/9' is a part without a method: there are 4"),
    ({"judged": 0}, "judged=0"),
    ({"block": -1}, "block=-1"),
    ({"methods": ({"method": "cacheclop"},)}, "cacheclop"),
    ({"methods": ({"method": "cacheclip", "preset": "early"},)}, "no preset 'early'"),
    ({"methods": ({"method": "naive", "ratios": (0.1,)},)}, "naive recomputes a fixed share"),
    ({"methods": ({"method": "naive", "colour": "red"},)}, "colour"),
    ({"methods": ({"method": "naive"}, {"method": "naive"})}, "two methods are called naive"),
    ({"tasks": ("squad", "squad")}, "two tasks are called squad"),
    ({"tasks": ({"task": "squad", "data": "x.json"},), "data": ""}, "config.data"),
])
def test_what_a_config_can_not_ask_is_refused_before_any_work(config, tmp_path, changes, named):
    config.update(changes)
    with pytest.raises(BadInput, match=named):
        run(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "text"), [(True, LEAD_IN), ("Some words.", "Some words."), ("", ""), (False, "")])
def test_a_columns_lead_in_is_the_default_one_a_text_or_none(given, text):
    entry, = entries({"method": "cacheclip", "preset": "lead-in", "lead_in": given})
    assert entry.lead_in == text


@pytest.mark.parametrize("made_by", [ablations, adapter, pair, presets, qa, ruler, smoke], ids=lambda m: m.__name__)
def test_the_columns_of_every_config_can_be_told_apart(made_by):
    config = made_by.get_config()
    assert len(columns_of(config, adapter_of(config.aux_adapter, config.aux))) > 8


@pytest.mark.parametrize(("which", "aux"), [
    ("selection", ""), ("ratios", ""), ("chunks", ""), ("aux", "smollm2-135m"),
])
def test_every_kind_of_ablation_has_the_default_at_10_percent_and_the_aux_model_that_it_is_about(which, aux):
    config = ablations.get_config(which)
    default, = (e for e in entries(ablations.variant("default")) if e.ratio == 0.1)
    assert any(e.method == default.method and e.lead_in == default.lead_in for e in columns_of(config, None))
    assert config.aux == (aux or defaults.base().aux) and config.split == "tune"


@pytest.mark.parametrize(("block", "expected"), [
    (2, ["a01", "b01", "c0", "a23", "b2", "a4"]), (0, ["a01234", "b012", "c0"]), (9, ["a01234", "b012", "c0"]),
])
def test_tasks_take_turns_a_block_of_samples_each(block, expected):
    def job(name, count):
        samples = tuple(SimpleNamespace(id=str(i)) for i in range(count))
        return Made(SimpleNamespace(name=name), samples, 256, first=5)

    found = list(rounds((job(name, count) for name, count in (("a", 5), ("b", 3), ("c", 1))), block))
    assert [m.job.name + "".join(s.id for s in m.samples) for m in found] == expected
    assert all(m.first == 5 + int(m.samples[0].id) and m.slots == 256 for m in found)


@pytest.mark.parametrize("block", [0, 1, 2, 3, 9])
def test_the_first_samples_of_every_task_are_made_before_the_rest_of_any(config, block):
    asked = shard(jobs(config.tasks, config.lengths, config.data, count=4, split="report", seed=0), "0/1",
                  config.primary, 4)
    parts = heads_first(asked, block)
    (whole, stop), (split, _) = ((job, part.stop) for job, part in asked)
    assert split.in_order and not whole.in_order
    assert [part.stop for _, part in parts] == {0: [stop, 4], 9: [stop, 4]}.get(block, [stop, block, 4])

    def answered(parts, job):
        found = rounds(prepared(parts, config.primary, 4, workers=0), block)
        return [(m.first + i, s, m.slots) for m in found for i, s in enumerate(m.samples) if m.job.name == job.name]

    for job in (whole, split):
        assert answered(parts, job) == answered(asked, job)


def platform() -> str:
    """Where a process computes that has imported the runner, as this module does."""
    return jax.devices()[0].platform


@pytest.mark.parametrize("inherited", ["cuda", None])
def test_processes_make_the_same_samples_without_the_accelerator(config, monkeypatch, inherited):
    asked = jobs(config.tasks, config.lengths, config.data, count=1, split="report", seed=0)
    parts = shard(asked, "0/1", config.primary, 4)
    here = list(prepared(parts, config.primary, 4, workers=0))
    if inherited is None:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    else:
        monkeypatch.setenv("JAX_PLATFORMS", inherited)  # a process that touches this device dies: there is none
    assert list(prepared(parts, config.primary, 4, workers=1)) == here
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        with starting_on_cpu():
            found = processes.submit(platform)
        assert os.environ.get("JAX_PLATFORMS") == inherited
        assert found.result() == "cpu"


def test_a_run_is_not_gone_on_with_by_another_config(tmp_path):
    with Ledger(tmp_path / "a.jsonl", {"count": 3, "ratios": (0.1,)}) as ledger:
        assert not ledger.done
    with Ledger(tmp_path / "a.jsonl", {"count": 3, "ratios": [0.1]}):
        pass
    with pytest.raises(BadInput, match=r"another count \(3, now 4\)"):
        Ledger(tmp_path / "a.jsonl", {"count": 4, "ratios": (0.1,)})
