"""Reversible compression (R³Mem, 2502.15957): segments of text become memory tokens, and the same parameters, run
backwards, make text of them again."""

from .config import ReversibleMemoryConfig
from .module import ReversibleCompressor
from .patch import ReversibleMemory, read_back

__all__ = ["ReversibleCompressor", "ReversibleMemory", "ReversibleMemoryConfig", "read_back"]
