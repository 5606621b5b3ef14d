"""cacheclip-jax: KV-cache reuse for retrieval-augmented generation."""

from cacheclip_jax.answer import Result, Times
from cacheclip_jax.decode import Sampling
from cacheclip_jax.documents import Document
from cacheclip_jax.engine import CacheClip, IndexReport
from cacheclip_jax.errors import CacheClipError
from cacheclip_jax.prompt import PromptFormat
from cacheclip_jax.score import Scoring
from cacheclip_jax.select import Budget, Groups, Windows
from cacheclip_jax.store import ChunkStore, Passage
from cacheclip_jax.version import __version__

__all__ = ["Budget", "CacheClip", "CacheClipError", "ChunkStore", "Document", "Groups", "IndexReport", "Passage",
           "PromptFormat", "Result", "Sampling", "Scoring", "Times", "Windows", "__version__"]
