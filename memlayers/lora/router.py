"""Which shards answer a question: vectors of texts, and scores among the shards that a caller may read.

Every text is embedded by itself, so that no vector depends on another text, and scores depend on nothing but the
question and the shards they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..model import decoder_of
from .training import still

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Encoder = Callable[[list[str]], torch.Tensor]
"""A user's: n texts to their vectors (n, d), floating point. It is given one text a call."""


class Router:
    """Vectors of texts by the model itself, its memories off, or by a user's encoder.

    The model's: means over pieces of a text of the decoder's last hidden state.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        encoder: Encoder | None = None,
    ):
        self.model, self.tokenizer, self.length, self.encoder = model, tokenizer, length, encoder

    def document(self, text: str) -> torch.Tensor:
        """(n, d) float32 on the CPU: a vector for every `length` tokens, or the one that the encoder gives.

        Raises:
            ValueError: an encoder whose answer is not (1, d) and finite; a text without tokens.
        """
        return self._encoded(text) if self.encoder is not None else self._embedded(text)

    def question(self, text: str) -> torch.Tensor:
        """(d,) float32 on the CPU; raises as `document` does."""
        return self.document(text).mean(0)

    def _encoded(self, text: str) -> torch.Tensor:
        vectors = torch.as_tensor(self.encoder([text])).detach().float().cpu()
        if vectors.dim() != 2 or vectors.shape[0] != 1 or not vectors.isfinite().all():
            raise ValueError(
                f"the encoder gave {tuple(vectors.shape)} for one text; it must give finite vectors (1, d)"
            )
        return vectors

    @torch.no_grad()
    def _embedded(self, text: str) -> torch.Tensor:
        from ..attach import disabled  # attach knows every kind of memory, and so this room

        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if not ids:
            raise ValueError(f"{text!r} has no token")
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        decoder, device = decoder_of(self.model), self.model.get_input_embeddings().weight.device
        vectors = []
        with disabled(self.model), still(self.model):
            for first in range(0, len(ids), self.length):
                piece = torch.tensor([start + ids[first : first + self.length]], device=device)
                hidden = decoder(input_ids=piece, use_cache=False).last_hidden_state
                vectors.append(hidden[0, len(start) :].float().mean(0))
        return torch.stack(vectors).cpu()


def scores_of(question: torch.Tensor, shards: Sequence[torch.Tensor]) -> list[float]:
    """How well each shard fits a question: the highest cosine of its vectors with the question's.

    The mean of the vectors of all these shards is taken off before: hidden states of a model have a large part in
    common, which says nothing.

    Args:
        question: (d,).
        shards: vectors (n, d) of each shard; none but those that the caller may read.

    Raises:
        ValueError: vectors of another width.
    """
    widths = {x.shape[1] for x in shards} | {question.shape[0]}
    if len(widths) > 1:
        raise ValueError(
            f"the question's vector is {question.shape[0]} wide, those of the bank {sorted(widths - {question.shape[0]})}; "
            "open the bank with the encoder that it was made with"
        )
    together = F.normalize(torch.cat(list(shards)), dim=1)
    centre = together.mean(0)
    cosines = F.normalize(together - centre, dim=1) @ F.normalize(
        F.normalize(question, dim=0) - centre, dim=0
    )
    return [float(part.max()) for part in cosines.split([len(x) for x in shards])]


def best(
    names: Sequence[str], scores: Sequence[float], top_k: int, temperature: float
) -> list[tuple[str, float]]:
    """The `top_k` shards of the highest scores, best first, with weights that sum to 1: softmax of scores / temperature."""
    chosen = sorted(zip(names, scores), key=lambda item: (-item[1], item[0]))[:top_k]
    weights = torch.tensor([score for _, score in chosen], dtype=torch.float64).div(temperature).softmax(0)
    return [(name, float(weight)) for (name, _), weight in zip(chosen, weights)]
