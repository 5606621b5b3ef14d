"""GGUF files: config, tensors under Hugging Face names (dequantised as they are read) and tokenizer files."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from cacheclip_jax.errors import BadModelFile, UnsupportedModel
from cacheclip_jax.model.config import ModelConfig, from_hf
from cacheclip_jax.model.tensor import Tensor

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}

# Settings that change the arithmetic: the values that mean "not in use", by name after the architecture's.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "rope.scaling.type": ("none",),
    "rope.scale_linear": (1,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
}


@dataclasses.dataclass(frozen=True)
class _File:
    meta: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]

    @property
    def arch(self) -> str:
        return self.meta["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        return self.meta.get(f"{self.arch}.{key}", default)


class _Reader(gguf.GGUFReader):
    # A memmap's slices cost several times a plain array's over the same mapping, and a vocabulary takes 1e6.
    @property
    def data(self) -> Any:
        return self._plain

    @data.setter
    def data(self, mapped: Any) -> None:
        self._plain = np.asarray(mapped)


def _open(path: Path) -> _File:
    path = Path(path)
    try:
        stat = path.stat()
    except OSError as e:
        raise BadModelFile(f"{path} can't be read: {e.strerror}") from None
    return _parse(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # parsing takes seconds, and a load asks for config, weights and tokenizer
def _parse(path: Path, size: int, changed_ns: int) -> _File:
    try:
        reader = _Reader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {t.name: t for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as e:
        raise BadModelFile(f"{path} isn't a whole GGUF file ({size:,} bytes; {e}): fetch it again") from None
    if "general.architecture" not in meta:
        raise BadModelFile(f"{path} names no architecture (general.architecture): convert the model again")
    return _File(meta, tensors)


def forget() -> None:
    """Let go of the file that was read last, so that deleting it frees its space."""
    _parse.cache_clear()


def gguf_config(path: Path) -> ModelConfig:
    """The config of a GGUF file's model.

    Raises UnsupportedModel naming the setting when the decoder would not compute this model exactly,
    BadModelFile when the file is truncated, incomplete or not GGUF.
    """
    file = _open(path)
    cfg = from_hf(_hf_config(path), str(path))
    divisors = file.tensors.get("rope_freqs.weight")
    return dataclasses.replace(
        cfg,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        rope=cfg.rope if divisors is None else dataclasses.replace(
            cfg.rope, divisors=tuple(float(x) for x in divisors.data)),
    )


def _hf_config(path: Path) -> dict[str, Any]:
    file = _open(path)
    _refuse(file, path)
    needed = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
              "context_length", "attention.layer_norm_rms_epsilon")
    missing = [f"{file.arch}.{key}" for key in needed if file.get(key) is None]
    missing += [] if "token_embd.weight" in file.tensors else ["token_embd.weight"]
    if missing:
        raise BadModelFile(f"{path} lacks {', '.join(missing)}: convert the model again")
    heads, width = file.get("attention.head_count"), file.get("embedding_length")

    def short(x: float) -> float:  # a float32's 9.99999997e-07 back to the 1e-06 that was meant
        return float(f"{x:.6g}")

    return {
        "architectures": [_ARCHITECTURES[file.arch]],
        "model_type": file.arch,
        "transformers_version": "5.0.0",  # the layout of these files; without it transformers suspects an old tokenizer
        "hidden_act": "silu",
        "num_hidden_layers": file.get("block_count"),
        "hidden_size": width,
        "intermediate_size": file.get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv", heads),
        "head_dim": file.get("attention.key_length", width // heads),
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": file.get("context_length"),
        "rms_norm_eps": short(file.get("attention.layer_norm_rms_epsilon")),
        "rope_theta": short(file.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.meta.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
    }


def _refuse(file: _File, path: Path) -> None:
    def refuse(setting: str, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"{path}: {setting} isn't supported ({why}). Supported GGUF architectures: "
                                f"{', '.join(_ARCHITECTURES)}, dense, with full attention and unscaled RoPE.")

    if file.arch not in _ARCHITECTURES:
        raise refuse(f"general.architecture {file.arch!r}", "its arithmetic isn't implemented")
    if file.meta.get("split.count", 1) > 1:
        raise refuse(f"split.count={file.meta['split.count']}", "merge the parts with llama-gguf-split first")
    for key, allowed in _NEUTRAL.items():
        if (value := file.get(key)) is not None and value not in allowed:
            raise refuse(f"{file.arch}.{key}={value!r}", "it changes the model's arithmetic")
    window = file.get("attention.sliding_window", 0)
    if isinstance(window, list) or 0 < window < file.get("context_length", 0):
        raise refuse(f"{file.arch}.attention.sliding_window={window}", "a sliding window is in use")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(file.get(key), list):
            raise refuse(f"{file.arch}.{key} that varies by layer", "all layers must have the same shape")
    heads = file.get("attention.head_count")
    head_dim = file.get("attention.key_length") or (heads and file.get("embedding_length", 0) // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if file.get(key, head_dim) != head_dim:
            raise refuse(f"{file.arch}.{key}={file.get(key)}", f"only the head's full width {head_dim}")


def gguf_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a GGUF file by Hugging Face name, memory-mapped; reading rows dequantises just those.

    Q and K of architecture `llama` come back in Hugging Face's order of rows; unknown tensors keep their GGUF
    name. Raises UnsupportedModel for a tensor type that can't be dequantised, BadModelFile for a broken file.
    """
    file = _open(path)
    for kind, t in {t.tensor_type: t for t in file.tensors.values()}.items():
        try:
            gguf.dequantize(t.data[:1], kind)
        except NotImplementedError:
            raise UnsupportedModel(
                f"{path}: tensor {t.name} has type {kind.name}, which can't be dequantised: use another "
                "quantisation of this model, such as Q8_0, Q4_K_M or BF16") from None
    heads = {"attn_q": file.get("attention.head_count"), "attn_k": file.get("attention.head_count_kv")}
    heads["attn_k"] = heads["attn_k"] or heads["attn_q"]
    out = {}
    for name, t in file.tensors.items():
        if name == "rope_freqs.weight":
            continue  # part of the config
        permuted = heads.get(name.split(".")[-2]) if file.arch == "llama" else None
        out[_hf_name(name)] = _tensor(Path(path), t, permuted)
    return out


def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"
    return name


def _tensor(path: Path, t: gguf.ReaderTensor, permuted_heads: int | None) -> Tensor:
    shape = tuple(int(n) for n in reversed(t.shape))
    order = None
    if permuted_heads:
        # llama.cpp interleaves each head's halves for its RoPE: row (head, half, i) lies at (head, i, half).
        order = np.arange(shape[0]).reshape(permuted_heads, -1, 2).swapaxes(1, 2).ravel()

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if len(shape) == 1:
            values = gguf.dequantize(t.data, t.tensor_type)
            return values[index] if order is None else values[order[index[0]]]
        rows = t.data[index[0]] if order is None else t.data[order[index[0]]]
        return gguf.dequantize(rows, t.tensor_type)[(slice(None), *index[1:])]

    return Tensor(path, t.name, shape, read)


_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _split(digits: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": _SPLIT % digits}, "behavior": "Isolated", "invert": False}


# By GGUF's tokenizer.ggml.pre: normalizer, pre-tokenizers, whether whole words are looked up before merging.
_PRE_TOKENIZERS: dict[str, tuple[dict | None, list[dict], bool]] = {
    "qwen2": ({"type": "NFC"}, [_split(r"\p{N}"), _BYTES], False),
    "llama-bpe": (None, [_split(r"\p{N}{1,3}"), _BYTES], True),
    "smollm": (None, [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}], False),
}
_NORMAL, _CONTROL, _USER_DEFINED = _IN_USE = 1, 3, 4  # kinds of token; the others pad the vocabulary
_END_OF_TURN = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


def gguf_tokenizer_files(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of tokenizer.json and tokenizer_config.json, rebuilt from a GGUF file's metadata.

    Raises UnsupportedModel for a pre-tokenizer other than qwen2, smollm and llama-bpe.
    """
    file = _open(path)
    meta = file.meta
    pre = meta.get("tokenizer.ggml.pre")
    if meta.get("tokenizer.ggml.model") != "gpt2" or pre not in _PRE_TOKENIZERS:
        kind = f"{meta.get('tokenizer.ggml.model')!r}, pre-tokenizer {pre!r}"
        raise UnsupportedModel(f"{path}: its tokenizer ({kind}) can't be rebuilt from GGUF, only the kinds "
                               f"{', '.join(_PRE_TOKENIZERS)}: pass a directory with tokenizer.json instead")
    normalizer, steps, whole_words = _PRE_TOKENIZERS[pre]
    kinds = meta["tokenizer.ggml.token_type"]
    tokens = list(zip(meta["tokenizer.ggml.tokens"], range(len(kinds)), kinds, strict=True))
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": kind == _CONTROL}
             for token, i, kind in tokens if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": whole_words,
                  # Added tokens too: the tokenizers library would number those it doesn't find here anew.
                  "vocab": {token: i for token, i, kind in tokens if kind in _IN_USE},
                  "merges": [m.split(" ") for m in meta["tokenizer.ggml.merges"]]},
    }

    def named(role: str) -> str | None:
        i = meta.get(f"tokenizer.ggml.{role}_token_id")
        return None if i is None else tokens[i][0]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "add_bos_token": meta.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"),
        # Qwen's GGUF files name a bos token that its tokenizer doesn't have.
        "bos_token": None if pre == "qwen2" else named("bos"),
        "eos_token": named("eos"), "unk_token": named("unknown"), "pad_token": named("padding"),
        "model_max_length": file.get("context_length"),
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    return tokenizer, config


def gguf_eos_ids(path: Path) -> tuple[int, ...]:
    """The ids that end an answer: the file's eos, eot and eom tokens and the tokens known to end a turn."""
    meta = _open(path).meta
    ids: set[int] = {meta[key] for role in ("eos", "eot", "eom")
                     if (key := f"tokenizer.ggml.{role}_token_id") in meta}
    pairs = zip(meta.get("tokenizer.ggml.tokens", ()), meta.get("tokenizer.ggml.token_type", ()), strict=True)
    ids |= {i for i, (token, kind) in enumerate(pairs) if kind == _CONTROL and token in _END_OF_TURN}
    return tuple(sorted(ids))


def write_json_files(path: Path, directory: Path) -> None:
    """Write a GGUF file's config.json, generation_config.json, tokenizer.json and tokenizer_config.json."""
    tokenizer, tokenizer_config = gguf_tokenizer_files(path)
    for name, content in {
        "config.json": _hf_config(path),
        "generation_config.json": {"do_sample": False, "eos_token_id": list(gguf_eos_ids(path))},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
    }.items():
        indent = None if name == "tokenizer.json" else 2
        text = json.dumps(content, ensure_ascii=False, indent=indent)
        (Path(directory) / name).write_text(text, encoding="utf-8")
