"""The authors' own RMT and ARMT around a Llama, from a clone of github.com/RodkinIvan/associative-recurrent-memory-transformer.

Their code (Apache-2.0) is on no package index and is run as it is, from the files of the clone. It was written for
transformers 4, whose layers gave tuples, and imports wandb without using it: `_GivesTuple` and a hook stand for the first, an
empty module for the second where wandb is not installed.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from torch import nn
from transformers import PreTrainedModel

from memlayers.eval.speed.timing import module_of

FILES = {"RMT": Path("modeling_rmt/language_modeling.py"), "ARMT": Path("modeling_amt/language_modeling.py")}


def rmt(clone: Path, base: PreTrainedModel, n_tokens: int, segment_length: int) -> nn.Module:
    """Their recurrent wrapper around a copy of the Llama `base`; it is called as a model and gives loss and logits."""
    theirs = _module(clone, "RMT")
    cell = theirs.MemoryCell(copy.deepcopy(base), n_tokens, wrap_pos=False)
    return theirs.RecurrentWrapper(cell, segment_size=segment_length)


def armt(clone: Path, base: PreTrainedModel, n_tokens: int, segment_length: int, key_dim: int) -> nn.Module:
    """Their associative wrapper around a copy of `base`, with a matrix in every layer."""
    theirs, base = _module(clone, "ARMT"), copy.deepcopy(base)
    cell = theirs.AssociativeMemoryCell(base, n_tokens, key_dim, layers_attr="model.layers", wrap_pos=False)
    for wrapped in cell.layers:
        wrapped.layer = _GivesTuple(wrapped.layer)
        wrapped.register_forward_hook(lambda layer, given, output: output[0])
    return theirs.AssociativeRecurrentWrapper(cell, segment_size=segment_length)


class _GivesTuple(nn.Module):
    """A layer as the layers of transformers 4 were called."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        return (self.layer(hidden_states, **kwargs),)


def _module(clone: Path, name: str) -> ModuleType:
    """Raises `ValueError` where the clone has no such file."""
    path = clone / FILES[name]
    if not path.is_file():
        raise ValueError(
            f"{path} is not there; give a clone of github.com/RodkinIvan/associative-recurrent-memory-transformer"
        )
    if importlib.util.find_spec("wandb") is None:
        sys.modules["wandb"] = ModuleType("wandb")
    try:
        return module_of(path)
    finally:
        if getattr(sys.modules.get("wandb"), "__file__", None) is None:
            sys.modules.pop("wandb", None)
