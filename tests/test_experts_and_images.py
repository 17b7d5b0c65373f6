"""Mixtures of experts and multimodal wrappers: what they give out and take in beside text."""

import pytest
import torch
from architectures import tiny
from matrix import KINDS, TEXT, near, pad, says, wrap
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import memlayers as ml

STATEFUL = [
    *("recurrent", "accumulate", "prefix", "neural_mag", "neural_mac", "neural_window"),
    *("lora", "cartridge", "associative", "reversible"),
]
ALL = [*STATEFUL, "product_key", "task_tokens"]
IN_BLOCKS = [name for name in STATEFUL if name not in ("neural_mag", "lora", "cartridge")]
every_kind = pytest.mark.parametrize("name", ALL)


def kind_of(name):
    return next(kind for kind in KINDS if kind.name == name)


def given(model, name, rows):
    """What a call is given: a state with a text in it, where the kind keeps one."""
    ids = torch.arange(3, 3 + rows * TEXT).view(rows, TEXT)
    return {"memory_state": ml.write(model, ids)} if name in STATEFUL else {}


EXPERTS_IDS = [list(range(10, 23)), list(range(40, 46))]


def experts(name):
    model = wrap(tiny("mixtral").build(), kind_of(name))
    ids, mask = pad([torch.tensor(row) for row in EXPERTS_IDS], "left")
    return model, ids.where(mask.bool(), 5), mask


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@every_kind
def test_a_mixture_of_experts_balances_its_load(name, padded):
    model, ids, mask = experts(name)
    if not padded:
        ids, mask = ids[:1], mask[:1]
    if name == "task_tokens":  # which learn where they are read
        ids[:, -2] = 128
    state = given(model, name, len(ids))
    model.train()
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, labels=ids, **state)
    assert plain.get("router_logits") is None
    output = model(ids, attention_mask=mask, labels=ids, output_router_logits=True, **state)
    assert len(output.router_logits) == 2
    assert all(x.shape == (ids.numel(), 4) for x in output.router_logits)
    aux = load_balancing_loss_func(output.router_logits, 4, 2, mask)
    near(output.aux_loss, aux, 1e-6)
    near(output.loss, plain.loss + model.router_aux_loss_coef * aux, 1e-5)
    model(ids, attention_mask=mask, output_router_logits=True).aux_loss.backward()
    grads = [p.grad for _, p in ml.memory_parameters(model) if p.grad is not None]
    assert any(g.abs().max() > 1e-6 for g in grads)


@torch.no_grad()
@pytest.mark.parametrize("name", IN_BLOCKS)
def test_routers_rows_are_those_of_the_text(name):
    """Row by row, each token's own: those of a row alone, and of the first segment as the base gives them."""
    model, ids, mask = experts(name)
    options = {"output_router_logits": True, "use_cache": False}
    both = model(ids, attention_mask=mask, **options).router_logits
    for row, text in enumerate(EXPERTS_IDS):
        alone = model(torch.tensor([text]), **options).router_logits
        for got, expected in zip(both, alone):
            near(got.view(2, -1, 4)[row, -len(text) :], expected, 1e-3 if name == "neural_window" else 2e-4)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gemma3", "llava"])
@every_kind
def test_a_multimodal_wrapper_reads_text(name, architecture):
    case = kind_of(name)
    model = wrap(tiny(architecture).build(), case)
    rows = [torch.arange(10, 10 + TEXT), torch.arange(40, 44)]
    ids, mask = pad(rows, "left")
    ids = ids.where(mask.bool(), 5)
    where = {} if case.segmented else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    state = {"memory_state": ml.write(model, ids + 20, attention_mask=mask)} if name in STATEFUL else {}
    output = model(ids, attention_mask=mask, **where, **state)
    for row, text in enumerate(rows):
        alone = {"memory_state": state["memory_state"].select([row])} if state else {}
        got = model(text[None], **alone)
        near(output.logits[row, -len(text) :], got.logits[0], 1e-3)
    answer = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, **state)
    assert answer.shape == (2, TEXT + 3) and torch.equal(answer[:, :TEXT], ids)
    if state:
        cached = model.generate(
            ids, attention_mask=mask, max_new_tokens=3, do_sample=False,
            past_key_values=state["memory_state"].to_cache(),
        )  # fmt: skip
        assert torch.equal(cached, answer)
    if case.additive is False or name == "task_tokens":
        return
    with ml.disabled(model):
        assert (
            model(ids, attention_mask=mask, **where).logits[1, -1] - output.logits[1, -1]
        ).abs().max() > 1e-3


def picture(architecture):
    ids = torch.arange(10, 10 + TEXT)[None].clone()
    ids[:, 2:6] = 127
    kinds = {"token_type_ids": (ids == 127).long()} if architecture == "gemma3" else {}
    torch.manual_seed(4)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28), **kinds}


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gemma3", "llava"])
@pytest.mark.parametrize("name", ALL)
def test_pictures_are_read_whole_or_refused(name, architecture):
    kind = kind_of(name)
    model = wrap(tiny(architecture).build(), kind, shake=False)
    if architecture == "gemma3":  # which begins with pictures that say nothing
        model.model.multi_modal_projector.mm_input_projection_weight.data.normal_()
    inputs = picture(architecture)
    if kind.segmented or name == "neural_window":
        for call in (model, lambda **given: model.generate(**given, max_new_tokens=2)):
            with pytest.raises(ValueError, match=says("segments", "images", "memlayers.disabled")):
                call(**inputs)
        return
    got = model(**inputs)
    with ml.disabled(model):
        base = model(**inputs).logits
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert (base - other).abs().max() > 1e-3  # the picture matters
    if kind.additive:
        near(got.logits[..., : base.shape[-1]], base)
    again = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert (again - got.logits).abs().max() > 1e-3
