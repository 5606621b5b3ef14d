"""Where everything lies in a store.

    cacheclip.json                      what this is, and its layout
    passages/<2 hex>/<id>.json          text and place of a passage; no model in sight
    documents/<2 hex>/<hash>.json       which passages a document has now (versions.py)
    kv/<space>/space.json               the parts of the space's key, in clear
    kv/<space>/<2 hex>/<chunk>.kv       a chunk cache: one object, written in one atomic write (chunkfile.py)

A namespace has the same below ns/<namespace>/.

An object is there as a whole or not at all, so readers need nothing else to trust it.
"""

import hashlib
import re

from cacheclip_jax.store.records import ID_DIGITS

MARKER = "cacheclip.json"
PASSAGE = re.compile(rf"passages/../([0-9a-f]{{{ID_DIGITS}}})\.json")
DOCUMENT = re.compile(r"documents/../[0-9a-f]{32}\.json")
SPACE = re.compile(r"kv/([0-9a-f]+)/space\.json")
CHUNK = re.compile(r"kv/([0-9a-f]+)/../([0-9a-f]+)\.kv")
# Layout 1 kept a chunk cache in a folder, beside its manifest.
OLD = re.compile(r"kv/([0-9a-f]+)/../([0-9a-f]{32})(\.json|/.*)")


def namespace_folder(namespace: str) -> str:
    return f"ns/{namespace}"


def passage_file(id: str) -> str:
    return f"{passage_stem(id)}.json"


def passage_stem(prefix: str) -> str:
    """What the files of all passages begin with whose ids begin so."""
    return f"passages/{prefix[:2]}/{prefix}" if len(prefix) > 1 else f"passages/{prefix}"


def document_file(document: str) -> str:
    hash = hashlib.sha256(document.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"documents/{hash[:2]}/{hash}.json"


def space_file(space: str) -> str:
    return f"kv/{space}/space.json"


def chunk_file(space: str, chunk: str) -> str:
    return f"kv/{space}/{chunk[:2]}/{chunk}.kv"
