"""A model split over devices computes what it computes on one."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, numpy as np
from cacheclip_jax.encode import encode_many, encode_prefix
from cacheclip_jax.model.params import init
from tests.conftest import TINY, assembled, max_diff, random_prompt, rows
cfg = TINY["{family}"]
devices = np.array(jax.devices("cpu")[:2])
assert len(devices) == 2
alone = init(jax.random.key(7), cfg)
split = init(jax.random.key(7), cfg, mesh=jax.make_mesh((2,), ("model",), devices=devices))
assert split.layers[0].gate.sharding.spec[0] == "model" and len(split.layers[0].gate.addressable_shards) == 2
assert np.array_equal(np.asarray(alone.layers[0].gate), np.asarray(split.layers[0].gate))
prefix, *chunks, question = random_prompt(cfg)
positions = np.concatenate([[7, 8, 40, 41], np.arange(76, 85)])
ids = np.concatenate([prefix, *chunks, question])
logits = []
for params in (alone, split):
    cache = assembled(params, cfg, prefix, chunks, 128)
    logits.append(rows(params, cfg, ids[positions], positions, cache)[0])
assert max_diff(*logits) < 1e-4, max_diff(*logits)
print("same")
"""


@pytest.mark.parametrize("family", ["qwen2", "smollm2", "mistral"])  # 2 kv heads are split, 3 and 1 are replicated
def test_logits_do_not_depend_on_the_number_of_devices(family):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM.replace("{family}", family)], env=environment, check=False,
                          capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
