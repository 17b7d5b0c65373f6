"""Task tokens (TokMem): one trained vocabulary row a procedure, which the model's own next-token prediction chooses."""

from .config import TaskTokensConfig
from .module import TaskRows
from .patch import TaskTokens, frozen_rows, task_tokens

__all__ = ["TaskRows", "TaskTokens", "TaskTokensConfig", "frozen_rows", "task_tokens"]
