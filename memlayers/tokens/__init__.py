"""Memory tokens: recurrent (RMT, 2207.06881), accumulating (AutoCompressor, 2305.14788), and made by a small network
(MemoryPrompt, 2402.15268)."""

from .config import MemoryTokensConfig
from .module import MemoryTokens

__all__ = ["MemoryTokens", "MemoryTokensConfig"]
