"""Neural memory (Titans, 2501.00663; TTT, 2407.04620): weights that learn from the text while it is read."""

from .config import NeuralMemoryConfig
from .module import NeuralMemory
from .patch import NeuralMemories
from .rules import RULES

__all__ = ["RULES", "NeuralMemories", "NeuralMemory", "NeuralMemoryConfig"]
