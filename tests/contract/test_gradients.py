"""Contract 7: gradient checkpointing gives the same gradients; a loss gives the gradients it should."""

import pytest
import torch
from matrix import LEARNS, SEGMENT, cases, llama, near, pad, positions, tokens

import memlayers as ml


def gradients(model, ids, **inputs):
    model.zero_grad()
    output = model(ids, labels=ids, close_memory=True, **inputs)
    written = sum(
        t.float().pow(2).mean()
        for name, part in (output.memory_state.fields.items() if "memory_state" in output else ())
        if name in ml.memories(model)
        for t in part.values()
        if t.is_floating_point()
    )
    (output.loss + written).backward()
    return output.loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    ("reentrant", "freeze_base"),
    [(True, True), (False, True), (False, False)],
    ids=["reentrant", "non_reentrant", "non_reentrant_base_trained"],
)
@cases(*LEARNS, scope="all")
def test_checkpointing_gives_the_same_gradients(case, reentrant, freeze_base):
    model, ids = case.model(freeze_base=freeze_base).train(), case.tokens(2, 3 * SEGMENT)
    calls, norm = [], [m for n, m in model.named_modules() if n.endswith(("0.input_layernorm", "h.0.ln_1"))]
    # What runs by itself, as a prompt does, is one row, and is not checkpointed.
    norm[0].register_forward_hook(lambda _, args, __: calls.append(1) if len(args[0]) == len(ids) else None)
    expected_loss, expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    n_plain = len(calls)
    loss, got = gradients(model, ids)
    assert len(calls) == 3 * n_plain > 0, "with checkpointing the first layer runs twice"
    near(loss, expected_loss, 1e-6)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        # The recomputed forward pass is the same arithmetic; sums over segments may run in another order.
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, atol=1e-5 * scale, rtol=1e-4, msg=f"{name}: differs")


@cases()
def test_the_loss_is_the_mean_over_labelled_next_tokens(case):
    model = case.model()
    ids, mask = pad([case.tokens(1, 3 * SEGMENT, seed=1)[0], tokens(1, 7, seed=2)[0]], "left")
    labels = torch.where(mask.bool(), ids, -100)
    labels[0, :SEGMENT] = -100
    with torch.no_grad():
        output = model(ids, attention_mask=mask, labels=labels, **positions(case, mask))
    log_probs, losses = output.logits.float().log_softmax(-1), []
    for row in range(2):
        for place in range(1, ids.shape[1]):
            if labels[row, place] != -100:
                losses.append(-log_probs[row, place - 1, labels[row, place]])
    near(output.loss, torch.stack(losses).mean(), 1e-5)


@cases(lambda kind: kind.stateful and kind.learns, "keeps no state, or has no parameters")
def test_the_gradient_crosses_calls_through_the_state(case):
    """Regime D in training: write the context in one call, take the loss on an answer in the next."""
    model = case.model().train()
    state = model(tokens(2, 2 * SEGMENT), close_memory=True, logits_to_keep=1).memory_state
    question = tokens(2, 4, seed=5)
    model(question, labels=question, memory_state=state).loss.backward()
    for name, memory in ml.memories(model).items():
        grads = [p.grad for p in memory.parameters() if p.grad is not None]
        assert grads and all(g.isfinite().all() for g in grads), name
        assert any(g.abs().max() > 0 for g in grads), name
    near(
        model(tokens(2, 2 * SEGMENT), close_memory=True, logits_to_keep=1).logits,
        model(tokens(2, 2 * SEGMENT), close_memory=True).logits[:, -1:],
    )


def test_inputs_embeds_equal_input_ids():
    model, ids = llama().model(), tokens(2, 3 * SEGMENT)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_hands_on_no_empty_window(reentrant):
    """Checkpointed layers fill no cache; what the next call continues from must be the pending tokens."""
    model, ids = llama().model().train(), tokens(2, 2 * SEGMENT + 3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    first = model(ids[:, :7], use_cache=True)
    assert first.past_key_values is None
    second = model(ids[:, 7:], memory_state=first.memory_state, use_cache=True)
    near(second.logits, model(ids).logits[:, 7:])
