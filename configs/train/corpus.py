"""Finetune an aux model on your own documents, for your own pair.

    python -m train.finetune --config configs/train/corpus.py --config.corpus.sources "('docs/',)" \
        --config.primary MODEL --config.aux MODEL

`corpus.format` is the prompt format that you deploy (see `PromptFormat`): chunk caches are encoded behind its
instructions. `corpus.questions` may name a .jsonl file of your users' questions, {"question": ...} a line.
"""

from ml_collections import ConfigDict

from configs.train.qwen_coder import get_config as qwen_coder


def get_config() -> ConfigDict:
    """The settings of the Qwen run, over documents instead of benchmark tasks."""
    config = qwen_coder()
    config.data, config.out = "runs/finetune/corpus", "runs/finetune/corpus/influence"
    config.benchmark.tasks = config.benchmark.holdout = ()
    config.lengths = (4096,)
    config.peak_flops = 0.0  # your device's, operations per second in config.dtype, for MFU
    return config
