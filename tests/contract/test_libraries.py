"""Contract 10: HF Trainer, lm-eval's HFLM, accelerate and PEFT work on a model with memory."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from matrix import LEARNS, SEGMENT, TEXT, architectures, cases, near, params, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

import memlayers as ml


class Texts(torch.utils.data.Dataset):
    def __init__(self, case, n=12):
        self.ids = case.tokens(n, TEXT)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        # For some architectures Trainer counts the first label, which has no prediction, into the mean: mask it.
        labels = torch.cat([torch.tensor([-100]), self.ids[index][1:]])
        return {"input_ids": self.ids[index], "labels": labels}


def trainer(case, model, folder, **extra):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=Texts(case), eval_dataset=Texts(case, 4), **extra
    )


@cases(*LEARNS, scope="all")
def test_trainer_takes_three_steps_and_evaluates(case, tmp_path):
    model = case.model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = trainer(case, model, tmp_path)
    run.train()
    assert run.state.global_step == 3
    memory = dict(ml.memory_parameters(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in memory), name
    ids = Texts(case, 4).ids
    with torch.no_grad():
        expected = model.eval()(ids, labels=ids).loss
    assert run.evaluate()["eval_loss"] == pytest.approx(float(expected), abs=1e-4)


@architectures()
def test_trainer_predicts_with_metrics(case, tmp_path):
    """With `compute_metrics` the Trainer gathers all that the model gives out: logits alone must arrive."""
    model, seen = case.model(), []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {"mean": float(np.mean(prediction.predictions))}

    result = trainer(case, model, tmp_path, compute_metrics=metrics).evaluate()
    assert "eval_mean" in result
    with torch.no_grad():
        near(torch.as_tensor(seen[0]), model(Texts(case, 4).ids).logits)


def test_trainer_saves_and_resumes_a_checkpoint(tmp_path):
    case = params()[0].values[0]
    run = trainer(case, case.model(), tmp_path)
    run.save_model(str(tmp_path / "saved"))
    weights = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    for name, tensor in case.base().state_dict().items():
        assert torch.equal(weights[name], tensor), name


def hflm(model):
    """lm-eval's HFLM around a model made in memory, with a tokenizer of one id a character."""
    from lm_eval.models.huggingface import HFLM

    vocab = {chr(0x4E00 + index): index for index in range(model.config.vocab_size)}
    backend = Tokenizer(WordLevel(vocab, unk_token=chr(0x4E00)))
    backend.pre_tokenizer = Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=chr(0x4E00), eos_token=chr(0x4E01)
    )
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu", add_bos_token=False)


def text(ids):
    return "".join(chr(0x4E00 + int(i)) for i in ids)


@torch.no_grad()
@cases(scope="all")
def test_lm_eval_scores_it(case):
    """HFLM right-pads batches and passes no mask: scores in a batch must equal hand-made scores of each request
    alone, and again in a second call."""
    from lm_eval.api.instance import Instance

    model, lengths = case.model(), [(4, 2), (TEXT, 3), (2 * SEGMENT, 1), (7, SEGMENT), (1, 1)]
    lm = hflm(model)
    texts = [(tokens(1, c, seed=c)[0], tokens(1, t, seed=50 + t)[0]) for c, t in lengths]
    requests = [
        Instance("loglikelihood", {}, (text(context), text(target)), index)
        for index, (context, target) in enumerate(texts)
    ]
    first, second = (lm.loglikelihood(requests, disable_tqdm=True) for _ in range(2))
    assert first == second
    for (context, target), (score, greedy) in zip(texts, first, strict=True):
        ids = torch.cat([context, target])[None]
        logits = model(ids[:, :-1]).logits[0, -len(target) :]
        by_hand = -F.cross_entropy(logits, target, reduction="sum")
        assert score == pytest.approx(float(by_hand), abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == target).all())


@torch.no_grad()
@pytest.mark.parametrize("case", params()[:2])
def test_lm_eval_generates(case):
    from lm_eval.api.instance import Instance

    model, prompt = case.model(), tokens(1, 7)
    request = Instance("generate_until", {}, (text(prompt[0]), {"until": ["x"], "max_gen_toks": 6}), 0)
    answer = hflm(model).generate_until([request], disable_tqdm=True)[0]
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    assert answer.replace(" ", "") == text(ids[0, 7:])


@pytest.fixture
def bf16():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@cases(lambda kind: kind.stateful and kind.learns, "keeps no state, or has no parameters")
def test_accelerate_mixed_precision_keeps_the_state(case, bf16):
    model, ids = case.model().train(), tokens(2, TEXT)
    expected = model(ids).memory_state
    model = bf16.prepare(model)
    output = model(ids, labels=ids)
    assert output.logits.dtype == torch.float32
    assert isinstance(output.memory_state, ml.MemoryState) and isinstance(
        output["memory_state"], ml.MemoryState
    )
    for name in case.kind.configs:
        for field, tensor in output.memory_state[name].items():
            assert tensor.dtype == expected[name][field].dtype and tensor.shape == expected[name][field].shape
    assert torch.is_autocast_enabled("cpu") is False
    bf16.backward(output.loss)
    assert all(p.grad.dtype == torch.float32 for _, p in ml.memory_parameters(model) if p.grad is not None)
    again = model(ids, memory_state=output.memory_state, labels=ids)
    assert again.loss.isfinite()


def lora(model):
    torch.manual_seed(3)
    names = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}
    targets = names.get(model.config.model_type, ["q_proj", "v_proj"])
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@cases(*LEARNS, scope="all")
def test_peft_over_a_model_with_memory(case, tmp_path):
    model, ids = case.model(), tokens(2, TEXT)
    with torch.no_grad():
        plain = model(ids)
    wrapped = lora(model)
    assert isinstance(wrapped, PeftModel)
    assert set(ml.memories(wrapped)) == set(case.kind.configs)
    assert dict(ml.memory_parameters(wrapped)).keys() == dict(ml.memory_parameters(model)).keys() != set()
    with torch.no_grad():
        output = wrapped(input_ids=ids)
        assert (output.logits - plain.logits).abs().max() > 1e-2, "LoRA does nothing"
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(input_ids=ids).logits, plain.logits)
        given = {}
        if case.kind.stateful:
            state = ml.write(wrapped, ids)
            by_reading = wrapped(input_ids=ids, close_memory=True).memory_state
            near(
                wrapped(input_ids=ids[:, :3], memory_state=state).logits,
                model(ids[:, :3], memory_state=state if case.kind.by_gradient else by_reading).logits,
            )
            given = {"past_key_values": state.to_cache()}
        answer = wrapped.generate(
            input_ids=ids[:, :3], attention_mask=torch.ones_like(ids[:, :3]), max_new_tokens=4, **given
        )
        assert answer.shape == (2, 7)
    # PEFT freezes all but LoRA, memory too; training both takes one line.
    for _, parameter in ml.memory_parameters(wrapped):
        parameter.requires_grad_(True)
    wrapped.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("lora_" in name for name in trained) and any("memlayers" in name for name in trained)
    assert all("lora_" in name or "memlayers" in name for name in trained)


@torch.no_grad()
def test_peft_and_memory_are_saved_and_loaded_together(tmp_path):
    case, ids = params()[0].values[0], tokens(2, TEXT)
    wrapped = lora(case.model()).eval()
    ml.save(wrapped, tmp_path)
    assert json.loads((tmp_path / "memory_config.json").read_text())["memories"]
    loaded = ml.load(tmp_path, base=case.base())
    assert torch.equal(loaded(ids).logits, wrapped(input_ids=ids).logits)


@torch.no_grad()
def test_memory_attached_to_a_peft_model():
    case, ids = params()[0].values[0], tokens(2, TEXT)
    wrapped = lora(case.base()).eval()
    before = wrapped(input_ids=ids).logits
    for name, config in case.kind.configs.items():
        ml.attach(wrapped, config, name=name)
    output = wrapped(input_ids=ids)
    assert (output.logits - before).abs().max() > 1e-2 and output.memory_state is not None
    assert ml.detach(wrapped) is wrapped
    assert torch.equal(wrapped(input_ids=ids).logits, before)
