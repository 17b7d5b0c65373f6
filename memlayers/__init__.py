"""Memory for Hugging Face causal language models: wrap a checkpoint, train it, measure what it remembers."""

from pathlib import Path as _Path

# In a checkout, `kernels`, `train`, `eval` and `configs` lie beside this package; in the wheel, inside.
# Either way they are memlayers.kernels, memlayers.train and so on. The guard matters: without it an installed
# package would search the top of site-packages, where `kernels` is Hugging Face's.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

from .associative import AssociativeMemory, AssociativeMemoryConfig  # noqa: E402
from .attach import attach, detach, disabled  # noqa: E402
from .cartridge import Cartridge, CartridgeConfig  # noqa: E402
from .checkpoint import load, save  # noqa: E402
from .config import ConfigError, MemoryConfig  # noqa: E402
from .core.cache import MemoryCache  # noqa: E402
from .core.memory import Memory  # noqa: E402
from .core.model import memories, memory_parameters, window  # noqa: E402
from .core.state import MemoryState  # noqa: E402
from .files import DamagedFile  # noqa: E402
from .kinds import parse_memory_config  # noqa: E402
from .lora import (  # noqa: E402
    BankLocked,
    LoRABank,
    LoRABankConfig,
    LoRAMemories,
    LoRAMemoryConfig,
    write_pairs,
)
from .neural import NeuralMemories, NeuralMemory, NeuralMemoryConfig  # noqa: E402
from .optim import RowSparseAdamW  # noqa: E402
from .product_key import ProductKeyMemories, ProductKeyMemory, ProductKeyMemoryConfig  # noqa: E402
from .reversible import (  # noqa: E402
    ReversibleCompressor,
    ReversibleMemory,
    ReversibleMemoryConfig,
    read_back,
)
from .task_tokens import TaskTokens, TaskTokensConfig  # noqa: E402
from .tokens import MemoryTokens, MemoryTokensConfig  # noqa: E402
from .version import __version__  # noqa: E402, F401
from .write import write  # noqa: E402

__all__ = [
    "AssociativeMemory",
    "AssociativeMemoryConfig",
    "BankLocked",
    "Cartridge",
    "CartridgeConfig",
    "ConfigError",
    "DamagedFile",
    "LoRABank",
    "LoRABankConfig",
    "LoRAMemories",
    "LoRAMemoryConfig",
    "Memory",
    "MemoryCache",
    "MemoryConfig",
    "MemoryState",
    "MemoryTokens",
    "MemoryTokensConfig",
    "NeuralMemories",
    "NeuralMemory",
    "NeuralMemoryConfig",
    "ProductKeyMemories",
    "ProductKeyMemory",
    "ProductKeyMemoryConfig",
    "ReversibleCompressor",
    "ReversibleMemory",
    "ReversibleMemoryConfig",
    "RowSparseAdamW",
    "TaskTokens",
    "TaskTokensConfig",
    "attach",
    "detach",
    "disabled",
    "load",
    "memories",
    "memory_parameters",
    "parse_memory_config",
    "read_back",
    "save",
    "window",
    "write",
    "write_pairs",
]
