"""Models and tokenizers of others, from a folder or the hub: code that comes with them is never run, nor asked about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import first_line, says_no_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_causal_lm(source: str | Path, **options: Any) -> PreTrainedModel:
    """The causal language model at `source`, a folder or hub id; `options` go to `from_pretrained`.

    Raises:
        OSError: there is none.
        ValueError: it needs code of its own, or its files are damaged or hold more than tensors.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, source, options)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer at `source`, a folder or hub id; raises as `load_causal_lm`."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, source, {})


def _load(auto: Any, source: str | Path, options: dict[str, Any]) -> Any:
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **options)
    except OSError:
        raise
    except (
        Exception
    ) as error:  # each library under transformers has errors of its own, for the files that it reads
        if says_no_memory(error):
            raise
        raise ValueError(f"{source}: {_told(error)}") from None


def _told(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "needs Python code that came with it, which memlayers does not run; take a model whose architecture is part of "
            "transformers"
        )
    if type(error).__name__ == "UnpicklingError":
        return (
            "its weights are a pickle file that is damaged, or holds more than tensors and could run code; it is not read. "
            "Take a copy in the safetensors format"
        )
    if type(error) is ValueError:
        return first_line(error)
    return (
        f"its files cannot be read, they are damaged or foreign ({type(error).__name__}: {first_line(error)})"
    )
