"""The laboratory: chunk caches that stay on the device give what the engine gives from its store."""

from dataclasses import replace

import numpy as np
import pytest

from cacheclip_jax import Budget, CacheClip
from cacheclip_jax.errors import BadInput, ContextTooLong
from cacheclip_jax.methods import AuxGuided, CacheBlend, Full, Naive, Prefix, ProphetKV, SpecPrefill
from cacheclip_jax.model.load import load_model
from cacheclip_jax.online import execute
from cacheclip_jax.prompt import LEAD_IN, PromptFormat
from cacheclip_jax.store import ChunkStore, Passage
from eval.lab import Lab, format_of, frame_tokens, prompt_of, request
from eval.tasks import Sample
from tests.conftest import max_diff

# Twenty chunks of very different lengths: several batches, of two widths.
CONTEXT = tuple(f"The keeper of house {i} is called Ada {i * 37} " + "and sits on the mat " * (i % 7) + ".\n\n"
                for i in range(20))


def sample(**changes) -> Sample:
    return Sample(**{
        "id": "s/0", "task": "s", "instructions": "Remember who keeps which house.\n\n", "context": CONTEXT,
        "question": "Who keeps house 7?\n", "answer_prefix": " It is", "references": ("Ada 259",),
        "metric": "string_match_all", "max_new_tokens": 8, **changes})


@pytest.fixture(scope="module")
def lab(long_pair) -> Lab:
    return Lab(*(load_model(path, dtype="float32") for path in long_pair))


def engine(lab: Lab, asked: Sample, lead_in: str = "") -> CacheClip:
    return CacheClip(lab.primary, lab.aux, ChunkStore.open("memory://test-lab"),
                     prompt_format=replace(format_of(asked), lead_in=lead_in))


BARE = {"meta": {"chat": False}, "instructions": ""}  # a prompt without a prefix


@pytest.mark.parametrize(("method", "changes"), [
    (Full(), {}), (Prefix(), {}), (Naive(), {}), (Naive(prefix="none"), {}), (AuxGuided(Budget(ratio=0.1)), {}),
    (AuxGuided(Budget(ratio=0.1), prefix="none"), {}), (AuxGuided(Budget(ratio=0.1)), BARE),
    (CacheBlend(Budget(ratio=0.1)), {}), (ProphetKV(Budget(ratio=0.1)), {}), (SpecPrefill(Budget(ratio=0.3)), {})],
    ids=["full", "prefix", "naive", "naive-none", "cacheclip", "cacheclip-none", "no-prefix", "cacheblend", "prophetkv",
         "specprefill"])
def test_a_method_does_in_the_lab_what_it_does_in_the_engine(lab, method, changes):
    asked = sample(**changes)
    chunks = list(map(Passage.make, asked.context))
    wanted = engine(lab, asked).prefill(asked.question, chunks, method=method, reserve=8)
    sides = lab.sides(asked, 2048, 8)
    over = request(sides)
    plan = method.plan(over)
    got = execute(over, plan, method.caches)
    assert (sides.primary.prompt.ids == wanted.prompt.ids).all()
    assert (plan.fetched(sides.primary.prompt.context_tokens).recompute == wanted.plan.recompute).all()
    assert max_diff(got.logits, wanted.logits) < 1e-3
    assert (int(got.tail.slot), int(got.tail.position)) == (int(wanted.tail.slot), len(wanted.prompt.ids))


@pytest.mark.parametrize("method", [AuxGuided(Budget(ratio=0.1)), Naive(prefix="none"), Prefix()], ids=lambda m: m.name)
@pytest.mark.parametrize("changes", [{}, BARE], ids=["prefix", "no-prefix"])
def test_a_method_does_the_same_behind_a_lead_in(lab, method, changes):
    asked = sample(**changes)
    wanted = engine(lab, asked, LEAD_IN).prefill(asked.question, list(map(Passage.make, asked.context)), method=method)
    over = request(lab.sides(asked, 2048, 8).behind(LEAD_IN))
    plan = method.plan(over)
    assert (plan.fetched(over.prompt.context_tokens).recompute == wanted.plan.recompute).all()
    assert max_diff(execute(over, plan, method.caches).logits, wanted.logits) < 1e-3
    plain = engine(lab, asked).prefill(asked.question, list(map(Passage.make, asked.context)), method=method)
    assert (max_diff(wanted.logits, plain.logits) > 1e-2) == (method.name == "cacheclip")


def test_behind_no_lead_in_are_the_same_sides(lab):
    sides = lab.sides(sample(), 2048, 8)
    assert sides.behind("") is sides and sides.behind("Some words.") is not sides


def test_a_lead_in_is_tokenised_once_for_each_model(lab):
    first, second = (lab.sides(sample(question=asked), 2048, 8).behind(LEAD_IN) for asked in ("Who?", "Where?"))
    for one, other in ((first.primary, second.primary), (first.aux, second.aux)):
        assert one.prompt.lead_in is other.prompt.lead_in
        assert one.prompt.lead_in == PromptFormat(lead_in=LEAD_IN).lead_in_ids(one.model.tokenizer)
    assert first.primary.prompt.lead_in != first.aux.prompt.lead_in


def test_the_lab_tells_methods_apart(lab):
    """Else the test above would also pass for a lab that prefills in full, whatever it is asked."""
    over = request(lab.sides(sample(), 2048, 8))
    logits = {str(m): execute(over, m.plan(over), m.caches).logits
              for m in (Full(), Naive(), Naive(prefix="none"),
                        *(AuxGuided(Budget(ratio=0.1), prefix=prefix) for prefix in ("shared", "none")))}
    for name, theirs in logits.items():
        assert all(max_diff(theirs, others) > 1e-2 for other, others in logits.items() if other != name)


def test_signals_are_computed_once_for_all_methods_of_a_request(lab):
    over = request(lab.sides(sample(), 2048, 8))
    few, many = (AuxGuided(Budget(ratio=r)).plan(over) for r in (0.05, 0.2))
    assert few.scores is many.scores
    assert over.feed("shared") is over.feed("shared")


def test_the_aux_model_may_be_the_primary(lab):
    own = Lab(lab.primary, lab.primary)
    over = request(own.sides(sample(), 2048, 8))
    plan = AuxGuided(Budget(ratio=0.1)).plan(over)
    assert 0 < np.asarray(plan.recompute).sum() <= 0.1 * over.prompt.context_tokens + 8


def test_what_does_not_fit_is_refused_with_the_numbers(lab):
    with pytest.raises(ContextTooLong, match="s/0: prompt and answer take .* the limit is 512"):
        lab.sides(sample(), 512, 8)


def test_a_method_that_needs_an_aux_model_says_so(lab):
    over = request(Lab(lab.primary, None).sides(sample(), 2048, 8))
    with pytest.raises(BadInput, match="aux model"):
        AuxGuided().plan(over)


def test_frame_tokens_are_those_around_a_samples_parts(lab):
    words, asked = lab.primary.tokenizer, sample()
    parts = asked.tokens(lambda text: words.encode(text).spans) - asked.max_new_tokens
    assert 0 <= parts + frame_tokens(words) - len(prompt_of(asked, words).ids) <= 8
