"""The column that recomputes what finetuning's teacher says."""

import numpy as np
import pytest

from cacheclip_jax.errors import BadInput
from cacheclip_jax.online import execute
from cacheclip_jax.select import Budget, select
from eval.presets import entries
from eval.teacher import Teacher, verdict
from tests.resident import request
from train.teach import TARGETS


@pytest.fixture(scope="module")
def asked(qwen2):
    return request(qwen2)


@pytest.mark.parametrize("target", TARGETS)
def test_it_recomputes_the_groups_that_the_verdict_ranks_highest(asked, target):
    prompt = asked.prompt
    scores = np.asarray(verdict(asked).scores[target][0])[len(prompt.prefix) : prompt.question_start]
    budget = Budget(ratio=0.3)
    plan = Teacher(budget, target).plan(asked).fetched(prompt.context_tokens)
    expected = select(scores, prompt.chunk_lengths, budget)
    assert expected.any() and np.array_equal(plan.recompute, expected)


def test_everything_recomputed_is_full_prefill(asked):
    method = Teacher(Budget(ratio=1.0))
    full, = entries({"method": "full"})
    logits = [np.asarray(execute(asked, m.plan(asked), m.caches).logits) for m in (method, full.method)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-4


def test_it_is_a_column_like_others(asked):
    found = entries({"method": "teacher", "preset": "", "target": "deviation", "label": "deviation",
                     "ratios": (0.1, 0.2)})
    assert [str(e) for e in found] == ["teacher deviation 10%", "teacher deviation 20%"]
    with pytest.raises(BadInput, match="target='luck'"):
        entries({"method": "teacher", "target": "luck"})
