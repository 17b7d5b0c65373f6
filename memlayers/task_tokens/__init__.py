"""Task tokens (TokMem): one trained vocabulary row a procedure, which the model's own next-token prediction chooses."""

from .config import TaskTokensConfig
from .module import TaskRows
from .patch import TaskTokens, task_tokens

__all__ = ["TaskRows", "TaskTokens", "TaskTokensConfig", "task_tokens"]
