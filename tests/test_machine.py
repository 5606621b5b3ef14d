"""What measurements say of themselves."""

import pytest

from eval.machine import command


@pytest.mark.parametrize("given, told", [
    ("--config.out=/home/me/out/ttft.jsonl", "--config.out=ttft.jsonl"), ("/data/rows.jsonl", "rows.jsonl"),
    ("--config=configs/bench/ttft.py:qwen2.5-7b", "--config=configs/bench/ttft.py:qwen2.5-7b"),
    ("--config.contexts=(8192,)", "--config.contexts=(8192,)")])
def test_a_command_names_no_machines_folders(monkeypatch, given, told):
    monkeypatch.setattr("sys.argv", ["bench_ttft.py", given])
    assert command("eval.bench_ttft") == f"python -m eval.bench_ttft {told}"
