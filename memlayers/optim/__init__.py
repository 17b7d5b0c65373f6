"""An optimizer for large tables that are read sparsely, and the gradient clipping that goes with it."""

from .clip import clip_gradients
from .row_sparse_adamw import RowSparseAdamW, coalesce_rows

__all__ = ["RowSparseAdamW", "clip_gradients", "coalesce_rows"]
