"""What launches of this family's Triton kernels compile, for tests/kernels/test_compile.py: width 64, chunks of 64, two
layers also of a hidden width of 256."""

from __future__ import annotations

import triton

from .triton_decay import decay_backward_kernel, decay_kernel
from .triton_deep import two_layers_kernel
from .triton_deep_backward import two_layers_backward_kernel
from .triton_read import mix_kernel, outer_kernel, response_kernel
from .triton_tiles import BLOCK
from .triton_write import VALUES, write_backward_kernel, write_kernel

TWO_LAYERS = {"HIDDEN": 256, "hip": {"BLOCK": 16}}  # as in triton_deep.py
INTEGERS = "n_tokens", "n_chunks", "n_steps", "lead"
WIDTHS = dict.fromkeys(("D", "D_V", "D_IN", "D_OUT"), 64)
BLOCKS = {"KEYS": BLOCK, "BLOCK": BLOCK, "VALUES": VALUES, "WIDTH": 128}
FLAGS = {"PAIRS": True, "WEIGHTED": True, "GRADS": False, "FLIP_STATES": False, "FLIP_RESPONSE": False}
SIZES = {"C": 64, "PLACES": 64, "PARTS": 2, "STORED": 2, "MOMENTUM": 1, "SCALE": 2, "PRECISION": "tf32x3"}
SIZES |= WIDTHS | BLOCKS | FLAGS


def compile_case(
    kernel: triton.JITFunction,
    name: str,
    streams: str = "",
    num_warps: int = 4,
    hip: dict | None = None,
    **changes,
) -> dict:
    """name: begins with the dtype of the arguments named in `streams`; the others are float32. hip: what differs on AMD."""
    constexprs = {key: size for key, size in (SIZES | changes).items() if key in kernel.arg_names}
    dtype = name.split("_")[0]
    known = dict.fromkeys(streams.split(), f"*{dtype}") | dict.fromkeys(INTEGERS, "i32")
    known |= dict.fromkeys(constexprs, "constexpr")
    return {
        "name": f"{kernel.__name__}_{name}",
        "kernel": kernel,
        "signature": {key: known.get(key, "*fp32") for key in kernel.arg_names},
        "constexprs": constexprs,
        "hip": {"PRECISION": "ieee"} | (hip or {}) if "PRECISION" in constexprs else {},
        "num_warps": num_warps,
    }


COMPILE_CASES = [
    compile_case(decay_kernel, "fp32", num_warps=1),
    compile_case(decay_backward_kernel, "fp32", num_warps=1),
    compile_case(write_kernel, "bf16", "k probes targets"),
    compile_case(write_kernel, "fp32"),
    compile_case(write_backward_kernel, "bf16", "k probes"),
    compile_case(write_backward_kernel, "fp32"),
    compile_case(mix_kernel, "bf16_y", "x keys out"),
    compile_case(mix_kernel, "bf16_dq", "x values other out", FLIP_STATES=True, GRADS=True),
    compile_case(
        mix_kernel, "bf16_dk", "keys values other", FLIP_STATES=True, FLIP_RESPONSE=True, GRADS=True
    ),
    compile_case(mix_kernel, "fp32_dk", FLIP_STATES=True, FLIP_RESPONSE=True, GRADS=True),
    compile_case(outer_kernel, "bf16", "x grad"),
    compile_case(response_kernel, "bf16", "q k grad"),
    compile_case(two_layers_kernel, "bf16", "k v", **TWO_LAYERS),
    compile_case(two_layers_kernel, "fp32", **TWO_LAYERS),
    compile_case(two_layers_backward_kernel, "bf16", "k", **TWO_LAYERS),
    compile_case(two_layers_backward_kernel, "fp32", **TWO_LAYERS),
    compile_case(mix_kernel, "fp32_hidden", D_IN=256),
]
