"""Models with random weights at real shapes, and text of any length for them: what speed is measured on.

A token is one Chinese character of a fixed alphabet, so that a text's length in tokens is its length.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from cacheclip_jax.model.config import Llama3Scaling, ModelConfig, Rope
from cacheclip_jax.model.load import Model
from cacheclip_jax.model.params import init
from cacheclip_jax.model.tokenizer import Tokenizer
from cacheclip_jax.prompt import PromptFormat
from cacheclip_jax.store import Passage

_QWEN: dict[str, Any] = dict(family="qwen2", qkv_bias=True, rope=Rope(1e6), norm_eps=1e-6, max_positions=131072,
                             head_dim=128)
_LLAMA3 = Rope(5e5, llama3=Llama3Scaling(8.0, 1.0, 4.0, 8192))

SHAPES = {
    "qwen2.5-14b": ModelConfig(num_layers=48, d_model=5120, d_mlp=13824, num_heads=40, num_kv_heads=8,
                               vocab_size=152064, tied=False, **_QWEN),
    "qwen2.5-7b": ModelConfig(num_layers=28, d_model=3584, d_mlp=18944, num_heads=28, num_kv_heads=4,
                              vocab_size=152064, tied=False, **_QWEN),
    "qwen2.5-1.5b": ModelConfig(num_layers=28, d_model=1536, d_mlp=8960, num_heads=12, num_kv_heads=2,
                                vocab_size=151936, tied=True, **_QWEN),
    "qwen2.5-0.5b": ModelConfig(num_layers=24, d_model=896, d_mlp=4864, num_heads=14, num_kv_heads=2,
                                vocab_size=151936, tied=True, **_QWEN | {"head_dim": 64}),
    "llama-3.1-8b": ModelConfig("llama", num_layers=32, d_model=4096, d_mlp=14336, num_heads=32, num_kv_heads=8,
                                head_dim=128, vocab_size=128256, rope=_LLAMA3, norm_eps=1e-5, max_positions=131072,
                                tied=False),
}

FORMAT = PromptFormat(instructions="\u4e00" * 32, chunk="{text}", question="{question}")
_ALPHABET = [chr(0x4E00 + i) for i in range(4096)]


def random_model(name: str, dtype: str = "bfloat16", device: jax.Device | None = None) -> Model:
    """A model of SHAPES with random weights; equal for equal names, so that its chunk caches are found again."""
    cfg = SHAPES[name]
    with jax.default_device(device):
        params = init(jax.random.key(0), cfg, dtype)
        if device is not None:
            params = jax.device_put(params, device)
    return Model(f"random-{name}", cfg, params, tokenizer(), hashlib.sha256(name.encode()).hexdigest()[:16])


def tokenizer() -> Tokenizer:
    """One token for each character of the alphabet; no chat template and no end token, so that answers run on."""
    vocab = {c: i for i, c in enumerate(_ALPHABET)}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[])))
    with TemporaryDirectory() as directory:
        fast.save_pretrained(directory)
        return Tokenizer.from_directory(Path(directory))


def passages(tokens: int, chunk_tokens: int, seed: int = 0) -> list[Passage]:
    """Random passages of `chunk_tokens` tokens, as many as make up `tokens`."""
    return [Passage.make(text(chunk_tokens, seed * 1_000_003 + i)) for i in range(tokens // chunk_tokens)]


def text(tokens: int, seed: int) -> str:
    """Random text of a number of tokens."""
    return "".join(np.random.default_rng(seed).choice(_ALPHABET, tokens))
