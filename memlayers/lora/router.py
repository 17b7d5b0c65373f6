"""Which shards answer a question: vectors of texts, and scores among the shards that a caller may read.

Every text is embedded by itself, so that no vector depends on another text, and a score depends on nothing but the
question and the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..core.model import decoder_of, disabled, eval_mode
from .bank_config import LoRABankConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Encoder = Callable[[list[str]], torch.Tensor]
"""A user's: n texts to their vectors (n, d), floating point. It is given one text a call."""


class Router:
    """Vectors of texts by the model itself, or by a user's encoder."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: LoRABankConfig,
        encoder: Encoder | None = None,
    ):
        self.model, self.tokenizer, self.config, self.encoder = model, tokenizer, config, encoder

    @torch.no_grad()
    def document(self, text: str) -> torch.Tensor:
        """(n, d) float32 on the CPU, of norm 1: one for each piece of `router_length` tokens, or the encoder's one.

        Raises:
            ValueError: an encoder whose answer is not (1, d) and finite; a text without tokens.
        """
        if self.encoder is not None:
            return F.normalize(self._given(text), dim=1)
        return F.normalize(torch.stack([piece.mean(0) for piece in self._pieces(text)]), dim=1)

    @torch.no_grad()
    def question(self, text: str) -> torch.Tensor:
        """(d,) float32 on the CPU, of norm 1: one for all of the text; raises as `document`."""
        if self.encoder is not None:
            return F.normalize(self._given(text)[0], dim=0)
        return F.normalize(torch.cat(self._pieces(text)).mean(0), dim=0)

    def _given(self, text: str) -> torch.Tensor:
        vectors = torch.as_tensor(self.encoder([text])).detach().float().cpu()
        if vectors.dim() != 2 or vectors.shape[0] != 1 or not vectors.isfinite().all():
            raise ValueError(
                f"the encoder gave {tuple(vectors.shape)} for one text; it must give finite vectors (1, d)"
            )
        return vectors

    def _pieces(self, text: str) -> list[torch.Tensor]:
        """A vector a token, (tokens, d) float32, for each piece of a text."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if not ids:
            raise ValueError(f"{text!r} has no token")
        length = self.config.router_length
        pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
        if self.config.router == "output":
            return [self._hidden(piece) for piece in pieces]
        embeddings = self.model.get_input_embeddings()
        device = embeddings.weight.device
        return [embeddings(torch.tensor(piece, device=device)).float().cpu() for piece in pieces]

    def _hidden(self, ids: list[int]) -> torch.Tensor:
        """The last hidden states with all memories off, without that of a token that starts every text."""
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        device = self.model.get_input_embeddings().weight.device
        with disabled(self.model), eval_mode(self.model):
            output = decoder_of(self.model)(
                input_ids=torch.tensor([start + ids], device=device), use_cache=False
            )
        return output.last_hidden_state[0, len(start) :].float().cpu()


def scores_of(question: torch.Tensor, shards: Sequence[torch.Tensor]) -> list[float]:
    """How well each shard fits a question: the highest cosine of its documents' vectors with the question's.

    Args:
        question: (d,), of norm 1.
        shards: vectors (n, d) of each shard, of norm 1.

    Raises:
        ValueError: vectors of another width.
    """
    odd = sorted({x.shape[1] for x in shards} - {question.shape[0]})
    if odd:
        raise ValueError(
            f"the question's vector is {question.shape[0]} wide, those of the bank {odd[0]}; open the bank with the "
            "encoder that it was made with"
        )
    return [float((x @ question).max()) for x in shards]


def best(
    names: Sequence[str], scores: Sequence[float], top_k: int, temperature: float
) -> list[tuple[str, float]]:
    """The `top_k` shards of the highest scores, best first, with weights that sum to 1: softmax of scores / temperature."""
    chosen = sorted(zip(names, scores), key=lambda item: (-item[1], item[0]))[:top_k]
    weights = torch.tensor([score for _, score in chosen], dtype=torch.float64).div(temperature).softmax(0)
    return [(name, float(weight)) for (name, _), weight in zip(chosen, weights)]
