"""BM25 over a store's passages, by the library bm25s."""

from __future__ import annotations

from collections.abc import Sequence

import bm25s

from cacheclip_jax.errors import BadInput
from cacheclip_jax.store import Passage


class Retriever:
    """Passages ranked by BM25 against a question."""

    def __init__(self, passages: Sequence[Passage]):
        if not passages:
            raise BadInput("the store holds no passages: run cacheclip index first, or pass chunks")
        self._passages = list(passages)
        tokens = bm25s.tokenize([p.text for p in self._passages], stopwords="en", show_progress=False)
        self._index = bm25s.BM25() if any(tokens.ids) else None  # None: no passage has a word that BM25 counts
        if self._index is not None:
            self._index.index(tokens, show_progress=False)

    def top(self, question: str, k: int) -> list[Passage]:
        """The k best passages, best last: next to the question, where models read most carefully."""
        if k < 1:
            raise BadInput(f"{k} passages can't be retrieved: ask for 1 or more")
        if self._index is None:
            return self._passages[:k][::-1]
        query = bm25s.tokenize([question], stopwords="en", show_progress=False)
        rows, _ = self._index.retrieve(query, k=min(k, len(self._passages)), show_progress=False)
        return [self._passages[i] for i in rows[0][::-1]]
