"""Writing by gradient steps: what a memory holds for a row, trained on the segments of its text.

    φ_{i+1} = φ_i − step_i(∇ Σ_rows loss(φ_i; segments of the row)),    φ = the floating-point fields of the state

Rows do not see each other: each has its own φ, its own mean loss, and its own moments. `Writer` holds what can be
learned about writing (PERK, 2507.06415, section 3): a rate for each tensor and step, and weights for the tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ..core.cache import MemoryCache
from ..core.hooks import recomputes_reentrant
from ..core.linear import Linear
from ..core.model import device_of
from ..core.state import Fields, MemoryState
from .attention import TwiceDifferentiable
from .config import WriterSection
from .distill import of_teacher
from .inner import InnerOptimizer
from .reptile import reptile
from .segments import Segments, of_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Writer(nn.Module):
    """The inner training of one memory.

    Attributes:
        log_rates: (steps, tensors) logarithms of the inner rates, where they are learned.
        token_weights: hidden states (..., hidden_size) to (..., 1), the weight before 2 · sigmoid; where they are learned.
    """

    def __init__(self, config: WriterSection, n_tensors: int, hidden_size: int):
        super().__init__()
        self.config = config
        self.log_rates = self.token_weights = None
        if config.learned_steps:
            start = torch.full((config.steps, n_tensors), config.learning_rate)
            self.log_rates = nn.Parameter(start.log())
        if config.token_weights:
            width = max(hidden_size // 4, 1)
            self.token_weights = nn.Sequential(
                Linear(hidden_size, width), nn.GELU(), Linear(width, 1, bias=False)
            )
            nn.init.zeros_(self.token_weights[-1].weight)

    def lesson(
        self, model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[Segments, torch.Tensor | None]:
        """What texts are learned from: their segments, or by `distill` continuations and what the teacher says there.

        Args:
            input_ids: (batch, tokens).
            mask: (batch, tokens) bool, False at padding, which may stand anywhere.

        Raises:
            ValueError: as `of_text` and `of_teacher`.
        """
        if self.config.distill is not None and self.config.steps:
            return of_teacher(model, input_ids, mask, self.config.distill)
        return of_text(input_ids, mask, self.config.segment_length), None

    def write(
        self,
        model: PreTrainedModel,
        name: str,
        segments: Segments,
        teacher: torch.Tensor | None,
        state: MemoryState,
        *,
        differentiable: bool = False,
        progress: bool = False,
    ) -> Fields:
        """The fields of memory `name` after `segments` are written into those of `state`, which is left as it is.

        Args:
            segments, teacher: as `lesson` gives them; see `row_losses`.
            differentiable: keep the graph from the state, and from what is learned here, to the result.

        Raises:
            ValueError: the loss of a row is not finite; names the step and the row. Gradient checkpointing, in
                training, of a mode that inner gradients do not go through.
        """
        second_order = differentiable and self.config.n_unrolled > 0
        _check_checkpointing(model, second_order)
        parts = segments.one_by_one() if self.config.streaming else [segments]
        bar = tqdm(total=len(parts) * self.config.steps, unit="step", desc="write", disable=not progress)
        fields = {field: x for field, x in state[name].items() if x.is_floating_point()}
        attention = TwiceDifferentiable() if second_order else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), attention:
            if not differentiable:
                fields = {field: x.detach().clone() for field, x in fields.items()}
            for part in parts:
                fields = self._steps(model, name, part, teacher, state, fields, differentiable, bar)
            if differentiable and self.config.outer_gradient == "reptile":
                rate = self.config.learning_rate
                fields = {field: reptile(x, state[name][field], rate) for field, x in fields.items()}
        bar.close()
        return {**state[name], **fields}

    def _steps(
        self, model, name, segments, teacher, state, fields: Fields, differentiable: bool, bar
    ) -> Fields:
        optimizer = InnerOptimizer(self.config, list(fields.values()))
        for step in range(self.config.steps):
            through = differentiable and step >= self.config.steps - self.config.n_unrolled
            given = fields if through else {field: x.detach().requires_grad_() for field, x in fields.items()}
            read = state.replace({name: {**state[name], **given}})
            part, said = self._batch(step, segments, teacher)
            losses = row_losses(model, part, read, self.token_weights, said)
            self._check(losses, step)
            rates = self._rates(step, len(fields), differentiable)
            # The gradients get no name, which would keep them through the next step.
            tensors = optimizer.step(
                list(fields.values()), _gradients(losses, given, create_graph=through), rates
            )
            fields = dict(zip(fields, tensors))
            bar.update()
        return fields

    def _batch(self, step: int, segments: Segments, teacher) -> tuple[Segments, torch.Tensor | None]:
        """What one step learns from: all, or the next continuations of `distill.batch`, around and around."""
        size = None if teacher is None else self.config.distill.batch
        if size is None:
            return segments, teacher
        chosen = (step * size + torch.arange(size, device=teacher.device)) % teacher.shape[1]
        return Segments(*(x[:, chosen] for x in segments)), teacher[:, chosen]

    def _rates(self, step: int, n_tensors: int, differentiable: bool) -> list:
        if self.log_rates is None:
            return [self.config.learning_rate] * n_tensors
        rates = self.log_rates[step].exp()
        return list((rates if differentiable else rates.detach()).unbind())

    def _check(self, losses: torch.Tensor, step: int) -> None:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"step {step + 1} of {self.config.steps} of writing: the loss of row {bad[0]} is "
                f"{losses[bad[0]].item()}; nothing was written, the state is as it was. Lower writer.learning_rate or "
                "set writer.clip"
            )


def _gradients(losses: torch.Tensor, fields: Fields, create_graph: bool) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(losses.sum(), list(fields.values()), create_graph=create_graph)


def row_losses(
    model: PreTrainedModel,
    segments: Segments,
    state: MemoryState,
    token_weights: nn.Module | None = None,
    teacher: torch.Tensor | None = None,
) -> torch.Tensor:
    """(batch,) float32: mean cross-entropy of each row's learned tokens, read with its state; 0 where it has none.

    Args:
        token_weights: weighs the tokens, see `Writer`; None: all alike.
        teacher: (batch, segments, tokens, vocabulary) log-probabilities of the token behind each; then the mean of
            KL(teacher || model) over the tokens of `segments.mask` instead.
    """
    rows, n_segments = segments.ids.shape[:2]
    device = device_of(model)
    ids, mask, learned = (x.flatten(0, 1).to(device) for x in segments)
    cache = MemoryCache(state, rows_per_state=n_segments)
    output = model(
        input_ids=ids,
        attention_mask=mask.long(),
        past_key_values=cache,
        use_cache=False,
        output_hidden_states=token_weights is not None,
    )
    logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
    if teacher is not None:
        said = logits.log_softmax(-1)
        each = F.kl_div(said, teacher.flatten(0, 1), reduction="none", log_target=True).sum(-1)
        each, counted = (x.reshape(rows, -1) for x in (each, mask))
        return (each * counted).sum(1) / counted.sum(1).clamp(min=1)
    # Each token stands where it is predicted; the first of a segment, which is never learned, comes last.
    each = F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none").view_as(ids)
    if token_weights is not None:
        hidden = output.hidden_states[-1].to(token_weights[0].weight.dtype)
        each = each * 2 * torch.sigmoid(token_weights(hidden)[..., 0].roll(-1, 1).to(each.dtype))
    each, counted = (x.reshape(rows, -1) for x in (each, learned.roll(-1, 1)))
    return (each * counted).sum(1) / counted.sum(1).clamp(min=1)


def _check_checkpointing(model: nn.Module, second_order: bool) -> None:
    """Raise ValueError where gradient checkpointing would break the gradients of the inner steps."""
    if any(recomputes_reentrant(module) for module in model.modules()):
        raise ValueError(
            "gradient_checkpointing: inner gradients do not go through reentrant checkpointing; enable it with "
            "{'use_reentrant': False} and outer_gradient fomaml or reptile, or write in eval mode"
        )
    on = any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if on and second_order:
        raise ValueError(
            "gradient_checkpointing: writer.outer_gradient maml goes twice through the inner steps, checkpointing once; "
            "set it to fomaml or reptile, or turn gradient checkpointing off and set writer.unroll"
        )
