"""Training with accelerate from one YAML file. Start at `run.py`."""
