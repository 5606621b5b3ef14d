"""Full prefill by transformers + torch SDPA, in a process of its own: what our full prefill is held against.

    python -m eval.torch_prefill qwen2.5-7b 8192,16384 --repeats=5        # random weights at these shapes, on a GPU
    python -m eval.torch_prefill /path/to/model 2000 --device=cpu         # a real checkpoint

Prints a JSON object {tokens: {"median", "min", "max"}} in seconds; its time ends with the first token on the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure and print."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model")
    arguments.add_argument("tokens")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--repeats", type=int, default=5)
    args = arguments.parse_args()
    dtype = getattr(torch, args.dtype)
    if Path(args.model).exists():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa")
    else:
        from eval.synthetic import SHAPES
        cfg = SHAPES[args.model]
        kind = Qwen2Config if cfg.family == "qwen2" else LlamaConfig
        config: Any = kind(vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.d_mlp,
                      num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads,
                      num_key_value_heads=cfg.num_kv_heads, max_position_embeddings=cfg.max_positions,
                      rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tied)
        config._attn_implementation = "sdpa"
        torch.set_default_dtype(dtype)
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.eval().to(args.device)
    out = {}
    with torch.inference_mode():
        for tokens in map(int, args.tokens.split(",")):
            ids = torch.randint(0, 4000, (1, tokens), device=args.device)
            seconds = []
            for _ in range(args.repeats + 2):
                started = time.perf_counter()
                int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
                seconds.append(time.perf_counter() - started)
            seconds = seconds[2:]
            out[tokens] = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
