"""Ways around memory that a reader of the code found: each gave a wrong result without a word, or a raw error."""

import copy
import tempfile

import pytest
import torch
from architectures import tiny
from matrix import SEGMENT, Case, llama, near, pad, says, tokens, wrap
from matrix_kinds import KINDS, Kind
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

import memlayers as ml

MAC = next(kind for kind in KINDS if kind.name == "neural_mac").configs["past"]


def beside(name):
    """`mac` beside another memory that reads in segments."""
    other = next(kind for kind in KINDS if kind.name == name).configs
    kind = Kind("both", {**{f"first_{n}": c for n, c in other.items()}, "past": MAC})
    return Case(kind, llama().architecture).model()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["associative", "recurrent", "accumulate", "prefix", "reversible"])
def test_rows_with_fewer_segments_beside_write_tokens(name, side):
    model = beside(name)
    rows = [tokens(1, 3 * SEGMENT)[0], tokens(1, 4, seed=1)[0]]
    ids, mask = pad(rows, side)
    state, alone = ml.write(model, ids, attention_mask=mask), ml.write(model, rows[1][None])
    for field, x in alone["past"].items():
        near(state["past"][field][1:].float(), x.float())
    got = model(ids, attention_mask=mask, memory_state=state).logits[1][mask[1].bool()]
    near(got, model(rows[1][None], memory_state=alone).logits[0])


def test_two_mac_on_one_layer_are_refused():
    model = llama("neural_mac").model()
    with pytest.raises(ml.ConfigError, match=says("layers:", "in the context of layer 0")):
        ml.attach(model, MAC, name="more")


@pytest.mark.parametrize("name", ["product_key", "task_tokens", "recurrent"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_a_cache_of_the_caller(name, reentrant):
    """Recomputed layers would read the cache that the first run has filled."""
    model, ids = llama(name).model(freeze_base=False).train(), tokens(2, SEGMENT)

    def gradients(**inputs):
        model.zero_grad()
        model(ids, labels=ids, **inputs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for disabled in (False, True):
        with ml.disabled(model) if disabled else torch.enable_grad():
            got = gradients(past_key_values=DynamicCache())
        if not disabled:
            for parameter, gradient in expected.items():
                torch.testing.assert_close(got[parameter], gradient, atol=1e-5, rtol=1e-3)


def test_a_state_of_another_placement():
    state = ml.write(llama("neural_mac").model(), tokens(1, 7), close=False)
    with pytest.raises(ValueError, match=says("placement mac", "placement mag")):
        llama("neural_mag").model()(tokens(1, 4), memory_state=state)


def test_a_mask_of_rows_selects_them():
    state = ml.write(llama().model(), tokens(2, 7))
    picked = state.select(torch.tensor([False, True]))
    assert picked.batch_size == 1 and torch.equal(picked["stream"]["memory"][0], state["stream"]["memory"][1])
    with pytest.raises(IndexError, match="mask of shape"):
        state.select(torch.tensor([True]))


@torch.no_grad()
def test_task_tokens_beside_an_adapter_of_the_embedding():
    config = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    kind, ids = llama("task_tokens"), tokens(1, 6)
    model = get_peft_model(kind.model(), config).eval()
    folder = tempfile.mkdtemp()
    ml.save(model, folder)
    near(ml.load(folder, base=kind.base())(ids).logits, model(input_ids=ids).logits)
    ml.attach(get_peft_model(kind.base(), config), kind.kind.configs["tasks"])  # after it too


@torch.no_grad()
def test_a_forward_that_another_library_binds_once_more():
    """accelerate's unwrap_model(keep_fp32_wrapper=False) makes a method of what it finds as `forward`."""
    model, ids = llama().model(), tokens(1, 4)
    expected = model(ids).logits
    model.forward = type(model.eval)(model.forward, model)
    assert torch.equal(model(ids).logits, expected)


def test_both_kinds_of_input_and_a_row_without_batch():
    model, ids = llama().model(), tokens(2, 4)
    with pytest.raises(ValueError, match="both given"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match=says("(batch, tokens)", "(4,)")):
        model(ids[0])
    with pytest.raises(ValueError, match="all is padding"):
        ml.write(model, ids, attention_mask=torch.zeros_like(ids))


def test_a_copy_has_caches_of_its_own():
    model, ids = llama().model(), tokens(1, 4)
    copied, cache = copy.deepcopy(model), model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="another model"):
        copied(ids[:, :1], past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)


def test_two_models_with_one_config():
    base = llama().base()
    other = type(base)(base.config)
    for model in (base, other):
        ml.attach(model, ml.TaskTokensConfig(names=["a"]))
    ml.detach(base)
    assert other.config.keys_to_ignore_at_inference.count("memory_state") == 1
    ml.detach(other)
    assert "keys_to_ignore_at_inference" not in vars(other.config)


def test_attach_inside_inference_mode_and_train():
    with torch.inference_mode():
        model = llama().base()
        ml.attach(model, ml.MemoryTokensConfig(n_tokens=2, segment_length=SEGMENT))
    assert not any(p.is_inference() for _, p in ml.memory_parameters(model))


@torch.no_grad()
@pytest.mark.parametrize("name", ["recurrent", "neural_mag", "lora", "associative"])
def test_generate_in_pieces_and_without_a_cache(name):
    model, ids = llama(name).model(), tokens(1, 9)
    state = ml.write(model, tokens(1, 13, seed=3))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    whole = model.generate(ids, past_key_values=state.to_cache(), **options)
    assert torch.equal(model.generate(ids, memory_state=state, prefill_chunk_size=4, **options), whole)
    by_state = model.generate(ids, memory_state=state, use_cache=False, **options)
    assert torch.equal(
        model.generate(ids, past_key_values=state.to_cache(), use_cache=False, **options), by_state
    )


@torch.no_grad()
def test_an_output_as_a_tuple_by_config():
    model, ids = llama().model(), tokens(1, 4)
    expected = model(ids).logits
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], expected)


def test_attach_after_ddp_is_refused():
    class Wrapped(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            torch.nn.Module.__init__(self)
            self.module = module

    with pytest.raises(TypeError, match=says("DistributedDataParallel", "attach first")):
        ml.attach(Wrapped(llama().base()), ml.TaskTokensConfig(names=["a"]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["recurrent", "neural_mag", "lora", "cartridge", "product_key"])
@pytest.mark.parametrize("name", ["gemma3", "llava", "opt"])
def test_the_body_of_a_wrapper_called_by_itself(name, kind):
    """What stands between the head and the decoder knows the caller's mask and images; the decoder is not given them."""
    model = wrap(tiny(name).build(), llama(kind).kind)
    ids = tokens(2, 7) % 90 + 3
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    head = model.get_output_embeddings()
    expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    got = model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    near(head(got)[mask.bool()], expected)
    near(head(model.base_model(ids, use_cache=False).last_hidden_state), model(ids, use_cache=False).logits)
    if name != "opt" and kind == "recurrent":
        with pytest.raises(ValueError, match="pixel_values"):
            model.base_model(ids, pixel_values=torch.zeros(1, 3, 28, 28))
