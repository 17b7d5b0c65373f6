"""Makes docs/architectures.md: which kind of memory `attach` accepts on which architecture, as its probe finds it.

    python tests/architecture_table.py

Every architecture is a tiny random model of `architectures.TINY`. What is refused is refused with a ConfigError that says why.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from architectures import TINY  # noqa: E402

import memlayers as ml  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
WRITER = {"steps": 1, "segment_length": 5}
NEURAL = {"layers": [-1], "heads": 2, "chunk_size": 4, "conv_kernel": 3}
COLUMNS = {
    "tokens": ml.MemoryTokensConfig(n_tokens=2, segment_length=5),
    "reversible": ml.ReversibleMemoryConfig(n_tokens=1, ratios=[5], heads=4, depth=2),
    "associative": ml.AssociativeMemoryConfig(n_tokens=3, segment_length=5, key_dim=16),
    "neural mag": ml.NeuralMemoryConfig(**NEURAL),
    "neural mal": ml.NeuralMemoryConfig(**NEURAL, placement="mal"),
    "neural mac": ml.NeuralMemoryConfig(**NEURAL, placement="mac", segment_length=5),
    "neural, sliding window": ml.NeuralMemoryConfig(**NEURAL, sliding_window=4),
    "lora": ml.LoRAMemoryConfig(r=4, writer=WRITER),
    "cartridge": ml.CartridgeConfig(n_tokens=3, writer=WRITER),
    "product_key": ml.ProductKeyMemoryConfig(layers=[-1], n_keys=8, heads=2, top_k=4, key_dim=8),
    "task_tokens": ml.TaskTokensConfig(names=["sort", "copy"]),
}
GROUPS = {
    "dense": "Dense decoders",
    "moe": "Mixtures of experts",
    "hybrid": "Hybrids: attention beside recurrent or convolution layers",
    "multimodal": "Multimodal wrappers around a decoder, given text",
    "odd": "Others",
}


def row(tiny) -> list[str | None]:
    """For each column None where `attach` accepts it, else the reason."""
    found = []
    for config in COLUMNS.values():
        try:
            ml.attach(tiny.build(), config)
            found.append(None)
        except (ml.ConfigError, TypeError) as error:
            found.append(short(str(error)))
    return found


def short(reason: str) -> str:
    """A reason without what all of them say."""
    reason = reason.split(". Supported:")[0].split("; supported:")[0].replace("\n", " ").replace("|", "/")
    _, _, rest = reason.partition("): ")
    return (rest or reason).removeprefix("type: ")[:160]


def page() -> str:
    """The whole page."""
    head = "| architecture | " + " | ".join(COLUMNS) + " |"
    lines = [
        "# Architectures",
        "",
        f"`ml.attach` tries a memory before it promises one: it runs a few tokens through the model and looks whether the "
        f"memory is written, read, decoded with, and right behind padding. This table is what it found on tiny random models "
        f"with transformers {transformers.__version__}. A number is a reason below the table; `attach` raises a `ConfigError` "
        "that says the same, and the model is what it was. Made by `python tests/architecture_table.py`.",
        "",
        "In hybrids and in `neural` the memory sits in the last layer; layers without attention are served where the table "
        "says yes. Multimodal wrappers were given text alone: memories that read in segments refuse images.",
    ]
    reasons: list[str] = []
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", "", head, "|---" * (len(COLUMNS) + 1) + "|"]
        for tiny in (t for t in TINY if t.group == group):
            marks = []
            for reason in row(tiny):
                if reason is not None and reason not in reasons:
                    reasons.append(reason)
                marks.append("yes" if reason is None else str(1 + reasons.index(reason)))
            lines.append(f"| {tiny.name} | " + " | ".join(marks) + " |")
    lines += ["", "## Reasons", "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(TINY)} architectures, {len(COLUMNS)} kinds")


if __name__ == "__main__":
    main()
