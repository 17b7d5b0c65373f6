"""`Procedure`: one procedure's rows as a value, on their way from one model to another through a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import DamagedFile, read_tensors, write_tensors
from ..files.tensors import check_finite

FORMAT, WITHOUT_CHECKSUMS = "memlayers.task_token.v2", "memlayers.task_token.v1"
SAMPLE = 16
"""Rows of the base that are kept beside a procedure, to know the base again by."""


@dataclass(frozen=True)
class Procedure:
    """The rows of one procedure and what tells which base they are for.

    Attributes:
        name: of the procedure.
        rows: `input` (embedding width,) and, untied, `output` (head width,), float32.
        base: (16, embedding width) float32, rows of the base's input embedding, evenly spaced.
        vocab_size: rows of that embedding.
    """

    name: str
    rows: dict[str, torch.Tensor]
    base: torch.Tensor
    vocab_size: int

    @property
    def tied(self) -> bool:
        """Whether one row both reads and predicts."""
        return "output" not in self.rows

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with checksums, whole or not at all; raises as `MemoryState.save`."""
        metadata = {"format": FORMAT, "name": self.name, "vocab_size": str(self.vocab_size)}
        metadata |= {"tied": str(self.tied).lower(), "hidden_size": str(self.base.shape[1])}
        write_tensors(path, {**self.rows, "base": self.base}, metadata)

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> Procedure:
        """Read what `save` wrote.

        Args:
            verify: compare the checksums; False takes what is there, from before there were any too.

        Raises:
            FileNotFoundError: nothing at `path`.
            ValueError: a cut or damaged file, or a safetensors file that holds no procedure.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no procedure at {path}")
        tensors, metadata = read_tensors(path, verify=verify, device="cpu")
        if metadata.get("format") not in (FORMAT, WITHOUT_CHECKSUMS):
            raise DamagedFile(f"{path} is a safetensors file but not a procedure (no format {FORMAT!r})")
        if not {"base", "input"} <= tensors.keys() <= {"base", "input", "output"}:
            raise DamagedFile(
                f"{path} has tensors {sorted(tensors)}; a procedure has base, input and maybe output"
            )
        check_finite(path, tensors)
        for name, tensor in tensors.items():
            if tensor.dim() != (2 if name == "base" else 1) or not tensor.is_floating_point():
                raise DamagedFile(
                    f"{path}: tensor {name!r} has shape {tuple(tensor.shape)} of {tensor.dtype}; a procedure has rows of "
                    "floats, and base (rows, width)"
                )
        base, vocab_size = tensors.pop("base"), metadata.get("vocab_size", "")
        if "name" not in metadata or not (vocab_size.isascii() and vocab_size.isdigit()):
            raise DamagedFile(f"{path}: its metadata has no name, or vocab_size is {vocab_size[:40]!r}")
        return cls(metadata["name"], tensors, base, int(vocab_size))

    def check_base(self, embedding: torch.Tensor, tied: bool, path: str | Path) -> None:
        """Raise ValueError unless this was made for a base with this input embedding (vocab_size, width)."""
        if self.vocab_size != len(embedding) or self.base.shape[1] != embedding.shape[1]:
            raise ValueError(
                f"{path}: made for a base with {self.vocab_size} vocabulary rows of {self.base.shape[1]}, this one "
                f"has {len(embedding)} of {embedding.shape[1]}"
            )
        if self.tied != tied:
            words = {True: "one row (tied)", False: "two rows (untied)"}
            raise ValueError(f"{path}: has {words[self.tied]}, procedures of this memory have {words[tied]}")
        here = sample(embedding)
        if len(self.base) != SAMPLE:
            raise ValueError(f"{path}: keeps {len(self.base)} rows of its base, not {SAMPLE}")
        if (here - self.base).norm() > 0.05 * self.base.norm():  # bfloat16 rounds by less than 0.004
            raise ValueError(
                f"{path}: made for another base of the same shape; its rows mean nothing to this one"
            )


@torch.no_grad()
def sample(embedding: torch.Tensor) -> torch.Tensor:
    """(16, width) float32, on the CPU: rows of `embedding`, evenly spaced."""
    at = torch.linspace(0, len(embedding) - 1, SAMPLE, device=embedding.device).long()
    return embedding[at].float().cpu()
