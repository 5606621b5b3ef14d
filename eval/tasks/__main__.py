"""Print a task's samples, one JSON object a line, to look at them.

    python -m eval.tasks niah_multikey_1 --length 4096 --count 2 --tokenizer models/qwen2.5-coder-0.5b --data essays/
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cacheclip_jax.errors import CacheClipError
from cacheclip_jax.model.tokenizer import Tokenizer
from eval.tasks import make


def main(task: Annotated[str, typer.Argument(help="Its name; an unknown one lists them all.")],
         tokenizer: Annotated[Path, typer.Option(help="Directory of a model or tokenizer, or a .gguf file.")],
         length: Annotated[int | None, typer.Option(help="Tokens of prompt and answer at most.")] = None,
         count: Annotated[int | None, typer.Option(help="Samples.")] = 1,
         split: Annotated[str, typer.Option(help="tune, report or all.")] = "report",
         seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
         data: Annotated[Path | None, typer.Option(help="The file the task reads.")] = None,
         set_: Annotated[list[str] | None, typer.Option("--set", help="A setting, name=JSON value.")] = None) -> None:
    """Print samples as JSON lines; what went wrong goes to stderr, with exit code 2."""
    try:
        settings = {name: _value(text) for name, _, text in (item.partition("=") for item in set_ or ())}
        load = Tokenizer.from_gguf if tokenizer.suffix == ".gguf" else Tokenizer.from_directory
        words = load(tokenizer)
        for sample in make(task, tokenizer_spans=lambda text: words.encode(text).spans, length=length, count=count,
                           split=split, seed=seed, data=data, **settings):  # type: ignore[arg-type]
            print(sample.to_json())
    except CacheClipError as e:
        print(f"error: {e}", file=sys.stderr)
        raise typer.Exit(2) from None


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    typer.run(main)
