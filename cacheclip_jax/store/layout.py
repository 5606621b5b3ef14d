"""Where everything lies in a store, and how a chunk cache is laid out in its array.

    cacheclip.json                                what this is, and its layout
    passages/<2 hex>/<id>.json                    text and place of a passage; no model in sight
    kv/<space>/space.json                         the parts of the space's key, in clear
    kv/<space>/<2 hex>/<chunk>/                   K before RoPE and V as zarr3 [L, 2, K, C, H]
    kv/<space>/<2 hex>/<chunk>.json               the manifest

A chunk's array is one object with one checksummed part per layer. Its manifest is written last, in one atomic
write, and readers trust nothing else: data without a manifest was never there.
"""

import re

from cacheclip_jax.store.records import ID_DIGITS, Space

MARKER = "cacheclip.json"
PASSAGE = re.compile(rf"passages/../([0-9a-f]{{{ID_DIGITS}}})\.json")
SPACE = re.compile(r"kv/([0-9a-f]+)/space\.json")
MANIFEST = re.compile(r"kv/([0-9a-f]+)/../([0-9a-f]+)\.json")
DATA = re.compile(r"kv/([0-9a-f]+)/../([0-9a-f]+)/.*")


def passage_file(id: str) -> str:
    return f"{passage_stem(id)}.json"


def passage_stem(prefix: str) -> str:
    """What the files of all passages begin with whose ids begin so."""
    return f"passages/{prefix[:2]}/{prefix}" if len(prefix) > 1 else f"passages/{prefix}"


def space_file(space: str) -> str:
    return f"kv/{space}/space.json"


def chunk_folder(space: str, chunk: str) -> str:
    return f"kv/{space}/{chunk[:2]}/{chunk}"


def manifest_file(space: str, chunk: str) -> str:
    return f"{chunk_folder(space, chunk)}.json"


def metadata_file(space: str, chunk: str) -> str:
    return f"{chunk_folder(space, chunk)}/zarr.json"


def metadata(space: Space, tokens: int) -> dict:
    """The zarr3 metadata of a chunk cache."""
    shape = list(space.shape(tokens))
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [1, *shape[1:]],
        "codecs": codecs,
        "index_codecs": codecs,
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": space.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
