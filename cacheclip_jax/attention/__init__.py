"""Row attention: rows at sorted absolute positions against a cache in position order."""

from cacheclip_jax.attention.causal import causal_attention
from cacheclip_jax.attention.choose import Choice, choose, for_rows
from cacheclip_jax.attention.reshaped import reshaped
from cacheclip_jax.attention.row import row_attention, row_attention_reference

__all__ = ["Choice", "causal_attention", "choose", "for_rows", "reshaped", "row_attention", "row_attention_reference"]
