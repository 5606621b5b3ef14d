"""cacheclip-jax: KV-cache reuse for retrieval-augmented generation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cacheclip_jax.version import __version__

if TYPE_CHECKING:
    from cacheclip_jax.answer import Result, Times
    from cacheclip_jax.decode import Sampling
    from cacheclip_jax.documents import Document
    from cacheclip_jax.engine import CacheClip
    from cacheclip_jax.errors import CacheClipError
    from cacheclip_jax.groups import Groups, Sentences, Windows
    from cacheclip_jax.index import IndexReport
    from cacheclip_jax.prompt import PromptFormat
    from cacheclip_jax.ranking import Ranking
    from cacheclip_jax.score import Scoring
    from cacheclip_jax.select import Budget
    from cacheclip_jax.store import ChunkStore, Passage

_HOMES = {"Result": "answer", "Times": "answer", "Sampling": "decode", "Document": "documents", "CacheClip": "engine",
          "IndexReport": "index", "CacheClipError": "errors", "PromptFormat": "prompt", "Scoring": "score",
          "Budget": "select", "Groups": "groups", "Sentences": "groups", "Windows": "groups", "Ranking": "ranking",
          "ChunkStore": "store", "Passage": "store"}

__all__ = ["Budget", "CacheClip", "CacheClipError", "ChunkStore", "Document", "Groups", "IndexReport", "Passage",
           "PromptFormat", "Ranking", "Result", "Sampling", "Scoring", "Sentences", "Times", "Windows", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on first use: jax and transformers take seconds, which `cacheclip --help` need not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
