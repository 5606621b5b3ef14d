"""The harness's model: it answers and judges as the engine does, and a task runs from a file to its scores."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cacheclip_jax import CacheClip
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.adapter import save_adapter
from cacheclip_jax.model.load import load_model
from cacheclip_jax.online import full_prefill
from cacheclip_jax.prompt import PromptFormat
from cacheclip_jax.store import Passage
from tests.test_adapter import random_adapter

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from eval.lm_eval_model import CacheClipLM, generation, judge  # noqa: E402

INSTRUCTIONS, QUESTION = "Remember who sits where.\n\n", "Question: Where is the cat?\nAnswer:"
CHUNKS = tuple(f"Document {i}: the cat number {i} sat on mat {i * 7}, at the end of the house.\n" for i in range(1, 7))
PROMPT = INSTRUCTIONS + "".join(CHUNKS) + QUESTION


@pytest.fixture(scope="module")
def models(long_pair):
    return {"primary": str(long_pair[0]), "aux": str(long_pair[1]), "dtype": "float32"}


@pytest.fixture(scope="module")
def lm(models) -> CacheClipLM:
    return CacheClipLM(**models, preset="late", ratio=0.3)


@pytest.fixture(scope="module")
def clip(long_pair) -> CacheClip:
    """The engine with this prompt's format."""
    words = PromptFormat(instructions=INSTRUCTIONS, chunk="{text}", question="{question}", chat=False, strip=False)
    return CacheClip.load(*long_pair, "memory://test-lm-eval", dtype="float32", prompt_format=words)


def prefilled(clip: CacheClip, room: int, **options):
    return clip.prefill(QUESTION, list(map(Passage.make, CHUNKS)), reserve=room, **options)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def test_answers_are_the_engines_and_end_at_stop_strings(lm, clip):
    wanted = clip.ask(QUESTION, list(map(Passage.make, CHUNKS)), ratio=0.3, max_new_tokens=12)
    whole, cut = lm.generate_until(asked("generate_until", (PROMPT, {"max_gen_toks": 12, "until": []}),
                                         (PROMPT, {"max_gen_toks": 12, "until": wanted.text[3:5]})))
    assert whole == wanted.text and cut == whole[: whole.index(wanted.text[3:5])]
    assert lm.get_model_info()["realised_ratio"] == pytest.approx(wanted.realised_ratio)


@pytest.mark.parametrize("method", ["full", "cacheclip", "ape"])
def test_likelihoods_are_those_of_the_engines_continuation(models, clip, method):
    ratio, texts = {"ratio": 0.3} if method == "cacheclip" else {}, [" on the mat", "\n", " the end"]
    found = CacheClipLM(**models, method=method, **ratio).loglikelihood(
        asked("loglikelihood", *((PROMPT, text) for text in texts)))
    for text, (value, _) in zip(texts, found, strict=True):
        ids = clip.primary.model.tokenizer.encode(text).ids
        prefill = prefilled(clip, len(ids), method=method, **ratio)
        logits = [np.asarray(prefill.logits), *clip.continuation(prefill, ids)]
        assert value == pytest.approx(sum(log_softmax(row)[i] for row, i in zip(logits, ids, strict=False)), abs=1e-3)


def test_full_attentions_likelihood_is_the_product_over_longer_and_longer_prompts(clip):
    model, prefill = clip.primary.model, prefilled(clip, 6, method="full")
    greedy = clip.greedy(prefilled(clip, 6, method="full"), 6)
    by_hand, prompt = 0.0, list(prefill.prompt.ids)
    for done, token in enumerate(greedy):
        ids = np.array([*prompt, *greedy[:done]], np.int32)
        by_hand += log_softmax(np.asarray(full_prefill(model, ids, 1024)[0]))[token]
    assert judge(model, prefill, greedy) == (pytest.approx(by_hand, abs=1e-3), True)
    for place in (0, 3, 5):
        other = tuple((token + (i == place)) % 280 for i, token in enumerate(greedy))
        assert not judge(model, prefill, other)[1]
    assert judge(model, prefill, greedy[:1])[1]


def test_white_space_between_context_and_continuation_is_the_continuations(lm):
    here, there = lm.loglikelihood(asked("loglikelihood", (PROMPT + " ", "mat"), (PROMPT, " mat")))
    assert here == there


@pytest.mark.parametrize(("until", "named"), [({"num_beams": 2}, "num_beams=2"), ({"max_gen_toks": 0}, "0 tokens")])
def test_what_generation_can_not_do_is_refused(until, named):
    with pytest.raises(BadInput, match=named):
        generation(until, 16)


def test_generation_is_greedy_unless_a_task_samples():
    assert generation({"until": "\n", "do_sample": False, "temperature": 0.7}, 16)[2].temperature == 0
    until, limit, sampling = generation({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 3}, 16)
    assert (until, limit, sampling.temperature, sampling.top_p) == ([], 3, 0.7, 0.9)
    assert generation({"do_sample": True}, 16)[1:] == (16, type(sampling)(temperature=1.0))


def test_what_reuses_nothing_is_refused_by_name(lm):
    with pytest.raises(BadInput, match="loglikelihood_rolling"):
        lm.loglikelihood_rolling(asked("loglikelihood_rolling", (PROMPT,)))
    with pytest.raises(BadInput, match="nothing in this prompt"):
        lm.loglikelihood(asked("loglikelihood", ("", " mat")))
    with pytest.raises(BadInput, match="is empty"):
        lm.loglikelihood(asked("loglikelihood", (PROMPT, "")))
    with pytest.raises(BadInput, match="chat=true"):
        lm.apply_chat_template([])


@pytest.mark.parametrize(("settings", "named"), [
    ({"method": "cacheclop"}, "cacheclop"), ({"method": "full", "ratio": 0.1}, "leave ratios out"),
    ({"batch_size": 8}, "batch_size=8"), ({"colour": "red"}, "colour"),
    ({"chunk_tokens": 0}, "chunk_tokens=0")])
def test_settings_that_it_does_not_have_are_refused(models, settings, named):
    with pytest.raises(BadInput, match=named):
        CacheClipLM(**models, **settings)


def test_settings_of_a_method_an_adapter_and_the_chat_template(models, long_pair, tmp_path, lm):
    adapter = save_adapter(random_adapter(load_model(long_pair[1], dtype="float32"), size=2.0), tmp_path / "tuned")
    requests = asked("loglikelihood", (PROMPT, " on the mat"))
    plain, = lm.loglikelihood(requests)
    for settings in ({"prefix": None}, {"heads_of_chunks": 4}, {"aux_adapter": str(adapter)}, {"chat": True}):
        other, = CacheClipLM(**models, ratio=0.3, **settings).loglikelihood(requests)
        assert abs(other[0] - plain[0]) > 1e-4, settings  # the harness reads prefix=none as None


def test_tasks_run_from_files_to_scores(models, tmp_path):
    rows = [{"documents": "".join(CHUNKS), "question": f"Where is cat {i}?", "answer": f" mat {i * 7}",
             "choices": [" the mat", " the end", " at 1"]} for i in (1, 2, 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test", "doc_to_text": INSTRUCTIONS + "{{documents}}Question: {{question}}\nAnswer:"}
    kinds = {
        "where": {"output_type": "generate_until", "doc_to_target": "{{answer}}",
                  "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
                  "metric_list": [{"metric": "exact_match"}]},
        "which": {"output_type": "multiple_choice", "doc_to_target": 0, "doc_to_choice": "{{choices}}",
                  "target_delimiter": "", "metric_list": [{"metric": "acc"}]}}
    for name, kind in kinds.items():  # JSON is YAML
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **kind}))
    arguments = ",".join(f"{k}={v}" for k, v in {**models, "preset": "late", "ratio": 0.3}.items())
    found = lm_eval.simple_evaluate("cacheclip", arguments, tasks=list(kinds), bootstrap_iters=0, log_samples=True,
                                    task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    assert 0 <= found["results"]["which"]["acc,none"] <= 1 and "exact_match,none" in found["results"]["where"]
    assert {name: len(samples) for name, samples in found["samples"].items()} == {"where": 3, "which": 3}
    assert found["config"]["method"] == "cacheclip late 30%" and 0.3 <= found["config"]["realised_ratio"] < 0.35
