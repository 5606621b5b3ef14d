"""What can go wrong, by kind. Every message names the value, the limit and the way out.

The command line prints these messages without a traceback and exits with 2; a library user catches `CacheClipError`
or one of its kinds.
"""


class CacheClipError(Exception):
    """Base of every error that this package raises on purpose."""


class UnsupportedModel(CacheClipError):
    """A model that the decoder would not compute exactly; the message names the setting that is to blame."""


class BadModelFile(CacheClipError):
    """A model file that is missing, truncated, incomplete or holds values that aren't finite."""


class BadInput(CacheClipError):
    """An argument outside its range: a ratio, an empty question, an unknown chunk id, a binary file."""


class ContextTooLong(BadInput):
    """A prompt that doesn't fit the model's context; the message gives both numbers."""


class StoreError(CacheClipError):
    """The chunk store could not be opened, read or written."""


class ChunkCorrupt(StoreError):
    """Stored bytes that fail their checksum. `chunk` is the chunk's id, for repair by re-encoding."""

    def __init__(self, message: str, chunk: str):
        super().__init__(message)
        self.chunk = chunk


class ChunkUnreadable(ChunkCorrupt):
    """A chunk cache that may be whole but can't be read now: no permission, or a bucket that doesn't answer."""
