"""Product-key memory (1907.05242; Memory+ of 2412.09764): a large table of values, a few read by each token."""

from .config import ProductKeyMemoryConfig
from .module import ProductKeyMemory
from .patch import ProductKeyMemories

__all__ = ["ProductKeyMemories", "ProductKeyMemory", "ProductKeyMemoryConfig"]
