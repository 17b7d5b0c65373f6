"""LoRA as memory: a text is written into an adapter by gradient steps, and read by every token after it."""

from .bank import LoRABank
from .bank_config import LoRABankConfig
from .config import LoRAMemoryConfig
from .module import LoRAAdapter
from .pairs import write_pairs
from .patch import LoRAMemories
from .repair import BankReport
from .shard import ShardManifest
from .store import BankLocked

__all__ = [
    "BankLocked",
    "BankReport",
    "LoRAAdapter",
    "LoRABank",
    "LoRABankConfig",
    "LoRAMemories",
    "LoRAMemoryConfig",
    "ShardManifest",
    "write_pairs",
]
