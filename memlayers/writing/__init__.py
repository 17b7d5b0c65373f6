"""Writing by gradient steps: what a memory holds for a row is trained on the text of that row."""

from .config import WriterSection
from .segments import Segments, of_pairs, of_text
from .writer import Writer, row_losses

__all__ = ["Segments", "Writer", "WriterSection", "of_pairs", "of_text", "row_losses"]
