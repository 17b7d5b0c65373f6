"""Memory tokens: recurrent (RMT, 2207.06881) and accumulating (AutoCompressor, 2305.14788)."""

from .config import MemoryTokensConfig
from .module import MemoryTokens

__all__ = ["MemoryTokens", "MemoryTokensConfig"]
