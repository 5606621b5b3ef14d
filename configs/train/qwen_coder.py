"""Finetune Qwen2.5-Coder-0.5B to choose tokens for Qwen2.5-Coder-1.5B, on benchmark tasks of the tuning half.

    python -m train.finetune --config configs/train/qwen_coder.py --config.benchmark.folder DATA

DATA holds the files that `train/benchmark.py` names. Tasks are held out whole: recall is measured on kinds of questions
that were never trained on. `--config.until=examples` needs no accelerator.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from cacheclip_jax.prompt import PromptFormat


def get_config() -> ConfigDict:
    """The whole run; every setting is explained where its dataclass is, see train/settings.py."""
    return ConfigDict({
        "data": "runs/finetune/qwen-coder", "out": "runs/finetune/qwen-coder/influence",
        "results": "results/finetune.jsonl", "until": "adapter",
        "primary": "qwen2.5-coder-1.5b", "aux": "qwen2.5-coder-0.5b", "dtype": "bfloat16", "seed": 0, "devices": 0,
        "lengths": (2048, 4096), "question_tokens": 128, "batch": 8, "teacher_batch": 4,
        "target": "influence", "min_kl": 0.01,
        "log_every": 25, "checkpoint_every": 100, "peak_flops": 989e12,  # an H100 SXM, bf16 without sparsity
        "benchmark": {
            "folder": "../shared/data",
            "tasks": ("niah_single_1", "niah_multikey_1", "niah_multikey_3", "niah_multivalue", "vt", "cwe", "kv",
                      "nq"),
            "holdout": ("niah_single_2", "niah_multikey_2", "niah_multiquery", "fwe", "qa_1", "hotpotqa"),
            "per_task": 80, "holdout_per_task": 12, "chunk_tokens": 512,
        },
        "corpus": {"sources": (), "questions": "", "chunk_tokens": 256, "per_passage": 2,
                   "format": asdict(PromptFormat())},
        "teaching": {"layers": "all", "answer_tokens": 8, "points": 3},
        "design": {"layers": "all", "context": "cached", "lora_layers": "all", "parts": ("q",), "rank": 16,
                   "alpha": 32.0, "rows": "question"},
        "loss": {"kl": 1.0, "ranking": 0.0, "recall": 1.0, "temperature": 2.0, "budgets": (0.02, 0.05, 0.1, 0.2),
                 "softness": 0.3},
        "optimizing": {"steps": 1200, "lr": 1e-3, "head_lr": 3e-2, "warmup": 50, "clip": 1.0, "weight_decay": 0.0,
                       "accumulation": 1},
        "stopping": {"every": 50, "patience": 8, "budgets": (0.02, 0.05, 0.1, 0.2)},
    })
