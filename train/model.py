"""The model of a run: loaded or built, wrapped, with a LoRA where one is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import memlayers as ml
from memlayers.checkpoint import CONFIG
from memlayers.config import ConfigError
from memlayers.core.model import reach, stateful, written_by_gradient
from memlayers.core.size import check_fits
from memlayers.errors import first_line, says_no_memory
from memlayers.limits import MOST_LAYERS
from memlayers.loading import load_causal_lm, load_tokenizer

from .config import LossSection, ModelSection, TrainConfig
from .kinds import does, that_do
from .optimizers import choose_parameters


def build_model(config: TrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its memories attached and `requires_grad` set, in train mode, and its tokenizer, which knows the
    tokens that memories add.

    Raises:
        ConfigError: a memory, regime or LoRA that does not fit the model; names the field.
        FileNotFoundError: no model or tokenizer at the path.
    """
    tokenizer = _tokenizer(config.model)
    model = _load(config.model)
    if config.lora is not None:
        _inject_lora(model, config)
    for name, memory in config.memories.items():
        if name in ml.memories(model):
            raise ConfigError(
                f"memories.{name}: {config.model.path} already has a memory of this name; choose another"
            )
        try:
            ml.attach(model, memory, name)
        except ConfigError as error:
            named = str(error).startswith((f"{name}:", f"{name}."))  # as what two memories disagree on is
            raise ConfigError(f"memories.{error}" if named else f"memories.{name}.{error}") from None
        except ValueError as error:  # a name that cannot be used
            raise ConfigError(f"memories: {error}") from None
    for name, memory in ml.memories(model).items():
        try:
            if name in config.memories:  # not where it came with the checkpoint, and has learned
                memory.start_from_texts_(tokenizer)
            memory.add_to_tokenizer(tokenizer)
        except ConfigError as error:
            raise ConfigError(f"memories.{name}.{error}") from None
        except ValueError as error:
            raise ConfigError(f"memories.{name}: {error}") from None
    choose_parameters(model, config.train_what)
    if config.gradient_checkpointing != "none":
        reentrant = config.gradient_checkpointing == "reentrant"
        if reentrant:
            model.enable_input_require_grads()  # a frozen embedding would cut the recomputed graph off
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train(), tokenizer


def segment_length(model: PreTrainedModel) -> int | None:
    """Tokens a segment of the wrapped model has, or its sliding window; None where no memory gives it either."""
    return reach(model)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, folder: Path
) -> None:
    """Write the trained model: with memories what `memlayers.load` reads, else a plain checkpoint; the tokenizer
    beside it. The base is copied where it was trained or has no name to be loaded by."""
    if ml.memories(model):
        save_base = config.train_what == "memory_and_base" or config.model.config is not None
        ml.save(model, folder, save_base=save_base, tokenizer=tokenizer)
    else:
        if getattr(model, "peft_config", None):
            from peft.tuners.tuners_utils import BaseTunerLayer

            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.merge()
            state = {
                n.replace(".base_layer.", "."): t for n, t in model.state_dict().items() if ".lora_" not in n
            }
            model.save_pretrained(folder, state_dict=state)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _load(section: ModelSection) -> PreTrainedModel:
    dtype = getattr(torch, section.dtype)
    if section.config is not None:
        return _random(section.config, dtype)
    if (Path(section.path) / CONFIG).is_file():
        return ml.load(section.path, dtype=dtype)
    try:
        return load_causal_lm(section.path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model.path: {section.path!r} is not a folder with a causal language model, nor can such a model be "
            f"fetched from the hub ({first_line(error)})"
        ) from None


def _random(fields: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, whose bytes are counted before it is built."""
    fields = dict(fields)
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        if getattr(config.get_text_config(), "num_hidden_layers", 0) > MOST_LAYERS:
            raise ConfigError(f"num_hidden_layers: at most {MOST_LAYERS:,} are taken")
        with torch.random.fork_rng([]), torch.device("meta"):
            parts = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        check_fits(
            sum(p.nbytes for p in parts.parameters()), "hidden_size: lower it or other sizes: the model"
        )
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ConfigError as error:
        raise ConfigError(f"model.config.{error}") from None
    except Exception as error:  # transformers has many, for fields that do not fit
        if says_no_memory(error):
            raise
        told = str(error) if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"model.config: {told}") from None


def _tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    source = section.tokenizer or section.path
    for folder in (source, str(Path(source) / "base")):
        try:
            return load_tokenizer(folder)
        except (OSError, ValueError) as failure:
            error = failure
    field = "model.tokenizer" if section.tokenizer else "model.path"
    raise FileNotFoundError(f"{field}: no tokenizer at {source!r} ({first_line(error)})")


def _inject_lora(model: PreTrainedModel, config: TrainConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    if getattr(model, "peft_config", None):
        return  # the checkpoint brought one; it is trained on
    section = config.lora
    targets = section.target_modules
    if targets == "all-linear":
        head = model.get_output_embeddings()
        targets = sorted(
            {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_linear(m) and m is not head}
        )
    wide = [m for n, m in model.named_modules() if _is_linear(m) and n.endswith(tuple(targets))]
    numbers = section.r * sum(sum(module.weight.shape) for module in wide)
    check_fits(4 * numbers, f"lora.r: lower it: a LoRA on {len(wide)} layers")
    lora = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
        bias="none",
    )
    lora.base_model_name_or_path = model.config._name_or_path
    try:
        inject_adapter_in_model(lora, model, adapter_name="lora")
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {str(error).splitlines()[0]}") from None


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def check_regime(model: PreTrainedModel, regime: str, loss: LossSection) -> None:
    """Raise ConfigError where a regime of the data, its loss and the model do not go together."""
    if regime == "D" and not stateful(model):
        raise ConfigError(
            "data.regime: D asks with memory alone, but this model has no memory that reads; use F"
        )
    if regime == "F" and reach(model) is not None:
        raise ConfigError(
            "data.regime: F is full attention, but a memory cuts attention to a window; use W or D"
        )
    for name, memory in ml.memories(model).items():
        if told := memory.check_extra_loss(loss.cycle):
            raise ConfigError(f"loss.cycle: {told.format(name=name)}")
    if loss.cycle > 0 and not any(does(memory, "extra_loss") for memory in ml.memories(model).values()):
        raise ConfigError(
            "loss.cycle: no memory of this model can be read back or has another loss of its own; attach one of type "
            f"{that_do('extra_loss')}, or set it to 0"
        )
    if regime == "D" and loss.context > 0 and written_by_gradient(model):
        raise ConfigError(
            "loss.context: this memory writes the context by gradient steps of its own, which have no loss outside; "
            "set it to 0"
        )
