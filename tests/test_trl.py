"""TRL's trainers, which call the decoder by themselves and multiply by the head's weight: they train memory, or say why not."""

from pathlib import Path

import datasets
import pytest
import torch
from matrix import KINDS, near, says, wrap
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlayers as ml

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
BASE = Path(ml.__file__).parent / "demo" / "base"
TEXTS = [
    " The pass key is 40711.",
    " Rain falls on the old roof. The pass key is 95023.",
    " Rain falls on it.",
]
STATEFUL = [
    *("recurrent", "accumulate", "prefix", "neural_mag", "neural_mac", "neural_window"),
    *("lora", "cartridge", "prompt", "associative", "reversible"),
]
every_kind = pytest.mark.parametrize("name", [k.name for k in KINDS if k.learns and not k.n_new_tokens])
some = pytest.mark.parametrize("name", ["recurrent", "neural_mag", "cartridge", "product_key"])


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def model_with(name, **attach):
    """The demo's base with memory, whose parameters are off their start values."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    return wrap(model, next(kind for kind in KINDS if kind.name == name), **attach)


def language(n=6):
    return datasets.Dataset.from_list([{"text": TEXTS[i % 3] * (1 + i % 2)} for i in range(n)])


def sft(model, where, data=None, steps=2, **options):
    """SFTTrainer as it comes, on a CPU; `peft_config` goes to the trainer, other options to its config."""
    return _trainer(
        trl.SFTTrainer, trl.SFTConfig, model, where, language() if data is None else data, steps, options
    )


def dpo(model, where, steps=2, **options):
    pair = {"prompt": TEXTS[1], "chosen": " Rain falls on the old roof.", "rejected": " 00000."}
    data = datasets.Dataset.from_list([pair, {**pair, "prompt": TEXTS[0]}] * 3)
    return _trainer(trl.DPOTrainer, trl.DPOConfig, model, where, data, steps, options)


def _trainer(trainer, config, model, where, data, steps, options):
    to_trainer = {"peft_config": options.pop("peft_config")} if "peft_config" in options else {}
    args = config(
        output_dir=str(where),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, **to_trainer)


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def learns(trainer):
    """Train; every step has a gradient, parameters of the memory move and none of the base."""
    model, before = trainer.model, copies(trainer.model)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2 and all(step["grad_norm"] > 1e-6 for step in steps), steps
    assert all(0 < step["loss"] < 100 for step in steps)
    assert (changed := moved(model, before))
    assert all(".memlayers." in f".{name}" for name in changed), changed


@every_kind
def test_fine_tuning_as_it_comes(name, tmp_path):
    """Gradient checkpointing and bfloat16 are on."""
    trainer = sft(model_with(name), tmp_path)
    assert trainer.args.gradient_checkpointing and trainer.args.loss_type == "nll"
    learns(trainer)


@every_kind
def test_fine_tuning_without_checkpointing(name, tmp_path):
    learns(sft(model_with(name), tmp_path, gradient_checkpointing=False, bf16=False))


@every_kind
def test_preferences_as_they_come(name, tmp_path):
    trainer = dpo(model_with(name), tmp_path)
    assert trainer.args.gradient_checkpointing
    learns(trainer)


@pytest.mark.parametrize("name", STATEFUL)
def test_the_loss_is_the_models_own(name, tmp_path):
    """With what the memory adds: the loss and its gradient are those of `model(input_ids, labels=labels)`."""
    model = model_with(name)
    trainer = sft(model, tmp_path, gradient_checkpointing=False, bf16=False)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    learned = [p for _, p in ml.memory_parameters(model)]
    model.train()
    fused, own = trainer.compute_loss(model, dict(batch)), model(**batch).loss
    near(fused, own, 1e-5)
    fused, own = (torch.autograd.grad(loss, learned, allow_unused=True) for loss in (fused, own))
    for got, expected in zip(fused, own):
        near(got, expected, 1e-4 * (1 + float(expected.abs().max())))
    with torch.no_grad(), ml.disabled(model):
        assert abs(model(**batch).loss - trainer.compute_loss(model, dict(batch))) < 1e-5
        base = model(**batch).loss
    assert abs(base - trainer.compute_loss(model, dict(batch))) > 1e-4


@some
def test_the_prompt_left_out_of_the_loss(name, tmp_path):
    pairs = [{"prompt": TEXTS[i % 3], "completion": " Rain falls." * (1 + i % 2)} for i in range(6)]
    trainer = sft(model_with(name), tmp_path, data=datasets.Dataset.from_list(pairs))
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert (labels[:, 0] == -100).all() and (labels != -100).any()
    learns(trainer)


@pytest.mark.parametrize("make", [sft, dpo])
@some
def test_beside_an_adapter_of_peft(name, make, tmp_path):
    """PEFT freezes what is not its own; the memory learns too where its gradients are put on again."""
    for again in (False, True):
        adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = model_with(name)
        trainer = make(model, tmp_path, peft_config=adapter)
        for _, parameter in ml.memory_parameters(trainer.model):
            assert not parameter.requires_grad
            parameter.requires_grad_(again)
        before = copies(trainer.model)
        trainer.train()
        assert trainer.state.log_history[0]["grad_norm"] > 1e-6
        changed = moved(trainer.model, before)
        assert any("lora_" in part for part in changed)
        assert any(".memlayers." in part for part in changed) == again
        assert all("lora_" in part or ".memlayers." in part for part in changed)


@pytest.mark.parametrize("name", STATEFUL)
def test_packed_texts_are_refused(name, tmp_path):
    model = model_with(name)
    trainer, before = sft(model, tmp_path, data=language(12), packing=True, max_length=64), copies(model)
    with pytest.raises(ValueError, match=says("packed into one row", "share a memory", "a row of its own")):
        trainer.train()
    assert trainer.state.global_step == 0 and not moved(model, before)


@pytest.mark.parametrize("make", [sft, dpo])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_task_tokens_are_refused(make, checkpointing, tmp_path):
    """Their logits are the head's, of which TRL takes the weight alone."""
    model = model_with("task_tokens")
    trainer, before = make(model, tmp_path, gradient_checkpointing=checkpointing), copies(model)
    with pytest.raises(ValueError, match=says("'tasks'", "TRL", "HF Trainer")):
        trainer.train()
    assert trainer.state.global_step == 0 and not moved(model, before)


@some
def test_detaching_afterwards(name, tmp_path):
    model = model_with(name)
    sft(model, tmp_path, bf16=False).train()  # else accelerate's autocast stays
    ml.detach(model.eval())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(BASE).eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)
