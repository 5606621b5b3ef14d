"""Tokenizer: text to ids with character spans and back, and the chat template cut where the passages go."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers
from jaxtyping import Bool, Int

# transformers is here for its tokenizers: that it finds no torch is no news to the user.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
from transformers import PreTrainedTokenizerFast

from cacheclip_jax.errors import BadInput, BadModelFile, UnsupportedModel
from cacheclip_jax.model.gguf import write_json_files

_SENTINEL = "\ue000passages\ue000"
# What two tokenizers with the same vocabulary may still split differently.
_PROBE = "It's 12345 ways\n\n  to  split: naïve, 漢字, I'LL\t{x+=1};  \r\n"
_SENTENCE_END = re.compile(r"""(?<![.!?])[.!?]++["')\]\u201d\u2019\u00bb]*+\s+|[\u3002\uff01\uff1f]+|\n\s*""")
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Encoded:
    """A text's tokens: `ids`, and for each its span of characters in the text.

    Spans cover the text from start to end without gaps; tokens that share a character have overlapping spans.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    text: str

    @functools.cached_property
    def sentence_starts(self) -> Int[np.ndarray, "M"]:
        """The first token of each sentence: the one that holds its first character."""
        firsts = [m.end() for m in _SENTENCE_END.finditer(self.text) if m.end() < len(self.text)]
        starts = np.array([start for start, _ in self.spans], np.int64)
        # Of several tokens for one character it's the first one.
        begins = starts[np.searchsorted(starts, firsts, side="right") - 1]
        return np.unique(np.concatenate([[0], np.searchsorted(starts, begins)]))

    @functools.cached_property
    def sentence_lengths(self) -> Int[np.ndarray, "M"]:
        """Tokens of each sentence."""
        return np.diff(self.sentence_starts, append=len(self.ids))

    @functools.cached_property
    def formatting(self) -> Bool[np.ndarray, "C"]:
        """Which tokens have neither a letter nor a digit: white space, line ends, punctuation, symbols."""
        marks = np.zeros(len(self.text) + 1, np.int64)
        for word in _WORD.finditer(self.text):
            marks[word.start() : word.end()] = 1
        before = np.concatenate([[0], np.cumsum(marks)])
        start, end = np.array(self.spans, np.int64).reshape(-1, 2).T
        return before[np.maximum(end, start + 1)] == before[start]

    @functools.cached_property
    def array(self) -> np.ndarray:
        """The ids, int32."""
        return np.array(self.ids, np.int32)


def nfc(text: str) -> str:
    """`text` in Unicode's composed form, which is what tokenizers see: spans count its characters."""
    return unicodedata.normalize("NFC", text)


class Tokenizer:
    """A model's tokenizer. Plain text never becomes a control token, whatever it contains.

    Attributes: `eos_ids`, the ids that end an answer; `vocab_size`, one more than the largest id; `identity`,
    a hash that two tokenizers share when they have the same vocabulary, merges and way of splitting.
    """

    def __init__(self, fast: PreTrainedTokenizerFast, eos_ids: Sequence[int] = (),
                 add_bos: bool | None = None):
        content = json.loads(fast.backend_tokenizer.to_str())
        if (kind := content["model"]["type"]) != "BPE":
            raise UnsupportedModel(f"{fast.name_or_path}: its tokenizer is {kind}; only BPE is supported")
        # Post-processors add special tokens and trim spaces off the spans: neither is wanted.
        content |= {"post_processor": None, "truncation": None, "padding": None}
        self._fast = fast
        self._special = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(_without_added_tokens(content)))
        vocab = fast.get_vocab()
        own = {fast.eos_token_id} - {None}
        self.eos_ids: tuple[int, ...] = tuple(sorted(own | set(eos_ids)))
        self.vocab_size: int = max(vocab.values()) + 1
        probe = self._plain.encode(_PROBE, add_special_tokens=False).ids
        what = json.dumps([sorted(vocab.items()), content["model"]["merges"], probe])
        self.identity: str = hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        if add_bos is None:
            add_bos = fast.bos_token_id in fast("a").input_ids[:1]
        self._bos: str = fast.bos_token if add_bos and fast.bos_token else ""
        self._cached = functools.lru_cache(maxsize=16384)(self._encode)

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory. Raises BadModelFile without a whole tokenizer.json."""
        directory = Path(directory)
        if not (directory / "tokenizer.json").is_file():
            raise BadModelFile(f"{directory} has no tokenizer.json, and slow tokenizers give no character "
                               "spans: save the model's fast tokenizer there, or pass another directory")
        try:
            fast = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        except Exception as e:  # the tokenizers library raises bare Exception for a broken file
            raise BadModelFile(f"{directory}/tokenizer.json can't be loaded ({e}): fetch it again") from None
        eos: set[int | None] = set()
        for name in ("generation_config.json", "config.json"):
            ids = _json(directory / name).get("eos_token_id")
            eos |= set(ids) if isinstance(ids, list) else {ids}
        add_bos = _json(directory / "tokenizer_config.json").get("add_bos_token")
        return cls(fast, [i for i in eos if i is not None], add_bos)

    @classmethod
    def from_gguf(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a GGUF file. Raises UnsupportedModel when it can't be rebuilt from there."""
        with tempfile.TemporaryDirectory() as directory:
            write_json_files(Path(path), Path(directory))
            return cls.from_directory(directory)

    def encode(self, text: str, special: bool = False) -> Encoded:
        """The tokens of `text`, with no token added before or after it.

        Control tokens written out in the text, such as <|im_end|>, are read as plain characters unless
        `special`, for text of our own. Raises BadInput when the text isn't NFC (see `nfc`) or valid Unicode.
        """
        ids, spans = self._cached(text, special)
        return Encoded(tuple(ids.tolist()), tuple(map(tuple, spans.tolist())), text)

    # Cached as arrays: tuples of Python integers would take ten times the memory.
    def _encode(self, text: str, special: bool) -> tuple[np.ndarray, np.ndarray]:
        if not unicodedata.is_normalized("NFC", text):
            raise BadInput(f"text isn't in Unicode NFC form: {text[:40]!r}...; pass it through nfc() first")
        try:
            encoding = (self._special if special else self._plain).encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise BadInput(f"text isn't valid Unicode (a lone surrogate): {text[:40]!r}...; decode its bytes with "
                           "errors='replace'") from None
        spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        return np.array(encoding.ids, np.int32), spans

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without control tokens."""
        return str(self._fast.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def prompt_parts(self, instructions: str, question_text: str,
                     system: str | None = None, chat: bool = True) -> tuple[str, str]:
        """The prompt before the first passage and after the last one, for `encode(..., special=True)`.

        Both come from the chat template, rendered for one user message: instructions, passages, question.
        Without a template, or without `chat`, they are the texts themselves. Raises BadInput when the template refuses
        or drops a part.
        """
        if self._fast.chat_template is None or not chat:
            before = f"{system}\n\n{instructions}" if system else instructions
            return self._bos + before, question_text
        messages = [{"role": "user", "content": instructions + _SENTINEL + question_text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        advice = "put the system text into the instructions" if system else "use another chat template"
        try:
            # Llama 3 templates write today's date into the header: a prefix that changed every day would miss every
            # cache, so they get the date that they fall back to themselves.
            rendered = str(self._fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                          date_string="26 Jul 2024"))
        except jinja2.TemplateError as e:
            raise BadInput(f"the model's chat template refuses the messages ({e}): {advice}") from None
        if system is not None and system.strip() not in rendered:
            raise BadInput(f"the model's chat template leaves the system message out: {advice}")
        if rendered.count(_SENTINEL) != 1:
            raise BadInput(f"the model's chat template writes the user's message {rendered.count(_SENTINEL)} "
                           "times, and the passages need exactly one place: use another chat template")
        before, after = rendered.split(_SENTINEL)
        return before if before.startswith(self._bos) else self._bos + before, after


def _without_added_tokens(content: dict[str, Any]) -> dict[str, Any]:
    # Some chat formats mark their control tokens as not special, and some vocabularies could merge their way
    # to one: plain text must reach none of them, so the plain tokenizer doesn't know them.
    model = content["model"]
    added = {token["content"] for token in content["added_tokens"]} - {model["unk_token"]}
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    merges = [pair for pair in model["merges"] if not added & {*pair, "".join(pair)}]
    return content | {"added_tokens": [], "model": model | {"vocab": vocab, "merges": merges}}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise BadModelFile(f"{path} isn't valid JSON ({e}): fetch the model again") from None
