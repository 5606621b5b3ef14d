"""load_model: a model's config, weights and tokenizer from a directory, a GGUF file or the hub."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors looks up by name)
import numpy as np
import safetensors
from jax.sharding import Mesh

from cacheclip_jax.attention.choose import Choice, choose
from cacheclip_jax.errors import BadModelFile, UnsupportedModel
from cacheclip_jax.model import gguf, pull
from cacheclip_jax.model.config import ModelConfig, read_config
from cacheclip_jax.model.params import Params, abstract
from cacheclip_jax.model.tensor import Tensor
from cacheclip_jax.model.tokenizer import Tokenizer

# Hugging Face's name of each field of Params and, after "model.layers.<i>.", of Layer.
_TOP = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
_LAYER = {
    "attn_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight",
    "o": "self_attn.o_proj.weight", "down": "mlp.down_proj.weight",
    "o_bias": "self_attn.o_proj.bias", "down_bias": "mlp.down_proj.bias",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
}
_HARMLESS = re.compile(r".*rotary_emb\.inv_freq")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Model:
    """A loaded decoder.

    `fingerprint` names its weights: equal for the same checkpoint on every machine and in every dtype. An adapter may
    bring `question_params`: weights of their own for the rows that score the context.
    """

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    fingerprint: str
    question_params: Params | None = None

    @property
    def asking(self) -> Params:
        """The weights that read a question to score the context."""
        return self.params if self.question_params is None else self.question_params

    @cached_property
    def attention(self) -> Choice:
        """Which implementation of row attention runs this model where its weights are, and why."""
        devices = self.params.embed.sharding.device_set
        device = next(iter(devices))
        return choose(device.platform, getattr(device, "compute_capability", None), self.config.head_dim,
                      self.params.embed.dtype, sharded=len(devices) > 1)


def load_model(source: str | Path, *, dtype: Any, mesh: Mesh | None = None,
               tokenizer: str | Path | None = None) -> Model:
    """Load a model in `dtype`, on the default device or sharded over `mesh`'s axis "model".

    Args:
      source: a Hugging Face directory (safetensors), a .gguf file, a name that was pulled, or a hub id.
      dtype: of the weights: float32, bfloat16 or float16.
      mesh: a mesh with an axis "model".
      tokenizer: another source for the tokenizer alone, where the model's own is missing or slow-only.

    Raises BadModelFile for a missing, truncated, incomplete or non-finite checkpoint, UnsupportedModel naming
    the setting when the decoder would not compute the model exactly.
    """
    path = _locate(source)
    words = _tokenizer(path if tokenizer is None else _locate(tokenizer))
    config, params, fingerprint = load_params(path, dtype, mesh)
    if words.vocab_size > config.vocab_size:
        raise BadModelFile(f"{path}: the tokenizer has {words.vocab_size} ids and the model embeds only "
                           f"{config.vocab_size}: they don't belong together")
    name = str(source)
    if Path(source).expanduser().exists():
        name = path.stem if path.is_file() else path.resolve().name
    return Model(name, config, params, words, fingerprint)


def load_config(source: str | Path) -> ModelConfig:
    """A model's config without its weights, which aren't fetched from the hub either. Raises as `load_model`."""
    path = _locate(source, pull.hub_config)
    return read_config(path) if path.is_dir() else gguf.gguf_config(path)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A model's tokenizer without its weights. Raises as `load_model`."""
    return _tokenizer(_locate(source))


def load_params(path: Path, dtype: Any, mesh: Mesh | None = None) -> tuple[ModelConfig, Params, str]:
    """A directory's or .gguf file's config, weights and fingerprint, without a tokenizer. Raises as `load_model`."""
    if path.is_dir():
        config, tensors = read_config(path), safetensors_tensors(path)
    else:
        config, tensors = gguf.gguf_config(path), gguf.gguf_tensors(path)
    used = _matched(tensors, config, str(path))
    gguf.forget()
    return config, _read_params(used, config, dtype, mesh), _fingerprint(used, config)


def _locate(source: str | Path, fetch: Callable[[str], Path] = pull.hub_snapshot) -> Path:
    path = Path(source).expanduser()
    if path.is_dir() or path.suffix == ".gguf":
        return path
    if path.exists():
        raise BadModelFile(f"{path} isn't a model: give a directory with safetensors, or a .gguf file")
    return pull.stored(str(source)) or fetch(str(source))


def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_directory(path) if path.is_dir() else Tokenizer.from_gguf(path)


def safetensors_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a directory's model.safetensors, or of the shards that its index names.

    Raises BadModelFile for a missing or truncated file, UnsupportedModel for integer or 8-bit weights.
    """
    directory = Path(directory)
    if (directory / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif (index := directory / "model.safetensors.index.json").exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as e:
            raise BadModelFile(f"{index} isn't a safetensors index ({e!r}): fetch it again") from None
    else:
        raise BadModelFile(f"{directory} has neither model.safetensors nor model.safetensors.index.json: "
                           "only safetensors and GGUF weights are read")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise BadModelFile(f"{directory} lacks {', '.join(missing)}, of {len(names)} files: fetch the rest")
    out: dict[str, Tensor] = {}
    for name in names:
        file = directory / name
        try:
            handle = safetensors.safe_open(file, framework="np")
        except (safetensors.SafetensorError, OSError) as e:
            raise BadModelFile(f"{file} is truncated or not safetensors ({file.stat().st_size:,} bytes; "
                               f"{e}): fetch it again") from None
        for key in handle.keys():  # noqa: SIM118  (a handle isn't iterable)
            view = handle.get_slice(key)
            if view.get_dtype() not in _FLOATS and not _HARMLESS.fullmatch(key):
                raise UnsupportedModel(f"{file}: tensor {key} has dtype {view.get_dtype()}, not one of "
                                       f"{', '.join(_FLOATS)}: use the unquantised weights or a GGUF file")
            out[key] = Tensor(file, key, tuple(view.get_shape()), view.__getitem__)
    return out


def _matched(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """The tensors that the model needs; all that is missing, misshapen or left over in one BadModelFile."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree.leaves_with_path(abstract(config, np.float32)):
        for piece in _pieces(path, config, leaf.shape):
            rows = expected.get(piece.name, (0,))[0]
            others = leaf.shape[1:] if piece.part is None else leaf.shape[2:]
            expected[piece.name] = (rows + piece.rows, *others)
    extra = [name for name in tensors if name not in expected and not _HARMLESS.fullmatch(name)]
    if config.tied and _TOP["head"] in extra:
        extra.remove(_TOP["head"])
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "of another shape": [f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
                             for name, shape in expected.items()
                             if name in tensors and tensors[name].shape != shape],
        "not part of the model": extra,
    }
    found = [f"{len(names)} {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
             for what, names in problems.items() if names]
    if found:
        raise BadModelFile(f"{where}: the tensors don't match the config. {'; '.join(found)}. Fetch the "
                           "model again, or check that config and weights belong together")
    return {name: tensors[name] for name in expected}


@dataclass(frozen=True)
class _Piece:
    """Rows of a checkpoint's tensor, and where in a leaf they go; in a leaf of several matrices, in which `part`."""

    name: str
    source: int
    target: int
    rows: int
    part: int | None = None


def _pieces(path: tuple, config: ModelConfig, shape: tuple[int, ...]) -> list[_Piece]:
    """What a leaf of Params is made of: one tensor, for `gate_up` two, or for `qkv` the rows of three, kv head by kv
    head."""
    field = path[-1].name
    if path[0].name != "layers":
        return [_Piece(_TOP[field], 0, 0, shape[0])]
    layer = f"model.layers.{path[1].idx}"
    kind = "bias" if field.endswith("bias") else "weight"
    if field.startswith("gate_up"):
        return [_Piece(f"{layer}.mlp.{name}_proj.{kind}", 0, 0, shape[1], part)
                for part, name in enumerate(("gate", "up"))]
    if not field.startswith("qkv"):
        return [_Piece(f"{layer}.{_LAYER[field]}", 0, 0, shape[0])]
    groups, H = config.num_heads // config.num_kv_heads, config.head_dim
    out = []
    for head in range(config.num_kv_heads):
        target = head * (groups + 2) * H
        for part, count, offset in (("q", groups, 0), ("k", 1, groups), ("v", 1, groups + 1)):
            name = f"{layer}.self_attn.{part}_proj.{kind}"
            out.append(_Piece(name, head * count * H, target + offset * H, count * H))
    return out


def _read_params(tensors: Mapping[str, Tensor], config: ModelConfig, dtype: Any, mesh: Mesh | None) -> Params:
    leaves, tree = jax.tree.flatten_with_path(abstract(config, dtype, mesh))

    def read(path: tuple, leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]) -> np.ndarray:
        extents = [range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
        out = np.empty([len(e) for e in extents], leaf.dtype)
        for piece in _pieces(path, config, leaf.shape):
            part, rows, others = out, extents[0], index[1:]
            if piece.part is not None:
                if piece.part not in extents[0]:
                    continue
                part, rows, others = out[piece.part - extents[0].start], extents[1], index[2:]
            low, high = max(piece.target, rows.start), min(piece.target + piece.rows, rows.stop)
            if low < high:
                shift = piece.source - piece.target
                tensors[piece.name].fill(part[low - rows.start : high - rows.start],
                                         (slice(low + shift, high + shift), *others))
        return out

    def make(path_and_leaf: tuple) -> jax.Array:
        path, leaf = path_and_leaf
        callback = functools.partial(read, path, leaf)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, callback, dtype=leaf.dtype)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return jax.tree.unflatten(tree, pool.map(make, leaves))


def _fingerprint(tensors: Mapping[str, Tensor], config: ModelConfig) -> str:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        first_row = tensor.read((slice(0, 1), *(slice(None) for _ in tensor.shape[1:])))
        digest.update(f"{name}{tensor.shape}".encode() + np.ascontiguousarray(first_row).tobytes())
    return digest.hexdigest()[:16]
