"""Answer a list of questions with several methods, by config; one JSON line each. See configs/ask.py."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict
from rich.progress import track

from cacheclip_jax import Budget, CacheClip, Scoring
from cacheclip_jax.demo import CORPUS, contains
from cacheclip_jax.documents import read_documents
from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods import AuxGuided, Method, make, takes_budget
from cacheclip_jax.model.pull import MODELS, pull
from eval.ledger import rows_into
from eval.script import start


def run(config) -> Path:
    """Index, ask, write; returns the file. Refuses to overwrite a finished run."""
    target = Path(config.out)
    if target.exists():
        raise BadInput(f"{target} exists: name another --config.out, or delete it")
    for name in {config.primary, config.aux} & set(MODELS):
        pull(name)
    clip = CacheClip.load(config.primary, config.aux, config.store, dtype=config.dtype)
    sources = [str(CORPUS) if d == "demo" else d for d in config.documents]
    clip.index(read_documents(sources), chunk_tokens=config.chunk_tokens)
    questions = CORPUS / "questions.json" if config.questions == "demo" else Path(config.questions)
    items = json.loads(questions.read_text(encoding="utf-8"))
    with rows_into(target) as write:
        for item in track(items, "asking"):
            chunks = clip.retrieve(item["question"], config.passages)
            for name in config.methods:
                result = clip.ask(item["question"], chunks, method=configured(config, name),
                                  max_new_tokens=config.max_new_tokens)
                row = {"question": item["question"], "accepted": item["answer"], **result.to_dict()}
                write({**row, "correct": contains(result.text, item["answer"])})
    return target


def configured(config, name: str) -> Method:
    """A method by name with the run's ratio and scoring."""
    budget = Budget(ratio=config.ratio)
    if name != "cacheclip":
        return make(name, budget if takes_budget(name) else None)
    settings = dict(config.scoring)
    if not isinstance(settings["layers"], str):
        settings["layers"] = tuple(settings["layers"])
    return AuxGuided(budget, Scoring(**settings))


def main(config: ConfigDict) -> None:
    """The script."""
    print(run(config))


if __name__ == "__main__":
    start(main, "What to run, see configs/ask.py.")
