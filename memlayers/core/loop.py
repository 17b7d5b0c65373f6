"""How a decoder with memory reads: in blocks, each a pass of its layers, with the state handed from block to block.

How a text is cut is the memories' `Schedule`:

* `drop`: segments of a row's tokens, counted from its first real one. Each runs as [read tokens ; segment ; write
  tokens], with positions from 0 and no keys or values from the segment before; memory is all that passes on. The last
  segment stays open: its tokens are *pending* in the state, the next call continues them, and they are written when the
  segment is full and another token comes, or when the call flushes. So a text may be split over calls anywhere.
  Rows of different length are lined up at the end, so that all open segments run together.
* `keep`: all tokens of a call in one block, with the caller's positions and mask, as in the base.
* `slide`: blocks that see the keys and values which a sliding window still reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache

from .call import BLOCK, Block, Call, holding
from .checks import check_table, check_width
from .masks import none_if_full, padding_first, positions_of, slide, sliding_masks, used_columns
from .memory import LayerMemory, check_field, fresh_state
from .model import new_cache, text_config
from .outputs import connected, joined, per_token
from .schedule import Plan, take
from .state import PENDING, Fields, MemoryState


@dataclass
class Piece:
    """The tokens of one block.

    Attributes:
        tokens, mask: embeddings (batch, n, hidden_size), and bool (batch, n), False at padding.
        attention_mask, position_ids, window: as the decoder is given them.
        writes: whether what is read is written too; n_after: segments that follow.
        text: columns of the tokens among those that run.
        inverse: columns that run → where they were before padding was moved to the front; None: not moved.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    attention_mask: torch.Tensor | dict | None = None
    position_ids: torch.Tensor | None = None
    window: Cache | None = None
    writes: bool = True
    n_after: int = 0
    text: slice = field(default_factory=lambda: slice(None))
    inverse: torch.Tensor | None = None

    def at_text(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """(batch, columns, width) as it ran → at the tokens."""
        if x is None:
            return None
        return (x if self.inverse is None else take(x, self.inverse))[:, self.text]


def run(
    call: Call,
    forward: Callable,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
):
    """Read `embeds` (batch, tokens, hidden_size) and leave the new state on the call's cache.

    Args:
        forward: the decoder's own.
        attention_mask, position_ids: the caller's; in segments positions are counted anew.

    Returns:
        The decoder's output, of its own class, at the places of `embeds`, zero at padding.
    """
    state = call.cache.memory_state or _fresh(call, embeds)
    reading = _reading(call, state, embeds, attention_mask, position_ids)
    fields = {name: state[name] for name in call.memories}
    if not getattr(text_config(call.decoder), "return_dict", True):
        kwargs["return_dict"] = True
    outputs, parts = None, []
    for piece in reading.pieces():
        block = Block(call, fields, piece.mask, piece.writes, piece.window)
        if reading.framed:
            _frame(block, piece)
        with holding(BLOCK, block):
            outputs = forward(
                inputs_embeds=piece.tokens,
                attention_mask=piece.attention_mask,
                position_ids=piece.position_ids,
                past_key_values=piece.window,
                use_cache=piece.window is not None,
                **kwargs,
            )
        fields = _updated(block, piece)
        if piece.n_after:
            fields = _truncate(call, fields, piece.n_after)
        parts.append(per_token(outputs, piece))
    parts_of_state = {**(fields if call.write or reading.framed else {}), **reading.pending()}
    call.cache.memory_state = state.replace(parts_of_state)
    call.cache.seen += embeds.shape[1]
    call.done = True
    whole = {name: joined([p[name] for p in parts], reading.restore) for name in parts[0]}
    if "router_logits" in whole and outputs.router_logits[0].dim() == 2:
        whole["router_logits"] = tuple(x.flatten(0, 1) for x in whole["router_logits"])
    whole["last_hidden_state"] = connected(call, whole["last_hidden_state"])
    if len(parts) == 1 and not reading.framed:
        whole = {**outputs, **whole}  # attentions too
    whole["past_key_values"] = call.cache if call.keep_kv else None
    return type(outputs)(**whole)


def _fresh(call: Call, embeds: torch.Tensor) -> MemoryState:
    """The state before anything was read, for the rows, width, dtype and device of `embeds`."""
    rows, _, width = embeds.shape
    pending = {
        "embeds": embeds.new_zeros(rows, 0, width),
        "length": torch.zeros(rows, dtype=torch.int64, device=embeds.device),
    }
    with_pending = {PENDING: pending} if call.schedule.kv == "drop" else {}
    return fresh_state(call.memories, rows // call.cache.rows_per_state, with_pending)


def _reading(call: Call, state, embeds, attention_mask, position_ids) -> Segments | OpenSegment | Blocks:
    if call.schedule.kv != "drop":
        return Blocks(call, state, embeds, attention_mask, position_ids)
    check_field(PENDING, "embeds", state[PENDING]["embeds"], ("batch", None, embeds.shape[2]), embeds.dtype)
    fits = bool((state[PENDING]["length"] + call.mask.sum(1)).max() <= call.schedule.reach)
    window = call.cache.window
    goes_on = window is not None and not call.flush and (fits or not call.write)
    if goes_on and (embeds.shape[1] == 1 or not any(window.is_linear)):  # which go on token by token only
        return OpenSegment(call, state, embeds)
    return Segments(call, state, embeds)


class Segments:
    """Segments that run apart, from the first pending token on."""

    framed = True

    def __init__(self, call: Call, state: MemoryState, embeds: torch.Tensor):
        self.call, self.n_tokens, old = call, embeds.shape[1], state[PENDING]
        source = torch.cat([old["embeds"].to(embeds.dtype), embeds], dim=1)
        mask = torch.cat([used_columns(old), call.mask], dim=1)
        self.size = call.schedule.reach if call.write or call.flush else source.shape[1]
        self.plan = Plan.of(mask, self.size)
        self.tokens, self.filled = self.plan.arrange(source, mask)

    def pieces(self) -> Iterator[Piece]:
        call, cache, n_segments = self.call, self.call.cache, self.plan.n_segments
        cache.window = cache.window_mask = None
        for index in range(n_segments):
            here, last = slice(index * self.size, (index + 1) * self.size), index == n_segments - 1
            window = new_cache(call.decoder, whole=True) if last and call.keep_kv and not call.flush else None
            piece = Piece(
                self.tokens[:, here], self.filled[:, here], window=window, writes=call.flush or not last
            )
            piece.n_after = n_segments - 1 - index
            yield piece
            if window is not None:
                cache.window, cache.window_mask = window, piece.mask

    def pending(self) -> dict[str, Fields]:
        if self.call.flush:
            return {
                PENDING: {"embeds": self.tokens[:, :0], "length": torch.zeros_like(self.plan.last_length)}
            }
        start = (self.plan.n_segments - 1) * self.size
        return {PENDING: {"embeds": self.tokens[:, start:], "length": self.plan.last_length}}

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        return self.plan.restore(x, self.n_tokens)


class OpenSegment:
    """New tokens that still belong to the open segment, whose keys and values are there."""

    framed = False

    def __init__(self, call: Call, state: MemoryState, embeds: torch.Tensor):
        self.call, self.embeds, self.old = call, embeds, state[PENDING]

    def pieces(self) -> Iterator[Piece]:
        call, cache, n_tokens = self.call, self.call.cache, self.embeds.shape[1]
        check_width(call, cache.window_mask.shape[1] + n_tokens)
        cache.window_mask = torch.cat([cache.window_mask, call.mask], dim=1)
        positions = positions_of(cache.window_mask)[:, -n_tokens:]
        seen = none_if_full(cache.window_mask)
        yield Piece(self.embeds, call.mask, seen, positions, cache.window, writes=False)

    def pending(self) -> dict[str, Fields]:
        mask, old = self.call.mask, self.old
        tokens = torch.cat([old["embeds"].to(self.embeds.dtype), self.embeds], dim=1)
        used = torch.cat([used_columns(old), mask], dim=1)
        if not mask.all():
            tokens = take(tokens, padding_first(used))
        return {PENDING: {"embeds": tokens, "length": used.sum(1)}}

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Blocks:
    """Every token as it passes: all of a call in one block, or in blocks under a sliding window."""

    framed = False

    def __init__(self, call: Call, state: MemoryState, embeds, attention_mask, position_ids):
        self.call, self.embeds, self.attention_mask = call, embeds, attention_mask
        taken = [memory.positions(state[name]) for name, memory in call.memories.items()]
        taken = [positions for positions in taken if positions is not None]
        slides, n_tokens = call.schedule.kv == "slide", embeds.shape[1]
        if position_ids is None and (taken or slides):
            position_ids = call.cache.seen + torch.arange(n_tokens, device=embeds.device)[None]
        if taken:
            before = sum(taken).to(embeds.device).repeat_interleave(call.cache.rows_per_state)
            position_ids = position_ids + before[:, None]
        if taken or slides:
            check_table(call, position_ids)
        self.position_ids = position_ids

    def pieces(self) -> Iterator[Piece]:
        call, cache = self.call, self.call.cache
        if call.schedule.kv == "slide":
            yield from self._sliding()
            return
        if cache.window is None and call.keep_kv:
            cache.window = new_cache(call.decoder)
        yield Piece(self.embeds, call.mask, self.attention_mask, self.position_ids, cache.window)

    def _sliding(self) -> Iterator[Piece]:
        call, cache, n_tokens = self.call, self.call.cache, self.embeds.shape[1]
        reach, config = call.schedule.reach, text_config(call.decoder)
        window, mask = cache.window or new_cache(call.decoder, whole=True), cache.window_mask
        mask = call.mask[:, :0] if mask is None else mask
        size = call.schedule.block if call.blocks_keep_kv else n_tokens
        alone = n_tokens <= size and not call.keep_kv and window.get_seq_length() == 0
        for start in range(0, n_tokens, size):
            here = slice(start, start + size)
            new = call.mask[:, here]
            mask = torch.cat([mask, new], dim=1)
            seen = sliding_masks(config, mask, new.shape[1], reach, self.embeds)
            given = None if alone else window
            yield Piece(self.embeds[:, here], new, seen, self.position_ids[:, here], given)
            mask = slide(window, mask, reach - 1)
        if call.keep_kv:
            cache.window, cache.window_mask = window, mask

    def pending(self) -> dict[str, Fields]:
        return {}

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _frame(block: Block, piece: Piece) -> None:
    """Put the memories' tokens around a segment, in place: [read ; segment ; write], with padding before all."""
    memories, tokens, mask = block.call.memories, piece.tokens, piece.mask
    reads = [read for name, m in memories.items() if (read := m.read_inputs(block.fields[name])) is not None]
    reads = [(x, used) for x, used in reads if used.any()]  # what nobody has written yet is not there
    found = {name: memory.write_inputs(block.fields[name]) for name, memory in memories.items()}
    writers = {name: x for name, x in found.items() if x is not None} if piece.writes else {}
    start = sum(x.shape[1] for x, _ in reads)
    stop = start + tokens.shape[1]
    write_at = dict.fromkeys(memories, slice(stop - 1, stop))
    for name, writer in writers.items():
        write_at[name] = slice(stop, stop + writer.shape[1])
        stop += writer.shape[1]
    check_width(block.call, stop)
    sequence = [*(x for x, _ in reads), tokens, *writers.values()]
    sequence = torch.cat([x.to(tokens.dtype) for x in sequence], dim=1)
    always = mask.new_ones(len(mask), 1).expand(-1, stop - start - tokens.shape[1])
    block.active, block.write_at = mask.any(1), write_at
    block.segment, block.segment_mask = tokens, mask
    mask = torch.cat([*(used for _, used in reads), mask, always], dim=1)
    if not mask.all():  # the real tokens keep their order, so that the last columns are the writers' still
        order = padding_first(mask)
        piece.inverse = order.argsort(dim=1)
        sequence, mask = take(sequence, order), mask.gather(1, order)
    piece.tokens, piece.mask, piece.text = sequence, mask, slice(start, start + tokens.shape[1])
    piece.attention_mask, piece.position_ids = none_if_full(mask), positions_of(mask)
    block.mask = mask
    if piece.writes:
        block.keep_outputs = frozenset(m.write_layer for m in memories.values() if m.write_layer is not None)


def _updated(block: Block, piece: Piece) -> dict[str, Fields]:
    """The fields after a block: what layers left, and what memories make of its outputs."""
    fields = {**block.fields, **block.after}
    if block.active is None or not piece.writes:
        return fields
    for name, memory in block.call.memories.items():
        if isinstance(memory, LayerMemory):
            continue
        written = block.outputs.get(memory.write_layer)
        if written is not None:
            written = written if piece.inverse is None else take(written, piece.inverse)
            written = written[:, block.write_at[name]]
        fields[name] = memory.update(block.fields[name], written, block.segment, block.segment_mask)
    return fields


def _truncate(call: Call, fields: dict[str, Fields], to_end: int) -> dict[str, Fields]:
    """Cut the gradient between segments: `bptt_segments` of them stay connected, counted from the end."""
    cut = {}
    for name, part in fields.items():
        length = getattr(call.memories[name].config, "bptt_segments", None)
        detach = length is not None and to_end % length == 0
        cut[name] = {f: t.detach() for f, t in part.items()} if detach else part
    return cut
