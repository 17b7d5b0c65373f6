"""LoRA as memory: a text is written into an adapter by gradient steps, and read by every token after it."""

from .config import LoRAMemoryConfig
from .module import LoRAAdapter
from .pairs import write_pairs
from .patch import LoRAMemories

__all__ = ["LoRAAdapter", "LoRAMemories", "LoRAMemoryConfig", "write_pairs"]
