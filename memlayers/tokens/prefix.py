"""`PrefixWriter`: a small recurrent network that makes the next prefix from a segment's last hidden state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..core.linear import Linear


class PrefixWriter(nn.Module):
    """An MLP, an LSTM cell and a linear map (MemoryPrompt, 2402.15268). It works in float32, whatever its weights.

    Args:
        hidden_size: width of the model.
        n_tokens: vectors of the prefix.
        writer_dim: width of the MLP and the LSTM.
        std: standard deviation at which a prefix starts, that of the model's embeddings.
    """

    def __init__(self, hidden_size: int, n_tokens: int, writer_dim: int, std: float):
        super().__init__()
        self.n_tokens, self.writer_dim = n_tokens, writer_dim
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.mlp = Linear(hidden_size, writer_dim)
        self.lstm = nn.LSTMCell(writer_dim, writer_dim)
        self.out = Linear(writer_dim, n_tokens * hidden_size)
        nn.init.normal_(self.out.bias, std=std)

    def new_state(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The LSTM's output and cell before a text, (batch, writer_dim) float32 zeros."""
        zeros = torch.zeros(batch_size, self.writer_dim, dtype=torch.float32, device=self.out.weight.device)
        return zeros, zeros.clone()

    def forward(
        self, hidden: torch.Tensor, output: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next prefix (batch, n_tokens, hidden_size), and the LSTM's output and cell after `hidden`.

        Args:
            hidden: (batch, hidden_size), of the last token of a segment.
            output, cell: (batch, writer_dim), after the segments before it.
        """
        norm, mlp, lstm, out = self.norm.weight.float(), self.mlp, self.lstm, self.out
        seen = F.rms_norm(hidden.float(), norm.shape, norm, 1e-6)
        seen = F.gelu(F.linear(seen, mlp.weight.float(), mlp.bias.float()))
        weights = (x.float() for x in (lstm.weight_ih, lstm.weight_hh, lstm.bias_ih, lstm.bias_hh))
        output, cell = torch.lstm_cell(seen, (output, cell), *weights)
        prefix = F.linear(output, out.weight.float(), out.bias.float())
        return prefix.view(len(hidden), self.n_tokens, -1), output, cell
