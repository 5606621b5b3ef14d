"""Finetuning of the aux model: examples, the primary's verdict on them, training, the adapter. See docs/finetune.md."""
