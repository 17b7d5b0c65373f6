"""Memory for Hugging Face causal language models: wrap a checkpoint, train it, measure what it remembers."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout, `kernels`, `train`, `eval` and `configs` lie beside this package; in the wheel, inside.
# Either way they are memlayers.kernels, memlayers.train and so on. The guard matters: without it an installed
# package would search the top of site-packages, where `kernels` is Hugging Face's.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))
