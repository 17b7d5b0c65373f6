"""Types of the numbers in configs: each has a limit beyond which a number is surely a mistake, so that no config makes a
process run out of memory, or without end, where an error would have said which field is wrong.

What fits below its limit and is too large for this machine beside the others is for `memlayers.core.size` to find.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MOST_LAYERS = 10_000
Layer = Annotated[int, Field(ge=-MOST_LAYERS, le=MOST_LAYERS)]
"""Number of a decoder layer; negative counts from the end. The model says which there are."""
Part = Annotated[int, Field(ge=1, le=4096)]
"""Parts of a network: heads, layers, multiples of a width, memory tokens of a segment."""
Width = Annotated[int, Field(ge=1, le=65_536)]
"""Widths and ranks, and what has such a size."""
MOST_TOKENS = 2**24
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
"""Tokens of a text, a segment or a window."""
Count = Annotated[int, Field(ge=1, le=1_000_000)]
"""Things of which each is made and kept: items, questions, rows of a batch."""
Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
"""Things done one after the other, of which nothing is kept."""
Seed = Annotated[int, Field(ge=0, lt=2**31)]

Rate = Annotated[float, Field(gt=0, le=100)]
"""A learning rate, or another size of a step."""
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""Of a loss among others, or of decay."""
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]
"""What numbers are multiplied with, divided by or cut at."""
Beta = Annotated[float, Field(ge=0, lt=1)]
"""A rate at which an optimizer forgets."""
Share = Annotated[float, Field(ge=0, le=1)]
Epsilon = Annotated[float, Field(ge=1e-30, le=1)]
"""What an optimizer divides by at least; float32 has it."""
Bias = Annotated[float, Field(ge=-100, le=100)]
"""Before a sigmoid, which is 0 or 1 beyond."""
