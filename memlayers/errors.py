"""What a command says of an error: one paragraph, whatever comes from outside. For the command line and `train/run.py`."""

from __future__ import annotations

EXPECTED = (ValueError, TypeError, OSError, KeyError, IndexError, NotImplementedError, ImportError)
"""Errors that say in one paragraph what the user can do."""

OUTSIDE = {
    MemoryError: "this machine has not enough memory for it",
    RecursionError: "something that was given is nested too deep",
    UnicodeError: "a text or a name has characters that cannot be read or written",
}
"""Errors that say too little by themselves, whose cause lies outside of memlayers."""
NO_MEMORY = ("can't allocate memory", "out of memory")
"""How torch says that there is not enough, on a CPU in an ordinary RuntimeError."""

EXTRAS = {
    **dict.fromkeys(["datasets", "tensorboard"], "train"),
    **dict.fromkeys(["pandas", "tabulate", "scipy", "matplotlib", "lm_eval"], "eval"),
}
"""Packages that come with an extra of memlayers."""


def says_no_memory(error: BaseException) -> bool:
    """Whether Python or torch got no memory for what was asked of it."""
    said = isinstance(error, RuntimeError) and any(part in str(error).lower() for part in NO_MEMORY)
    return said or isinstance(error, MemoryError)


def paragraph(error: BaseException) -> str:
    """What to tell a user of `error`, in characters that every terminal takes. An error of memlayers, and one of EXPECTED,
    speaks for itself; what comes from outside (no memory, a full disk, a damaged file, a text that is no text) is called
    what it is; anything else is called a defect."""
    from safetensors import SafetensorError

    name = type(error).__name__
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text.encode("utf-8", "backslashreplace").decode().strip()
    told = next((told for kind, told in OUTSIDE.items() if isinstance(error, kind)), None)
    if says_no_memory(error):
        told = OUTSIDE[MemoryError]
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is not installed: pip install 'memlayers[{EXTRAS[error.name]}]'"
    if told is None and isinstance(error, SafetensorError):
        told = "a safetensors file could not be read or written"
    if told is not None:
        return f"{told} ({name}{f': {text}' if text else ''})"
    if isinstance(error, EXPECTED) or type(error).__module__.partition(".")[0] in ("memlayers", "__main__"):
        return text or name
    return f"{name}: {text}. This is a defect of memlayers or of a library under it."


def first_line(error: BaseException) -> str:
    """What an error says first, or what it is called."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
