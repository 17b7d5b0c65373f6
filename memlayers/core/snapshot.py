"""`Snapshot`: all that attaching a memory could leave behind on a model, to put back where it fails."""

from __future__ import annotations

from torch import nn


class Snapshot:
    """What lies on a model's modules, parameters and configs now; tensors themselves are not copied.

    Args:
        model: left as it is.
    """

    def __init__(self, model: nn.Module):
        self.modules = {m: {k: _copied(v) for k, v in vars(m).items()} for m in model.modules()}
        self.requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        configs = (getattr(model, "config", None), getattr(model, "generation_config", None))
        self.configs = [(config, dict(vars(config))) for config in configs if config is not None]

    def restore(self) -> None:
        """Put all of it back."""
        for module, saved in self.modules.items():
            current = vars(module)
            for key, value in saved.items():
                if isinstance(value, dict) and isinstance(current.get(key), dict):
                    current[key].clear()  # the same object: others may hold it
                    current[key].update(value)
                else:
                    current[key] = value
            for key in current.keys() - saved.keys():
                del current[key]
        for parameter, requires_grad in self.requires_grad.items():
            parameter.requires_grad_(requires_grad)
        for config, saved in self.configs:
            vars(config).clear()
            vars(config).update(saved)


def _copied(value):
    """Dictionaries of modules, parameters, buffers and hooks change in place, so that they are copied."""
    return value.copy() if isinstance(value, dict) else value
