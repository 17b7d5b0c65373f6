"""How the outer gradient comes back through the inner steps: whole, truncated, first-order, under checkpointing."""

import pytest
import torch
from matrix import says, tokens

import memlayers as ml
from tests.lora.writer_cases import GPT2, values, wrapped


def next_token_loss(model, ids, state):
    """In the model's dtype; Hugging Face's own losses are float32."""
    logits = model(ids, memory_state=state).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:])


def outer_loss(model, ids, question):
    state = ml.write(model, ids, differentiable=True)
    return next_token_loss(model, question, state)


@pytest.mark.parametrize(
    "fields", [{}, {"unroll": 1}, {"outer_gradient": "fomaml"}, {"streaming": True}], ids=str
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_outer_gradient(optimizer, fields):
    """Against finite differences along a random direction in all that is learned. Truncated, the rates alone: their
    last steps are exact, the earlier ones are where the truth says so."""
    learned = {"learned_steps": True, "token_weights": True}
    options = {"dtype": torch.float64, "shake": 0.1, "optimizer": optimizer, **learned, **fields}
    model, memory = wrapped(GPT2, **options, learning_rate=0.05)  # Llama's norms are float32 in any case
    ids, question = tokens(2, 11), tokens(2, 6, seed=3)
    parameters = dict(memory.named_parameters())
    if fields.keys() & {"unroll", "outer_gradient"}:
        last = parameters["writer.log_rates"]
        gradient = torch.autograd.grad(outer_loss(model, ids, question), last)[0][-1:]
        moved = last.data[-1:]
    else:
        moved = [p.data for p in parameters.values()]
        gradient = torch.autograd.grad(outer_loss(model, ids, question), list(parameters.values()))
    moved, gradient = (x if isinstance(x, (list, tuple)) else [x] for x in (moved, gradient))
    directions = [torch.randn_like(x) for x in moved]
    step, ends = 1e-9, []  # AdamW turns where a gradient of an adapter changes its sign
    for sign in (1, -2):
        for x, direction in zip(moved, directions):
            x += sign * step * direction
        ends.append(outer_loss(model, ids, question).item())
    slope = (ends[0] - ends[1]) / (2 * step)
    assert sum((g * d).sum() for g, d in zip(gradient, directions)).item() == pytest.approx(slope, rel=1e-3)


def test_fomaml_is_first_order():
    """The gradient of the start is that of what was written, as if the steps were constants."""
    model, memory = wrapped(dtype=torch.float64, shake=0.1, outer_gradient="fomaml")
    ids, question = tokens(1, 11), tokens(1, 6, seed=3)
    outer_loss(model, ids, question).backward()
    state = ml.write(model, ids)
    leaves = {field: x.requires_grad_() for field, x in state["notes"].items()}
    next_token_loss(model, question, ml.MemoryState({"notes": leaves})).backward()
    for name, adapter in memory.named_adapters():
        torch.testing.assert_close(adapter.A.grad, leaves[f"{name}.lora_A"].grad[0])
        torch.testing.assert_close(adapter.B.grad, leaves[f"{name}.lora_B"].grad[0])


def test_reptile_points_where_one_more_step_leads():
    """start − learning_rate · gradient is the mean over rows of what plain steps make of each: the inner ones, and one
    more on the answer."""
    rate, n_rows = 0.05, 3
    options = {"dtype": torch.float64, "shake": 0.1, "optimizer": "sgd", "steps": 3, "learning_rate": rate}
    model, memory = wrapped(GPT2, **options, outer_gradient="reptile")
    ids, question = tokens(n_rows, 11), tokens(n_rows, 6, seed=3)
    outer_loss(model, ids, question).backward()

    state = ml.write(model, ids)
    leaves = {field: x.requires_grad_() for field, x in state["notes"].items()}
    loss = next_token_loss(model, question, ml.MemoryState({"notes": leaves}))
    (n_rows * loss).backward()  # a row's own loss
    for name, adapter in memory.named_adapters():
        for parameter, field in ((adapter.A, f"{name}.lora_A"), (adapter.B, f"{name}.lora_B")):
            led = (leaves[field] - rate * leaves[field].grad).mean(0)
            assert (led - parameter).abs().max() > 1e-6
            torch.testing.assert_close(parameter - rate * parameter.grad, led, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("outer_gradient", ["maml", "fomaml", "reptile"])
def test_gradient_checkpointing(outer_gradient):
    """The same gradients, or an error that says what goes: HF's checkpointing works in training mode alone."""
    ids, question = tokens(2, 11), tokens(2, 6, seed=3)
    gradients = []
    for checkpointing in (False, True):
        model, memory = wrapped(dtype=torch.float64, shake=0.1, outer_gradient=outer_gradient)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        if checkpointing and outer_gradient == "maml":
            with pytest.raises(ValueError, match=says("gradient_checkpointing", "maml", "fomaml or reptile")):
                outer_loss(model, ids, question)
            return
        outer_loss(model, ids, question).backward()
        gradients.append([parameter.grad for parameter in memory.parameters()])
    for a, b in zip(*gradients):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_reentrant_checkpointing_is_refused():
    model, _ = wrapped()
    ids = tokens(1, 11)
    written = values(ml.write(model, ids))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for a, b in zip(written, values(ml.write(model, ids))):  # in eval mode nothing is checkpointed
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=says("gradient_checkpointing", "use_reentrant': False")):
        ml.write(model.train(), ids)
