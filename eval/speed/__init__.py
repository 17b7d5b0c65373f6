"""Speed and memory: cases of ours beside what a user would take in their place."""

BENCHMARKS = ("product_key", "neural", "lora", "token_memories", "checksums")
"""The modules here that `memlayers bench` runs, by their function `benchmark`."""
