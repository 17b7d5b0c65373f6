"""Writing by gradient steps: what a step is, and for whom."""

import pytest
import torch
from matrix import pad, says, tokens
from peft import LoraConfig, get_peft_model

import memlayers as ml
from memlayers.writing import of_text
from tests.lora.writer_cases import GPT2, LLAMA, TEXT, values, wrapped


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=lambda a: a.name)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_is_a_lora_of_peft_trained_on_the_segments(architecture, optimizer):
    """The same start, loss and steps, by PEFT's layers and torch's optimizers, in float64."""
    model, memory = wrapped(architecture, torch.float64, steps=3, optimizer=optimizer, learning_rate=0.02)
    ids = tokens(1, TEXT)
    with torch.no_grad():
        for adapter in memory.adapters.values():
            adapter.B.add_(0.1 * torch.randn_like(adapter.B))
    state = ml.write(model, ids)
    names = [name for name, _ in memory.named_adapters()]

    base = architecture.build().eval().double()
    decoder = next(name for name, child in base.named_children() if child is base.get_decoder())
    targets = [f"{decoder}.{name}" for name in names]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out=architecture is GPT2)
    peft = get_peft_model(base, config).double()
    found = dict(peft.named_parameters())
    pairs = []
    for (name, adapter), target in zip(memory.named_adapters(), targets):
        for part, start in (("lora_A", adapter.A), ("lora_B", adapter.B)):
            parameter = found[f"base_model.model.{target}.{part}.default.weight"]
            parameter.data.copy_(start)
            pairs.append((parameter, f"{name}.{part}"))
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    options = {} if optimizer == "sgd" else {"weight_decay": 0.0}
    outer = kind([parameter for parameter, _ in pairs], lr=0.02, **options)
    segments = of_text(ids, torch.ones_like(ids).bool(), 5)
    labels = segments.ids[0].masked_fill(~segments.learned[0], -100)
    for _ in range(3):
        outer.zero_grad()
        peft(input_ids=segments.ids[0], attention_mask=segments.mask[0].long(), labels=labels).loss.backward()
        outer.step()
    for parameter, field in pairs:
        # PEFT's loss is float32, and AdamW divides by its gradient's size.
        torch.testing.assert_close(state["notes"][field][0], parameter.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"streaming": True}, {"clip": 0.1}, {"token_weights": True}], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_written_as_if_alone(side, fields):
    model, _ = wrapped(dtype=torch.float64, shake=0.1, optimizer="sgd", **fields)
    rows = [tokens(1, n, seed=n)[0] for n in (2, 7, TEXT)]
    ids, mask = pad(rows, side)
    together = ml.write(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        for one, all_rows in zip(values(ml.write(model, row[None])), values(together)):
            torch.testing.assert_close(one[0], all_rows[i], atol=1e-12, rtol=1e-9)


def test_streaming_is_one_write_a_segment():
    model, _ = wrapped(dtype=torch.float64, streaming=True)
    ids, state = tokens(2, 11), None
    for start in (0, 5):
        state = ml.write(model, ids[:, start : start + 6], state)
    for a, b in zip(values(ml.write(model, ids)), values(state)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_more_steps_know_the_text_better():
    losses, ids = [], tokens(2, TEXT)
    for steps in (0, 4, 16):
        model, _ = wrapped(steps=steps, learning_rate=0.02)
        with torch.inference_mode():
            state = ml.write(model, ids)
        losses.append(model(ids, memory_state=state, labels=ids).loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_a_loss_that_is_not_finite():
    model, _ = wrapped(steps=4, learning_rate=100.0, optimizer="sgd", shake=1e20)
    ids = tokens(2, TEXT)
    state = ml.MemoryState({"notes": ml.memories(model)["notes"].new_state(2)})
    kept = state.clone()
    with pytest.raises(
        ValueError, match=says("of 4 of writing", "row 0", "nothing was written", "learning_rate")
    ):
        ml.write(model, ids, state)
    for a, b in zip(values(state), values(kept)):
        assert torch.equal(a, b)


def test_bad_fields_are_named():
    for fields, parts in [
        ({"r": 0}, ["r:", "greater than or equal to 1"]),
        ({"writer": {"steps": 2, "unroll": 3}}, ["writer.unroll: 3 is more than the 2 steps"]),
        (
            {"writer": {"outer_gradient": "reptile", "unroll": 1}},
            ["writer.unroll: reptile passes through no"],
        ),
        ({"writer": {"step": 2}}, ["writer.step: unknown field", "did you mean 'steps'"]),
        ({"target_modules": []}, ["target_modules"]),
    ]:
        with pytest.raises(ml.ConfigError, match=says(*parts)):
            ml.LoRAMemoryConfig(**fields)
    model = LLAMA.build()
    with pytest.raises(ml.ConfigError, match=says("target_modules.1", "'q_prj'", "q_proj")):
        ml.attach(model, ml.LoRAMemoryConfig(target_modules=["v_proj", "q_prj"]))
    with pytest.raises(ml.ConfigError, match="layer 7 is out of range"):
        ml.attach(model, ml.LoRAMemoryConfig(layers=[7]))
    memory = ml.attach(model, ml.LoRAMemoryConfig(layers=[-1], target_modules=["self_attn.v_proj"]))
    assert list(memory.adapters) == ["layers-1-self_attn-v_proj"]


def test_what_cannot_be_written_or_stand_together():
    model, _ = wrapped()
    with pytest.raises(ValueError, match="row 0 has one token"):
        ml.write(model, tokens(1, 1))
    with pytest.raises(ml.ConfigError, match="written by gradient steps"):
        ml.attach(model, ml.NeuralMemoryConfig(heads=2))
    other, _ = wrapped(r=5)
    state = ml.write(model, tokens(1, TEXT))
    other(tokens(1, 4), memory_state=state)  # ranks may differ: a bank mixes several adapters
    ml.detach(other)
    ml.attach(other, ml.LoRAMemoryConfig(layers=[0]), name="notes")
    with pytest.raises(ValueError, match=says("'notes'", "adapt other layers")):
        other(tokens(1, 4), memory_state=state)
    plain = LLAMA.build()
    ml.attach(plain, ml.MemoryTokensConfig(n_tokens=2, segment_length=8))
    with pytest.raises(ValueError, match=says("differentiable", "forward calls")):
        ml.write(plain, tokens(1, 9), differentiable=True)


@pytest.mark.parametrize("fields", [{}, {"learned_steps": True, "token_weights": True}], ids=str)
def test_saved_and_loaded(tmp_path, fields):
    model, _ = wrapped(shake=0.1, **fields)
    ml.save(model, tmp_path / "m", save_base=True)
    ids = tokens(2, TEXT)
    state = ml.write(model, ids)
    for a, b in zip(values(state), values(ml.write(ml.load(tmp_path / "m"), ids))):
        assert torch.equal(a, b)


class Words:
    """A tokenizer of one-letter words."""

    def __call__(self, text, add_special_tokens=True):
        return type(
            "Encoding",
            (),
            {"input_ids": [1] * add_special_tokens + [ord(c) % 90 + 5 for c in text if c != " "]},
        )


def test_pairs_are_answered():
    model, _ = wrapped(steps=40, learning_rate=0.02)
    rows = [[("a b c", "x y"), ("b c a", "z w")], [("a b c", "q r")]]
    state = ml.write_pairs(model, Words(), rows)
    for row, pairs in enumerate(rows):
        for question, answer in pairs:
            asked, right = (
                torch.tensor([Words()(t, s).input_ids]) for t, s in ((question, True), (answer, False))
            )
            cache = state.select([row]).to_cache()
            out = model.generate(
                asked,
                attention_mask=torch.ones_like(asked),
                past_key_values=cache,
                max_new_tokens=2,
                do_sample=False,
            )
            assert torch.equal(out[:, asked.shape[1] :], right)
    with pytest.raises(ValueError, match="2 rows, the input 1"):
        ml.write_pairs(model, Words(), rows[:1], state)
    with ml.disabled(model), pytest.raises(ValueError, match="no LoRA memory"):
        ml.write_pairs(model, Words(), rows)
