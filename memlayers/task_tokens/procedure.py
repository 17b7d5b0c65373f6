"""`Procedure`: one procedure's rows as a value, on their way from one model to another through a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files import write_tensors

FORMAT = "memlayers.task_token.v1"
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
        """Write one safetensors file, whole or not at all."""
        metadata = {"format": FORMAT, "name": self.name, "vocab_size": str(self.vocab_size)}
        metadata |= {"tied": str(self.tied).lower(), "hidden_size": str(self.base.shape[1])}
        write_tensors(path, {**self.rows, "base": self.base}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Procedure:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: nothing at `path`.
            ValueError: a cut file, or a safetensors file that holds no procedure.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no procedure at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{path} is a safetensors file but not a procedure (no format {FORMAT!r})"
                    )
                tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is cut short or not a safetensors file ({error}); export the procedure again"
            ) from None
        if not {"base", "input"} <= tensors.keys() <= {"base", "input", "output"}:
            raise ValueError(
                f"{path} has tensors {sorted(tensors)}; a procedure has base, input and maybe output"
            )
        base = tensors.pop("base")
        return cls(metadata["name"], tensors, base, int(metadata["vocab_size"]))

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
        if (here - self.base).norm() > 0.05 * self.base.norm():  # bfloat16 rounds by less than 0.004
            raise ValueError(
                f"{path}: made for another base of the same shape; its rows mean nothing to this one"
            )


@torch.no_grad()
def sample(embedding: torch.Tensor) -> torch.Tensor:
    """(16, width) float32, on the CPU: rows of `embedding`, evenly spaced."""
    at = torch.linspace(0, len(embedding) - 1, SAMPLE, device=embedding.device).long()
    return embedding[at].float().cpu()
