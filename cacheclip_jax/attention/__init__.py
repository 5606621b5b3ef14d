"""Row attention: rows at sorted absolute positions against a cache in position order."""

from cacheclip_jax.attention.row import row_attention, row_attention_reference

__all__ = ["row_attention", "row_attention_reference"]
