"""Associative memory: each layer has a matrix that trailing tokens write and all tokens read (ARMT, 2407.04841)."""

from .config import AssociativeMemoryConfig
from .module import AssociativeLayer
from .patch import AssociativeMemory

__all__ = ["AssociativeLayer", "AssociativeMemory", "AssociativeMemoryConfig"]
