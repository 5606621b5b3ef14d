"""The training job at toy size: loss falls, a killed run resumes exactly, the adapter scores as it was trained."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from cacheclip_jax import CacheClip
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.adapter import load_adapter
from cacheclip_jax.model.load import load_model, load_tokenizer
from cacheclip_jax.prompt import PromptFormat
from cacheclip_jax.store import ChunkStore
from configs.train.corpus import get_config as corpus_config
from configs.train.qwen_coder import get_config
from train import training
from train.curves import read_curves
from train.dataset import batch_of, batches, lessons, read_prompts
from train.devices import data_mesh
from train.example import read_examples
from train.finetune import finetune
from train.forward import stack_layers
from train.settings import settings
from train.student import new_student, score, to_adapter
from train.training import train
from train.verdicts import read_verdicts

NAMES = ("north", "south", "east", "west", "upper", "lower", "inner", "outer", "old", "new", "long", "short")


def document(name: str, number: int) -> str:
    return (f"keeper of the {name} mat: cat {number}\nThe {name} mat is at the {name} end of the hall, and {number} "
            f"cats sat on the mat there. The end of the {name} hall is where the cats of the mat {number} have sat.\n")


@pytest.fixture(scope="module")
def config(pair, tmp_path_factory):
    """A config of the tiny pair and a small corpus, and the run's folder with examples and verdicts in it."""
    folder = tmp_path_factory.mktemp("run")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": document(n, 11 * i + 3)}) + "\n" for i, n in enumerate(NAMES)))
    made = get_config().to_dict() | {
        "data": str(folder), "out": str(folder / "run"), "results": str(folder / "results.jsonl"),
        "primary": str(pair[0]), "aux": str(pair[1]), "dtype": "float32", "devices": 1, "lengths": (384,),
        "question_tokens": 192, "batch": 2, "teacher_batch": 2, "target": "deviation", "min_kl": 0.0, "log_every": 1,
        "checkpoint_every": 3, "peak_flops": 1e12, "benchmark": {"folder": str(folder)},
        "corpus": {"sources": (str(corpus),), "chunk_tokens": 48, "per_passage": 1,
                   "format": {"instructions": "the cats:\n", "question": "{question}"}},
        "teaching": {"answer_tokens": 2, "points": 1}}
    made["optimizing"] |= {"steps": 8, "warmup": 1, "lr": 2e-2, "head_lr": 0.2, "accumulation": 2}
    made["stopping"] |= {"every": 4, "budgets": (0.1, 0.2)}
    finetune(settings(made), until="verdicts")
    return made


@pytest.fixture(scope="module")
def adapter(config):
    """The folder of the finished adapter."""
    return finetune(settings(config), command="a test")


def learnt(config, part):
    run = settings(config)
    asked = read_prompts(read_examples(run.data / "examples.jsonl"), load_tokenizer(run.primary),
                         load_tokenizer(run.aux), run.sizes)
    return [each for each in lessons(asked, read_verdicts(run.data / "verdicts"), run.target) if each.part == part]


def train_in(config, folder):
    run = settings(config | {"out": str(folder)})
    model = load_model(run.aux, dtype=run.dtype)
    return train(run, model, learnt(config, "train"), learnt(config, "holdout"), data_mesh(1), Console(quiet=True))


def test_loss_falls_and_the_run_leaves_a_row_and_curves(config, adapter):
    rows = [row for row in read_curves(adapter.parent) if row["kind"] == "train"]
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    assert list(adapter.parent.glob("tensorboard/events*"))
    row = json.loads(Path(config["results"]).read_text())
    assert row["steps"] == 8 and row["command"] == "a test" and row["mfu"] > 0 and row["tokens_per_s"] > 0
    assert 0 < row["recall_before"]["recall"] < row["recall_ceiling"]["recall"] <= 1
    assert 0 < row["recall_after"]["recall@0.2"] <= 1


def test_a_finished_run_computes_nothing_again(config, adapter, monkeypatch):
    monkeypatch.setattr(training, "train_step", None)
    monkeypatch.setattr("train.verdicts.teach", None)
    before = load_adapter(adapter).digest()
    assert load_adapter(finetune(settings(config))).digest() == before


def test_a_run_that_is_killed_goes_on_bit_by_bit_as_if_it_had_not_been(config, tmp_path, monkeypatch):
    whole = train_in(config, tmp_path / "whole")
    step, calls = training.train_step, []

    def dies_at_the_sixth_step(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(training, "train_step", dies_at_the_sixth_step)
    with pytest.raises(KeyboardInterrupt):
        train_in(config, tmp_path / "killed")
    assert len(read_curves(tmp_path / "killed")) > 5
    resumed = train_in(config, tmp_path / "killed")
    assert len(calls) == 6 + 5  # steps 4 and 5 again, after the checkpoint of step 3
    for one, two in zip(jax.tree.leaves(whole.student), jax.tree.leaves(resumed.student), strict=True):
        assert np.array_equal(one, two)
    curves = [[(row["step"], row["kind"], row.get("loss"), row.get("recall")) for row in read_curves(tmp_path / name)]
              for name in ("whole", "killed")]
    assert curves[0] == curves[1]
    with pytest.raises(BadInput, match="other settings"):
        train_in(config | {"seed": 1}, tmp_path / "killed")


def test_the_adapter_scores_online_as_the_student_did_in_training(config, adapter, pair, tmp_path):
    run = settings(config)
    example = next(e for e in read_examples(run.data / "examples.jsonl") if e.part == "holdout")
    model, lesson = load_model(run.aux, dtype=run.dtype), learnt(config, "holdout")[0]
    student = new_student(jax.random.key(1), model.config, run.design)
    student = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 9, student)
    packed = batch_of([lesson], run.sizes.rows).packed
    trained = score(student, stack_layers(model.params), model.config, run.design, packed, "xla")[0]
    made = to_adapter(student, model, run.design, {})
    clip = CacheClip(model, model, ChunkStore.open(tmp_path / "store"), aux_adapter=made,
                     prompt_format=PromptFormat(example.instructions, "{text}", example.frame))
    online = np.asarray(clip.prefill(example.question, example.chunks).plan.scores)
    start = len(lesson.prompt.prefix)
    assert np.allclose(online, np.asarray(trained)[start : start + len(online)], atol=1e-6)
    assert load_adapter(adapter).base == model.fingerprint


def test_batches_are_the_same_again_from_any_state(config):
    items = learnt(config, "train")

    def take(stream, n):
        return [tuple(each.prompt.ids.tobytes() for each in next(stream)[1]) for _ in range(n)]

    stream = iter(batches(items, 192, 2, seed=5))
    take(stream, 7)
    state = stream.get_state()
    expected = take(stream, 9)
    again = iter(batches(items, 192, 2, seed=5))
    again.set_state(state)
    assert take(again, 9) == expected
    assert take(iter(batches(items, 192, 2, seed=6)), 9) != take(iter(batches(items, 192, 2, seed=5)), 9)


def test_verdicts_resume_after_whole_shards_and_belong_to_one_teacher(config):
    run = settings(config)
    folder = run.data / "verdicts"
    known, shards = read_verdicts(folder), sorted(folder.glob("*.safetensors"))
    shards[-1].unlink()
    left = len(read_verdicts(folder))
    finetune(run, until="verdicts")
    again = read_verdicts(folder)
    assert left < len(known) and set(again) == set(known)
    assert all(np.array_equal(again[key].scores, known[key].scores) for key in known)
    shards[-1].unlink()
    with pytest.raises(BadInput, match="another teacher .*answer_tokens 2 instead of 3"):
        finetune(settings(config | {"teaching": {"answer_tokens": 3, "points": 1}}), until="verdicts")
    finetune(run, until="verdicts")


def test_shipped_configs_are_valid(config):
    for made in (get_config(), corpus_config()):
        assert settings(made.to_dict()).design.rows == "question"


def test_settings_are_refused_by_name(config):
    with pytest.raises(BadInput, match="target='luck'"):
        settings(config | {"target": "luck"})
    with pytest.raises(BadInput, match="loss has no setting 'sharpness'"):
        settings(config | {"loss": {"sharpness": 1}})
    with pytest.raises(BadInput, match="vt: trained on and held out at once"):
        settings(config | {"benchmark": {"folder": ".", "tasks": ("vt",), "holdout": ("vt",)}})
