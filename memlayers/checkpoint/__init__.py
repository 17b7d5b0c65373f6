"""`save` and `load`: memory_config.json, memory.safetensors and a model card; the base is named, not copied.

out/
  memory_config.json    the memories' configs, which base they belong to, and the checksums of the other files
  memory.safetensors    the memories' tensors
  README.md             model card
  base/                 the base, only with save_base=True (it was trained too)
  adapters/NAME/        PEFT's adapters, where some were injected
  tokenizer.json, ...   the tokenizer, where one was given
"""

from .contents import CONFIG, WEIGHTS, place_of, read_config
from .loading import folder_of, load
from .saving import save, save_base_model

__all__ = ["CONFIG", "WEIGHTS", "folder_of", "load", "place_of", "read_config", "save", "save_base_model"]
