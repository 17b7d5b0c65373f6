"""Does `ml.write` read a million tokens at constant memory and constant speed?

    OMP_NUM_THREADS=1 python -m memlayers.eval.speed.stream --output eval/speed/results/stream_cpu.json
    OMP_NUM_THREADS=1 python -m memlayers.eval.speed.stream --kind neural \\
        --output eval/speed/results/stream_neural_cpu.json

Memory tokens read segment by segment; a neural memory (placement `mag`) token by token, under a sliding window. One
call of `ml.write` reads the whole text. After each call that it makes to the decoder (a few segments), resident memory,
the size of the state, wall time and CPU time are noted. `resident_growth_mb` is the highest value after the first
10,000 tokens less the one there, `state_growth_bytes` the same of the state. Every few calls a control is timed at the
same moment: the same number of tokens written into a fresh memory. `over_control` is the stream's median time over the
control's, at the start and at the end, each over a tenth of the text, so that what else runs on the machine drops out.
`us_per_token_from` has the same medians from 4,096 tokens to twice as many, and so on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import memlayers as ml
from memlayers.core.model import decoder_of
from memlayers.eval.speed.timing import where
from memlayers.files import write_text
from memlayers.loading import load_causal_lm

WARM_UP = 10_000
"""Tokens after which memory should not grow any more."""
FLAT_FROM = 4_096
"""Tokens after which the time of a token should not grow any more."""
CONTROL_EVERY = 5
"""Calls to the decoder from one control to the next."""


@dataclass
class Mark:
    """One call to the decoder: tokens read when it ended, seconds it took on the clock and on the CPU, resident
    bytes, the two times of the control where there was one, and bytes of the state."""

    tokens: int
    wall_s: float
    cpu_s: float
    resident: int
    control_wall_s: float | None = None
    control_cpu_s: float | None = None
    state_bytes: int = 0


def load_base(path: str | None) -> tuple[PreTrainedModel, str]:
    """The base and what to call it: a given one, the embedded demo base, or a tiny random Llama."""
    embedded = Path(ml.__file__).parent / "demo" / "base"
    if path or (embedded / "config.json").is_file():
        model = load_causal_lm(path or embedded)
        return model, path or "memlayers/demo/base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    return AutoModelForCausalLM.from_config(config), "a random Llama, 2 layers of width 64"


def measure(
    model: PreTrainedModel, n_tokens: int, progress: bool = True
) -> tuple[list[Mark], ml.MemoryState]:
    """Write `n_tokens` random tokens into memory in one call of `ml.write` and watch.

    Returns:
        a mark for each call to the decoder, and the state at the end.
    """
    ids = torch.randint(3, model.config.vocab_size, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    process, marks = psutil.Process(), []
    clocks, in_control = [time.perf_counter(), time.process_time()], False

    def mark(module, args, kwargs, output):
        nonlocal in_control
        if in_control:
            return
        times = [time.perf_counter() - clocks[0], time.process_time() - clocks[1]]
        size = kwargs["input_ids"].shape[1]
        done = (marks[-1].tokens if marks else 0) + size
        if len(marks) % CONTROL_EVERY == 0:
            in_control = True
            clocks[:] = time.perf_counter(), time.process_time()
            ml.write(model, ids[:, :size])
            times += [time.perf_counter() - clocks[0], time.process_time() - clocks[1]]
            in_control = False
        found = Mark(done, *times[:2], process.memory_info().rss, *times[2:])
        found.state_bytes = kwargs["past_key_values"].memory_state.nbytes
        marks.append(found)
        clocks[:] = time.perf_counter(), time.process_time()

    handle = decoder_of(model).register_forward_hook(mark, with_kwargs=True)
    try:
        state = ml.write(model, ids, progress=progress)
    finally:
        handle.remove()
    return marks, state


def summarize(marks: list[Mark], share: float = 0.1) -> dict:
    """Memory after the warm-up and at the end, and time a token in the first and last `share` after it."""
    after = [mark for mark in marks if mark.tokens >= WARM_UP]
    part = max(1, int(len(after) * share))
    sizes = [b.tokens - a.tokens for a, b in itertools.pairwise(after)]
    full = max(sizes)

    first, last = after[1 : part + 1], after[-part - 1 : -1]  # the last call may be a shorter one

    def time_per_token(clock: str) -> dict:
        def median(where: list[Mark], name: str) -> float:
            known = [getattr(mark, name) for mark in where]
            return 1e6 * statistics.median(value for value in known if value is not None) / full

        start, end = median(first, clock), median(last, clock)
        controls = median(first, f"control_{clock}"), median(last, f"control_{clock}")
        over = start / controls[0], end / controls[1]
        return {
            "start": start,
            "end": end,
            "control_start": controls[0],
            "control_end": controls[1],
            "over_control_start": over[0],
            "over_control_end": over[1],
            "end_over_start": end / start,
            "over_control_end_over_start": over[1] / over[0],
        }

    return {
        "resident_mb_after_10000_tokens": after[0].resident / 1e6,
        "resident_mb_at_the_end": after[-1].resident / 1e6,
        "resident_growth_mb": (max(mark.resident for mark in after) - after[0].resident) / 1e6,
        "us_per_token_wall": time_per_token("wall_s"),
        "us_per_token_cpu": time_per_token("cpu_s"),
        "us_per_token_from": by_length(marks),
        "state_bytes": after[-1].state_bytes,
        "state_growth_bytes": max(mark.state_bytes for mark in after) - after[0].state_bytes,
        "tokens_per_call": full,
        "calls_at_start_and_end": part,
        "wall_s": sum(mark.wall_s for mark in marks),
    }


def by_length(marks: list[Mark]) -> dict[int, dict[str, float]]:
    """Median microseconds a token of the calls between 4,096 and 8,192 tokens, 8,192 and 16,384, and so on."""
    octaves: dict[int, list[tuple[Mark, int]]] = {}
    for before, mark in itertools.pairwise(marks):
        if before.tokens >= FLAT_FROM:
            octave = 1 << (before.tokens.bit_length() - 1)
            octaves.setdefault(octave, []).append((mark, mark.tokens - before.tokens))

    def median(octave: int, name: str) -> float | None:
        known = [
            1e6 * getattr(mark, name) / n for mark, n in octaves[octave] if getattr(mark, name) is not None
        ]
        return statistics.median(known) if known else None

    names = {
        "wall": "wall_s",
        "cpu": "cpu_s",
        "control_wall": "control_wall_s",
        "control_cpu": "control_cpu_s",
    }
    return {octave: {short: median(octave, name) for short, name in names.items()} for octave in octaves}


def memory_config(kind: str, n_tokens: int, segment_length: int, sliding_window: int) -> ml.MemoryConfig:
    """The memory that is measured: `tokens` with its two sizes, or `neural` under a window."""
    if kind == "neural":  # untrained, on random tokens: steps so small that it stays finite
        return ml.NeuralMemoryConfig(placement="mag", sliding_window=sliding_window, theta_max=0.01)
    return ml.MemoryTokensConfig(n_tokens=n_tokens, segment_length=segment_length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to write (default: 1,000,000)")
    parser.add_argument("--base", help="folder or hub id of a base; default: the embedded demo base")
    parser.add_argument("--kind", choices=("tokens", "neural"), default="tokens", help="default: tokens")
    parser.add_argument("--n-tokens", type=int, default=8, help="tokens: memory tokens (default: 8)")
    parser.add_argument("--segment-length", type=int, default=32, help="tokens: per segment (default: 32)")
    parser.add_argument("--sliding-window", type=int, default=32, help="neural: of attention (default: 32)")
    parser.add_argument("--output", type=Path, help="where to write the JSON as well")
    options = parser.parse_args()
    if options.tokens < 2 * WARM_UP:
        parser.error(f"--tokens: at least {2 * WARM_UP}, since memory is compared after {WARM_UP}")

    model, name = load_base(options.base)
    config = memory_config(options.kind, options.n_tokens, options.segment_length, options.sliding_window)
    ml.attach(model.eval(), config)
    marks, _ = measure(model, options.tokens)
    report = {
        "tokens": options.tokens,
        "base": name,
        "memory": config.model_dump(),
        **summarize(marks),
        **where("cpu", "transformers", "psutil"),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.output:
        write_text(options.output, text + "\n")


if __name__ == "__main__":
    main()
