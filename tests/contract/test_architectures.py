"""The contract on many architectures: cached generation equals a recompute, states survive splits, rows stay apart.

Where a base itself does not hold one of these (its facts in `architectures.TINY`), memory is not asked to.
"""

import pytest
import torch
from architectures import TINY
from matrix import near, pad, same_state, wrap
from matrix_kinds import SEGMENT, Kind

import memlayers as ml

WRITER = {"steps": 2, "learning_rate": 0.3, "optimizer": "sgd", "segment_length": SEGMENT}
NEURAL = {"layers": [-1], "heads": 2, "chunk_size": 4, "conv_kernel": 3}
KINDS = {
    "tokens": ml.MemoryTokensConfig(n_tokens=2, segment_length=SEGMENT),
    "reversible": ml.ReversibleMemoryConfig(n_tokens=1, ratios=[SEGMENT], heads=4, depth=2),
    "associative": ml.AssociativeMemoryConfig(n_tokens=3, segment_length=SEGMENT, key_dim=16),
    "mag": ml.NeuralMemoryConfig(**NEURAL),
    "mac": ml.NeuralMemoryConfig(**NEURAL, placement="mac", segment_length=SEGMENT),
    "window": ml.NeuralMemoryConfig(**NEURAL, sliding_window=4),
    "lora": ml.LoRAMemoryConfig(r=4, lora_alpha=8, writer=WRITER),
    "cartridge": ml.CartridgeConfig(n_tokens=3, writer=WRITER),
    "product_key": ml.ProductKeyMemoryConfig(layers=[-1], n_keys=8, heads=2, top_k=4, key_dim=8),
    "task_tokens": ml.TaskTokensConfig(names=["sort", "copy"]),
}
STATELESS, SEGMENTED = ("product_key", "task_tokens"), ("tokens", "reversible", "associative", "mac")
REFUSED = {
    "mac": {"bloom", "mpt", "deepseek_v2", "llama4_text"},
    "window": {"bloom"},
    "cartridge": {"bloom", "mpt", "gpt_neo"},
    "lora": set(),
}
"""Architectures on which a kind is refused by `attach`, which says why; the rest of the table is `docs/architectures.md`."""
ARCHITECTURES = [tiny for tiny in TINY if tiny.group != "odd"]


def cells():
    for tiny in ARCHITECTURES:
        for kind in KINDS:
            yield pytest.param(tiny, kind, id=f"{tiny.name}-{kind}")


def model_of(tiny, kind):
    try:
        return wrap(tiny.build(), Kind(kind, {"m": KINDS[kind]}))
    except ml.ConfigError as error:
        pytest.skip(f"refused: {error}")


def ids_of(rows, n, seed=0):
    return torch.randint(3, 100, (rows, n), generator=torch.Generator().manual_seed(seed))


def positions(kind, mask):
    return {} if kind in SEGMENTED else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
@pytest.mark.parametrize(("tiny", "kind"), cells())
def test_generation_states_and_rows(tiny, kind):
    model, ids = model_of(tiny, kind), ids_of(2, 13)
    state = None if kind in STATELESS else ml.write(model, ids_of(2, 2 * SEGMENT + 2, seed=1))
    given = {} if state is None else {"memory_state": state}

    if tiny.cached:  # greedy with a cache against all tokens so far, without one
        cache, logits, text = None, [], ids[:, :7]
        where = torch.arange(ids.shape[1])[None]
        for start, stop in [(0, 7), *((i, i + 1) for i in range(7, 12))]:
            step = dict(given) if cache is None else {"past_key_values": cache}
            if kind in SEGMENTED:
                step["write_memory"] = start == 0
            else:
                step["position_ids"] = where[:, start:stop]
            output = model(ids[:, start:stop], use_cache=True, **step)
            cache = output.past_key_values
            logits.append(output.logits[:, -1])
        if kind in SEGMENTED:
            first = model(text, use_cache=False, **given)
            rest = model(ids[:, 7:12], memory_state=first.memory_state, write_memory=False, use_cache=False)
            expected = torch.cat([first.logits[:, -1:], rest.logits], 1)
        else:
            expected = model(ids[:, :12], use_cache=False, **given).logits[:, 6:]
        near(torch.stack(logits, 1), expected, 1e-3)

    if kind in SEGMENTED:  # a text may be split anywhere
        parts = ml.write(model, ids[:, 9:], ml.write(model, ids[:, :9], close=False))
        same_state(parts, ml.write(model, ids), 1e-3)

    if tiny.padded:  # rows of different length beside each other, and alone
        rows = [ids[0], ids[1, :4]]
        batch, mask = pad(rows, "left")
        batch = batch.where(mask.bool(), 5)
        together = model(batch, attention_mask=mask, use_cache=False, **positions(kind, mask), **given)
        for i, row in enumerate(rows):
            alone = {} if state is None else {"memory_state": state.select([i])}
            got = model(row[None], use_cache=False, **alone)
            near(together.logits[i, -len(row) :], got.logits[0], 1e-3)
            if state is not None and i == 0:  # the other's state may be padded
                mine = [
                    ml.MemoryState({"m": s["m"]})
                    for s in (together.memory_state.select([i]), got.memory_state)
                ]
                same_state(*mine, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_is_known(kind):
    """A kind that suddenly refuses an architecture would else only show as one more skipped cell."""
    dense = [tiny for tiny in ARCHITECTURES if tiny.group in ("dense", "moe", "multimodal")]
    refused = set()
    for tiny in dense:
        try:
            ml.attach(tiny.build(), KINDS[kind])
        except ml.ConfigError:
            refused.add(tiny.name)
    assert refused <= REFUSED.get(kind, set()) | {"qwen3_5"}
