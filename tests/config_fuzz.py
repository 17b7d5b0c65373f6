"""Configs that are nearly right, from a seed: Python values, YAML texts and overrides. For tests/test_fuzzed_configs.py."""

from __future__ import annotations

import copy
import datetime
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy
import yaml

import memlayers as ml
from memlayers.config import Strict
from memlayers.eval.registry import EXPERIMENTS
from memlayers.kinds import KINDS
from memlayers.tasks import FactsConfig, ProceduresConfig
from memlayers.tasks.mqar import MqarConfig
from memlayers.tasks.needle import NeedleConfig
from memlayers.tasks.passkey import PasskeyConfig
from memlayers.tasks.updates import UpdatesConfig
from memlayers.train.config import TrainConfig

PASSKEY = {"type": "passkey"}
TASK = {"type": "task", "task": PASSKEY}
FILES = {"files": ["a.txt"]}
TRAIN = {"model": {"path": "base"}, "output_dir": "out"}
MEMORIES: dict[type, list[dict]] = {
    **{config: [{}] for config, _ in KINDS.values()},
    ml.MemoryTokensConfig: [{}, {"mode": "prefix", "writer_dim": 8}, {"mode": "accumulate"}],
    ml.NeuralMemoryConfig: [{}, {"placement": "mac", "segment_length": 16}, {"depth": 2}, {"rule": "atlas"}],
    ml.CartridgeConfig: [
        {"n_tokens": 4},
        {"start": "learned"},
        {"start": "prompt", "writer": {"distill": {}}},
    ],
    ml.ProductKeyMemoryConfig: [{"n_keys": 8, "top_k": 2}, {"gate": "learned", "n_keys": 8, "top_k": 2}],
    ml.TaskTokensConfig: [{"names": ["add", "sub"], "init_from": {"add": "sum"}}],
}
EVALUATIONS: dict[str, dict] = {
    "recall": {"model": "m", "suites": {"s": {"task": PASSKEY, "lengths": [32]}}},
    "facts": {"model": "m"},
    "pairs": {"model": "m", "n_pairs": [2]},
    "perplexity": {"model": "m", "prose": {"file": "x.txt"}},
    "bank": {"model": "m"},
    "bits": {"model": "m", "kinds": {"k": {"memory": {"type": "tokens"}, "field": "n_tokens", "sizes": [1]}}},
    "capacity": {"model": "m"},
    "cartridge": {"model": "m", "texts": {"t": {}}, "writers": {"w": {}}},
    "procedures": {"base": "b", "arms": {"a": {"type": "task_tokens"}, "l": {"type": "lora"}}},
    "reversible": {"model": "m", "file": "f", "arms": {"a": {"n_tokens": 2}}},
    "finetuned": {"model": "m", "prose": {"file": "f"}},
}
STARTS: dict[type[Strict], list[dict]] = {
    **MEMORIES,
    TrainConfig: [
        {**TRAIN, "data": {**TASK, "segments": 2}, "memories": {"m": {"type": "tokens"}}},
        {**TRAIN, "data": TASK, "curriculum": {"segments": {"stop": 3}}, "optimizer": {"values": {}}},
        {**TRAIN, "data": {"type": "jsonl", **FILES}, "train_what": "memory_and_lora", "lora": {}},
        {**TRAIN, "data": {"type": "text", **FILES}, "background": {**FILES}},
        {**TRAIN, "data": {"type": "facts"}, "loss": {"answer": 1.0}, "stop_at": None},
        {**TRAIN, "data": {"type": "procedures"}},
        {**TRAIN, "data": {"type": "dataset", "path": "d"}},
        {
            **TRAIN,
            "data": {**TASK, "segments": 2},
            "model": {"config": {"model_type": "llama"}, "tokenizer": "t"},
        },
    ],
    **{EXPERIMENTS[name].config: [fields] for name, fields in EVALUATIONS.items()},
    ml.LoRABankConfig: [{}],
    **{
        task: [{}]
        for task in (PasskeyConfig, NeedleConfig, MqarConfig, UpdatesConfig, FactsConfig, ProceduresConfig)
    },
}
"""Fields of each class that are right; what they leave out is filled with the defaults."""


class Silent:
    """An object that cannot even be shown."""

    def __repr__(self):
        raise RuntimeError


def odd(rng: random.Random) -> Any:
    """A value that a field does not expect."""
    circle: dict = {}
    circle["x"] = [circle]
    deep: Any = 1
    for _ in range(rng.choice((5, 60, 5000))):
        deep = [deep]
    bomb: Any = ["x"] * 10
    for _ in range(rng.choice((2, 2, 2, 2, 9))):
        bomb = [bomb] * 10
    number = rng.choice((1, -1)) * 10 ** rng.choice((0, 1, 3, 6, 9, 12, 18, 19, 400, 5000))
    return rng.choice(
        [
            *(None, True, 0, number, number, number, 2**31, 2**63, 0.5, -0.0, 1e300, -1e38, 1e-300),
            *(math.nan, math.inf, -math.inf, "", "x", "all-linear", "\ud800", "a\0b", "a" * 10_000, "tokens"),
            *(b"\xff", [], {}, [[]], [number], [math.nan], {"type": []}, {"type": "tokens"}, {"a": number}),
            *({1: 2}, {None: 1}, {("a",): 1}, {"\ud800": 1}, {"": 1}, {1, 2}, (1, 2), circle, deep, bomb),
            *(
                Silent(),
                object(),
                int,
                numpy.int64(3),
                numpy.float32(1),
                numpy.float64("nan"),
                numpy.zeros(2),
            ),
            *(datetime.date(2024, 1, 1), 1j, range(3), Strict(), ml.MemoryTokensConfig(), NotImplemented),
        ]
    )


def resize(rng: random.Random, data: dict) -> dict:
    """`data` with some of its numbers at other sizes, most of which their fields take."""
    places = list(_numbers(data))
    for place, key in rng.sample(places, min(len(places), rng.randrange(1, 4))):
        whole = isinstance(place[key], int)
        place[key] = int(10 ** rng.uniform(0, 5)) if whole else 10 ** rng.uniform(-6, 3)
        if rng.random() < 0.05:
            place[key] = rng.choice([0, -1, 10**9, 1e300, None])
    return data


def _numbers(data: Any) -> Iterator[tuple[Any, Any]]:
    """Where the numbers in `data` are."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if type(value) in (int, float):
            yield data, key
        elif isinstance(value, dict | list):
            yield from _numbers(value)


def start(rng: random.Random, of: type[Strict]) -> dict:
    """All fields of a right config of a class, as plain values."""
    return of(**copy.deepcopy(rng.choice(STARTS[of]))).model_dump()


def spoil(rng: random.Random, data: dict, times: int) -> dict:
    """`data` with some values replaced by odd ones, taken out, misspelt or put elsewhere."""
    for _ in range(times):
        here, path = data, []
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                break
            key = rng.choice(keys)
            path.append((here, key))
            if not isinstance(here[key], dict | list) or not here[key] or rng.random() < 0.2:
                break
            here = here[key]
        if not path:
            return data
        place, key = path[-1]
        how = rng.random()
        if how < 0.75 or isinstance(place, list):
            place[key] = odd(rng)
        elif how < 0.85:
            del place[key]
        elif how < 0.95:
            place[f"{key}s"] = place.pop(key)
        else:
            place[rng.choice([key, "type", "zzz", 1, None, ("a",), "a.b", ""])] = odd(rng)
    return data


SNIPPETS = (
    *(
        "[" * 3000,
        "{a: " * 2000,
        "&a [*a]",
        "*a",
        "<<: *a",
        "? [a]\n: b",
        "1: x",
        "null: x",
        "[a]: b",
        "{a: b}: c",
        "---\n",
    ),
    *(
        "!!python/object/apply:os.system [ls]",
        "!!binary '*'",
        "!!set {a}",
        "!!bool x",
        "!!int x",
        "!!float y",
        "!!omap [a: 1]",
    ),
    *(
        "!!timestamp x",
        "2024-99-99",
        "2024-01-01",
        "1:99:99",
        "0x" + "f" * 5000,
        "1" * 5000,
        ".inf",
        ".nan",
        "1e400",
        "0b2",
    ),
    *(
        '"\\ud800"',
        '"\\0"',
        "\t",
        "\0",
        "\x85",
        "\u2028",
        "\ufeff",
        "'",
        '"',
        "|\n x",
        ">\n",
        "%YAML 9.9\n",
        "@",
        "`",
        "type: [x]",
    ),
    *(
        "a: &a [x,x,x,x,x]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b]",
        "=",
        "~",
        "-",
        "- a\n",
        ": ",
        "#" * 2000,
        "x" * 2000,
        "\n\n",
        "!",
        "&",
    ),
)


def yaml_file(rng: random.Random, of: type[Strict]) -> bytes:
    """The bytes of a YAML file, spoiled as text and sometimes as bytes."""
    text = yaml.safe_dump(start(rng, of))
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(text) + 1)
        how = rng.random()
        if how < 0.5:
            text = text[:at] + rng.choice(SNIPPETS) + text[at:]
        elif how < 0.7:
            end = text.find("\n", at)
            text = text[:at] + rng.choice(SNIPPETS) + (text[end:] if end >= 0 else "")
        elif how < 0.85:
            text = text[:at] + text[at + rng.randrange(1, 30) :]
        else:
            lines = text.split("\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "\n".join(lines)
    raw = bytearray(
        text.encode(rng.choice(["utf-8"] * 20 + ["utf-8-sig", "utf-16", "utf-32", "utf-16-le"]), "replace")
    )
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        if raw:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def overrides(rng: random.Random, of: type[Strict]) -> list[str]:
    """Some overrides, as they come from a command line."""
    made = []
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        here, keys = start(rng, of), []
        while isinstance(here, dict | list) and here and rng.random() < 0.8:
            key = rng.choice(list(here) if isinstance(here, dict) else list(range(len(here))))
            keys.append(str(key))
            here = here[key]
        keys += rng.choice(
            [[], [], [], ["zzz"], ["²"], ["0"], ["9" * 5000], [""], ["\ud800"], ["a"] * 200, ["-1"], ["٣"]]
        )
        value = rng.choice(
            [*SNIPPETS, "1", "x", "null", "[1, 2]", "{a: 1}", "1e300", "\udcff", "true", "2147483648"]
        )
        made.append(".".join(keys) + rng.choice(["=", "=", "=", "=", "", "=="]) + value)
    return made
