"""What stands over a model's own methods once it has memory: state in, state out.

`forward` of the model takes and returns a `MemoryState`, `forward` of its decoder reads, also where it is called by itself,
and `prepare_inputs_for_generation` tells prompt from generated tokens. Under `torch.compile` all of it runs as it stands.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from . import checks
from .cache import MemoryCache
from .call import BLOCK, CALL, Block, Call, holding
from .follow import follow
from .hooks import IgnoredKey, LayerHook, MethodOverride, Uncompiled
from .loop import run
from .memory import StatefulMemory
from .model import Memories, decoder_layers, decoder_of, text_config
from .outputs import with_state
from .state import MemoryState

EXTRA = (("memory_state", None), ("close_memory", False), ("write_memory", None))
"""Arguments of a forward call beside the model's own, and their defaults; see `ModelForward`."""


def override_methods(model: nn.Module, root: Memories) -> None:
    """Put all that stands on the whole model; each has a method `remove`."""
    decoder = decoder_of(model)
    root.hooks = [
        ModelForward(root, model, decoder),
        DecoderForward(root, decoder),
        PrepareInputs(root, model),
    ]
    if model.base_model not in (model, decoder):
        root.hooks.append(BodyForward(root, model.base_model, decoder))
    root.hooks += [LayerHook(root, layer, i) for i, layer in enumerate(decoder_layers(decoder))]
    root.hooks.append(IgnoredKey(model))


class ModelForward(Uncompiled):
    """The model's forward with memory.

    Besides the model's own arguments it takes

    * memory_state: a `MemoryState` to continue from; default: the one on `past_key_values`, else a fresh one.
    * close_memory: write the open segment at the end, so that the next call sees it only through memory.
    * write_memory: False leaves full segments unwritten, as while decoding. Default: True, but for a single
      token after a cache that has some. Memories that every token changes write every token, and with False give back
      the state as it was.

    The output has `memory_state` and, where a cache is used, a `MemoryCache`.

    Raises:
        ValueError: labels of another length than the input; a state of another batch size or memory, or where
            no memory keeps one; a cache of another model; what memory cannot serve, such as attention maps of segments.
    """

    def __init__(self, root: Memories, model: nn.Module, decoder: nn.Module):
        super().__init__(model, "forward")
        self.memories, self.decoder = root, decoder

    @property
    def __signature__(self) -> inspect.Signature:
        signature = super().__signature__
        extra = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in EXTRA]
        own = list(signature.parameters.values())
        at_end = own[-1:] if own[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        return signature.replace(parameters=own[: len(own) - len(at_end)] + extra + at_end)

    def call(self, *args, memory_state=None, close_memory=False, write_memory=None, **kwargs):
        arguments = self.by_name(args, kwargs)
        follow(self.memories.hooks[0].module)
        if not any(isinstance(m, StatefulMemory) for m in self.memories.enabled().values()):
            checks.check_stateless(memory_state, arguments.get("past_key_values"))
            with holding(CALL, without_state(self.memories, self.decoder)):
                return self.original(**arguments)
        call = begin(self.memories, self.decoder, arguments, memory_state, close_memory, write_memory)
        arguments["past_key_values"] = call.cache
        as_tuple = arguments.pop("return_dict", None) is False
        with holding(CALL, call):
            output = self.original(**arguments, return_dict=True)
        if not call.done:
            raise ValueError(
                f"{type(self.module).__name__} did not call its decoder, so that memory was not read"
            )
        output = with_state(output, call.cache.memory_state)
        return output.to_tuple() if as_tuple else output


class BodyForward(ModelForward):
    """The forward of what the head stands on, where that is a wrapper around the decoder: called by itself it knows the
    caller's mask and images, which the decoder is not given."""

    def call(self, *args, **kwargs):
        call = CALL.get()
        if call is not None and call.decoder is self.decoder and not call.done:
            return self.original(*args, **kwargs)
        checks.check_head(self.memories.enabled(), self.decoder)
        return super().call(*args, **kwargs)


class DecoderForward(Uncompiled):
    """The decoder's forward: takes the call that its model has begun, or begins one, and reads. Called by itself it takes
    and returns what `ModelForward` does."""

    def __init__(self, root: Memories, decoder: nn.Module):
        super().__init__(decoder, "forward")
        self.memories = root

    def call(self, *args, **kwargs):
        arguments, decoder = self.by_name(args, kwargs), self.module
        checks.check_not_inside(BLOCK.get(), decoder)
        call, enabled = CALL.get(), self.memories.enabled()
        own = call is None or call.decoder is not decoder or call.done
        if own:
            follow(self.memories.hooks[0].module)
            checks.check_head(enabled, decoder)
        if not any(isinstance(m, StatefulMemory) for m in enabled.values()):
            checks.check_stateless(arguments.pop("memory_state", None), arguments.get("past_key_values"))
            with holding(BLOCK, Block(without_state(self.memories, decoder))):
                return self.original(**arguments)
        if own:
            asked = [arguments.pop(name, default) for name, default in EXTRA]
            call = begin(self.memories, decoder, arguments, *asked)
        as_tuple = arguments.get("return_dict") is False
        output = self._read(call, arguments)
        if not own:
            return output
        output = with_state(output, call.cache.memory_state)
        return output.to_tuple() if as_tuple else output

    def _read(self, call: Call, arguments: dict):
        ids, embeds = arguments.pop("input_ids", None), arguments.pop("inputs_embeds", None)
        embeds = self.module.get_input_embeddings()(ids) if embeds is None else embeds
        mask, positions = arguments.pop("attention_mask", None), arguments.pop("position_ids", None)
        if call.mask is None:
            call.mask = checks.new_mask(mask, embeds)
        checks.check_unpacked(positions, call.mask)
        for counted_here in ("cache_position", "use_cache", "past_key_values", "return_dict"):
            arguments.pop(counted_here, None)
        return run(call, self.original, embeds, mask, positions, **arguments)


class PrepareInputs(MethodOverride):
    """Tells the forward call whether it sees the prompt or what was generated."""

    def __init__(self, root: Memories, model: nn.Module):
        super().__init__(model, "prepare_inputs_for_generation")
        self.memories = root

    def call(self, *args, is_first_iteration=False, memory_state=None, write_memory=None, **kwargs):
        close_memory = kwargs.pop("close_memory", False)
        inputs = self.original(*args, is_first_iteration=is_first_iteration, **kwargs)
        reading = [m for m in self.memories.enabled().values() if isinstance(m, StatefulMemory)]
        if not reading:
            return inputs
        past = inputs.get("past_key_values")
        if isinstance(past, MemoryCache) and inputs.get("use_cache") is False:
            # Every step is given all tokens so far, and each is to begin with the same memory.
            memory_state = past.memory_state if memory_state is None else memory_state
            inputs["past_key_values"] = past = None
        has_cache, carried = past is not None, getattr(past, "memory_state", None)
        if memory_state is not None and carried is None and (is_first_iteration or not has_cache):
            inputs["memory_state"] = memory_state
        if close_memory and (is_first_iteration or not has_cache):
            inputs["close_memory"] = True
        if reading[0].schedule.kv == "drop":
            inputs["write_memory"] = is_first_iteration if write_memory is None else write_memory
            if not has_cache:
                inputs["write_memory"] = True
        return inputs


def without_state(root: Memories, decoder: nn.Module) -> Call:
    """A call in which no memory keeps a state."""
    return Call(decoder, decoder_layers(decoder), {}, root.enabled(), cache=None)


def begin(
    root: Memories,
    decoder: nn.Module,
    arguments: dict,
    state: MemoryState | None = None,
    flush: bool = False,
    write: bool | None = None,
) -> Call:
    """The call that these arguments, of the model's or the decoder's forward, ask for; checked."""
    given = [arguments.get(name) for name in ("input_ids", "inputs_embeds", "labels")]
    inputs = checks.checked_inputs(*given)
    enabled, config = root.enabled(), text_config(decoder)
    reading = {n: m for n, m in enabled.items() if isinstance(m, StatefulMemory)}
    others = {n: m for n, m in enabled.items() if n not in reading}
    past = arguments.get("past_key_values")
    state = checks.checked_state(past, root.key, state)
    checks.check_state(reading, state, inputs.shape[0] // getattr(past, "rows_per_state", 1))
    cache = MemoryCache.of(past)
    layers = decoder_layers(decoder)
    recomputes = decoder.training and any(getattr(x, "gradient_checkpointing", False) for x in layers)
    use_cache = arguments.get("use_cache")
    use_cache = getattr(config, "use_cache", False) if use_cache is None else use_cache
    call = Call(decoder, layers, reading, others, cache, flush=flush, blocks_keep_kv=not recomputes)
    call.keep_kv = bool(use_cache) and not recomputes
    framed = call.schedule.kv == "drop"
    decoding = framed and inputs.shape[1] == 1 and cache.seen > 0
    call.write = not decoding if write is None else write
    call.write |= framed and any(getattr(m.config, "write_while_decoding", False) for m in reading.values())
    mask = arguments.get("attention_mask")
    if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        call.mask = checks.new_mask(mask, inputs)
    checks.check_served(call, arguments, config)
    # Only now: a call that is refused leaves the cache as it was.
    cache.memory_state, cache.owner = state, root.key
    cache.written_by_reading = any(m.gradient_writer is None for m in reading.values())
    return call
