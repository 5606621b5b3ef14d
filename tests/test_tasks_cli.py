"""The command that prints samples, over a byte-level tokenizer on disk."""

import typer
from typer.testing import CliRunner

from cacheclip_jax.model.tokenizer import Tokenizer
from eval.tasks import RULER, Sample, make
from eval.tasks.__main__ import main
from tests.checkpoints import write_pair
from tests.samples import essay

_APP = typer.Typer()
_APP.command()(main)


def test_it_prints_what_make_gives_as_json_lines(tmp_path):
    primary, _ = write_pair(tmp_path)
    tokenizer = Tokenizer.from_directory(primary)
    text = essay(tmp_path / "essay.txt")
    result = CliRunner().invoke(_APP, ["niah_multikey_1", "--length", "1500", "--count", "2", "--tokenizer",
                                       str(primary), "--data", str(text), "--set", "depth=50", "--split", "tune"])
    assert result.exit_code == 0, result.output
    made = make("niah_multikey_1", tokenizer_spans=lambda t: tokenizer.encode(t).spans, length=1500, count=2,
                split="tune", data=text, depth=50)
    assert [Sample.from_json(line) for line in result.output.splitlines()] == made


def test_what_went_wrong_is_one_line_and_exit_code_2(tmp_path):
    primary, _ = write_pair(tmp_path)
    result = CliRunner().invoke(_APP, ["niah_single_7", "--tokenizer", str(primary)])
    assert result.exit_code == 2 and "niah_single_1" in result.output and result.output.count("\n") == 1


def test_generated_tasks_fit_with_a_real_tokenizer_too(tmp_path):
    primary, _ = write_pair(tmp_path)
    tokenizer = Tokenizer.from_directory(primary)
    text = essay(tmp_path / "essay.txt")
    for name in (n for n in RULER if not n.startswith("qa")):
        for sample in make(name, tokenizer_spans=lambda t: tokenizer.encode(t).spans, length=3000, count=1, data=text):
            chunks = [tokenizer.encode(chunk).ids for chunk in sample.context]
            assert max(map(len, chunks)) <= 512 + 8
            assert 2700 < sample.tokens(lambda t: tokenizer.encode(t).spans) <= 3000
