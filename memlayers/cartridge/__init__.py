"""Cartridges: keys and values that stand before a text in every layer, learned once for all texts (prefix tuning,
2101.00190; prompt tuning, 2104.08691) or written from a text (Cartridges, 2506.06266)."""

from .config import CartridgeConfig
from .patch import Cartridge

__all__ = ["Cartridge", "CartridgeConfig"]
