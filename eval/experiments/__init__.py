"""The experiments: each file holds only what is measured. `memlayers.eval.registry` has them by name."""
