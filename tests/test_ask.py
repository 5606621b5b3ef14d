"""Runs by config that answer a list of questions with several methods."""

import json

import pytest

from cacheclip_jax.errors import BadInput
from configs import ask as config_file
from eval.ask import run

DOCUMENT = "The pilot boat Hesper lies at pier nine. Her skipper is Ada Lund. The spare key hangs in the mess."


def test_every_question_is_answered_by_every_method_once(pair, tmp_path):
    (tmp_path / "harbour.txt").write_text(DOCUMENT, encoding="utf-8")
    questions = [{"question": "Who is the skipper?", "answer": ["Ada"]}, {"question": "Where?", "answer": ["pier"]}]
    (tmp_path / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    config = config_file.get_config()
    config.update({"primary": str(pair[0]), "aux": str(pair[1]), "dtype": "float32", "store": str(tmp_path / "store"),
                   "documents": (str(tmp_path / "harbour.txt"),), "questions": str(tmp_path / "questions.json"),
                   "methods": ("full", "cacheclip"), "max_new_tokens": 2, "out": str(tmp_path / "out" / "ask.jsonl")})
    written = run(config)
    rows = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [(r["question"], r["method"]) for r in rows] == [
        (q["question"], method) for q in questions for method in config.methods]
    assert [r["realised_ratio"] == 1 for r in rows] == [True, False] * 2
    assert all(r["correct"] == any(a.lower() in r["text"].lower() for a in r["accepted"]) for r in rows)
    assert [p.name for p in written.parent.iterdir()] == ["ask.jsonl"]
    with pytest.raises(BadInput, match="exists: name another --config.out"):
        run(config)
