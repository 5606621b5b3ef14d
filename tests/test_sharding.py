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
assert split.layers[0].gate_up.sharding.spec[1] == "model" and len(split.layers[0].gate_up.addressable_shards) == 2
assert np.array_equal(np.asarray(alone.layers[0].gate_up), np.asarray(split.layers[0].gate_up))
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
    run(PROGRAM.replace("{family}", family))


def run(program: str) -> None:
    """Run a program that prints "same", on two devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


TRAINING = """
import jax, jax.numpy as jnp, numpy as np
from cacheclip_jax.model.params import init
from tests.conftest import TINY, max_diff
from tests.test_train_forward import ROWS, SLOTS, prompt_of
from train.dataset import Batch
from train.devices import data_mesh, replicate, spread
from train.forward import stack_layers
from train.losses import Loss
from train.optimizer import Optimizing
from train.packed import pack, stack
from train.student import Design, new_student
from train.training import train_step
cfg, design, move = TINY["qwen2"], Design(), Optimizing(steps=9, warmup=0).make()
params = init(jax.random.key(7), cfg)
packed = stack([pack(prompt_of(cfg, seed=seed), SLOTS, ROWS) for seed in range(2)])
target = np.where(packed.context, np.random.default_rng(0).exponential(size=packed.ids.shape), 0).astype(np.float32)
found = []
for devices in (1, 2):
    mesh = data_mesh(devices)
    student = new_student(jax.random.key(0), cfg, design)
    student, optimizer, weights = replicate((student, move.init(student), stack_layers(params)), mesh)
    batch = spread(Batch(packed, target), mesh)
    assert len(batch.target.sharding.device_set) == devices
    found.append(train_step(student, optimizer, weights, batch, cfg, design, Loss(), move, "xla")[0])
    found[-1] = jax.tree.map(np.asarray, found[-1])
assert max_diff(found[0].heads, found[1].heads) < 1e-5 and max_diff(found[0].lora.q.b, found[1].lora.q.b) < 1e-5
assert max_diff(found[0].lora.q.b, 0) > 0
print("same")
"""


def test_a_training_step_does_not_depend_on_the_number_of_devices():
    run(TRAINING)
