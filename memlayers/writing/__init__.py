"""Writing by gradient steps: what a memory holds for a row is trained on the text of that row."""

from .config import DistillSection, WriterSection
from .distill import of_teacher
from .segments import Segments, of_pairs, of_text, right_aligned
from .writer import Writer, row_losses

__all__ = [
    "DistillSection",
    "Segments",
    "Writer",
    "WriterSection",
    "of_pairs",
    "of_teacher",
    "of_text",
    "right_aligned",
    "row_losses",
]
