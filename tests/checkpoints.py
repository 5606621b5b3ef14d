"""Tiny checkpoints on disk: random weights under Hugging Face names, as safetensors or GGUF, and a tokenizer."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

D, F, H, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 16, 4, 2, 2, 320

QWEN2 = {
    "model_type": "qwen2", "num_hidden_layers": LAYERS, "hidden_size": D, "intermediate_size": F,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": 1,
}
LLAMA = QWEN2 | {"model_type": "llama", "tie_word_embeddings": True}

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def weights(raw: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights of a config.json's model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, D)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        rows = {"q": HEADS * H, "k": KV_HEADS * H, "v": KV_HEADS * H}
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (n, D) for p, n in rows.items()}
        if raw["model_type"] == "qwen2":
            shapes |= {f"{layer}.self_attn.{p}_proj.bias": (n,) for p, n in rows.items()}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (D, HEADS * H), f"{layer}.input_layernorm.weight": (D,),
                   f"{layer}.post_attention_layernorm.weight": (D,), f"{layer}.mlp.gate_proj.weight": (F, D),
                   f"{layer}.mlp.up_proj.weight": (F, D), f"{layer}.mlp.down_proj.weight": (D, F)}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@functools.cache
def bpe(added: tuple[str, ...] = SPECIAL) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of some 280 tokens with Qwen's way of splitting."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat sat on the mat, the end"] * 9, trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def write_tokenizer(directory: Path, **config: Any) -> None:
    """Write tokenizer.json, tokenizer_config.json (ChatML unless `config` says otherwise)."""
    bpe().save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": None,
              "add_bos_token": False, "chat_template": CHATML} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_directory(directory: Path, raw: dict[str, Any], tensors: dict[str, np.ndarray],
                    shards: int = 1) -> Path:
    """Write a Hugging Face directory, its weights in one file or in several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    write_tokenizer(directory)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: w for n, w in tensors.items() if files[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return directory


def write_pair(directory: Path, positions: int = 512) -> tuple[Path, Path]:
    """Write a primary and an aux model of so many positions, whose tokenizers split words differently.

    The weights are small enough for smooth attention, and large enough that a chunk reads otherwise alone.
    """
    def smooth(raw: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
        return {name: 1 + w / 10 if "norm" in name else w * np.float32(0.3) for name, w in weights(raw, seed).items()}

    longer = {"max_position_embeddings": positions}
    primary = write_directory(directory / "primary", QWEN2 | longer, smooth(QWEN2, 0))
    aux = write_directory(directory / "aux", LLAMA | longer, smooth(LLAMA, 1))
    content = json.loads(bpe().to_str())
    del content["model"]["merges"][4:]
    (aux / "tokenizer.json").write_text(json.dumps(content))
    return primary, aux


_PARTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "mlp.gate_proj": "ffn_gate",
          "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
          "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
          "model.layers": "blk"}


def write_gguf(path: Path, raw: dict[str, Any], tensors: dict[str, np.ndarray], pre: str = "qwen2",
               kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32, **settings: Any) -> Path:
    """Write a GGUF file with matrices of type `kind`; `settings` are further keys, with "__" for "."."""
    arch = raw["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(raw["rope_theta"])
    for key, value in settings.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{arch}.{key.replace('__', '.')}", value)
    content = json.loads(bpe().to_str())
    tokens = sorted(bpe().get_vocab(), key=bpe().get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in SPECIAL else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(CHATML)
    for name, w in tensors.items():
        stored = name
        for hf, short in _PARTS.items():
            stored = stored.replace(hf, short)
        if arch == "llama" and ("attn_q" in stored or "attn_k" in stored):
            heads = HEADS if "attn_q" in stored else KV_HEADS
            w = w.reshape(heads, 2, H // 2, -1).swapaxes(1, 2).reshape(w.shape)  # as llama.cpp's converter does
        if w.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(stored, w)
        else:
            writer.add_tensor(stored, gguf.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
