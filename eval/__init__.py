"""Evaluation: suites of generated items, asked in three regimes, of all arms and controls on the same items."""
