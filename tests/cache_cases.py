"""Kinds of memory that ride on a cache, and caches that a caller makes."""

import pytest
from transformers import DynamicCache, StaticCache

STATEFUL = [
    *("recurrent", "accumulate", "prefix", "neural_mag", "neural_mac", "neural_window"),
    *("lora", "cartridge", "associative", "reversible"),
]
CROPS = ["lora", "cartridge"]
stateful = pytest.mark.parametrize("name", STATEFUL)
CACHES = {
    "plain": lambda model: DynamicCache(),
    "of_config": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
}
