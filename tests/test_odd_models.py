"""Models that were pickled, resized, kept on disk or run in another thread; architectures that call their parts in ways of
their own."""

import copy
import io
import multiprocessing
import threading

import pytest
import torch
from architectures import tiny
from matrix import KINDS, TEXT, VOCAB, llama, near, same_state, says, tokens, wrap
from transformers import AutoModelForCausalLM

import memlayers as ml

BY_NAME = {kind.name: kind for kind in KINDS}
every_kind = pytest.mark.parametrize("name", list(BY_NAME))


def given(model, kind, rows=2, ids=None):
    ids = tokens(rows, TEXT, seed=3) if ids is None else ids
    return {"memory_state": ml.write(model, ids)} if kind.stateful else {}


@torch.no_grad()
def answers(model, case, **state):
    return model(case.tokens(2, TEXT), **(state or given(model, case.kind))).logits


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [through_torch_save, copy.deepcopy], ids=["torch_save", "deepcopy"])
@every_kind
def test_a_whole_model_is_copied(name, copied):
    case = llama(name)
    model = case.model()
    expected, base = answers(model, case), case.base()(tokens(2, TEXT)).logits
    other = copied(model)
    assert torch.equal(answers(other, case), expected)
    assert list(ml.memories(other)) == list(ml.memories(model))
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ml.detach(model)
    assert torch.equal(answers(other, case), expected), "it stands on the model that it was copied from"
    state = {} if not case.kind.stateful else {"close_memory": True}
    if case.kind.learns:
        other.train()(case.tokens(2, TEXT), labels=case.tokens(2, TEXT), **state).loss.backward()
        assert any(p.grad is not None for _, p in ml.memory_parameters(other))
    ml.detach(other.eval())
    assert torch.equal(other(tokens(2, TEXT)).logits, base)


def _in_another_process(queue, model, ids, state):
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(ids, **state).logits.numpy())


def test_another_process_is_given_the_model():
    context = multiprocessing.get_context("spawn")
    queue, case = context.Queue(), llama("recurrent")
    model, ids = case.model().requires_grad_(False), tokens(2, TEXT)
    state = given(model, case.kind)
    process = context.Process(target=_in_another_process, args=(queue, model, ids, state))
    process.start()
    got = torch.from_numpy(queue.get(timeout=120))
    process.join()
    assert torch.equal(got, model(ids, **state).logits)


def procedures(model, ids):
    """Logits of the procedures, and those of the base's first tokens."""
    logits = model(ids).logits
    return logits[..., -3:], logits[..., :VOCAB]


@torch.no_grad()
@pytest.mark.parametrize("name", ["task_tokens", "task_tokens_untied"])
@pytest.mark.parametrize("n_more", [8, 1, -4])
def test_task_tokens_move_with_the_end_of_the_vocabulary(name, n_more):
    case = llama(name)
    model = case.model()
    (memory,) = ml.memories(model).values()
    rows, text = VOCAB + n_more, tokens(2, TEXT).clamp(max=VOCAB - 5)

    def asked():
        ids = text.clone()
        ids[:, 2], ids[:, 5] = memory.id_of("sort"), memory.id_of("reverse")
        return ids

    theirs, of_base = procedures(model, asked())
    model.resize_token_embeddings(rows)
    assert [memory.id_of(n) for n in ("sort", "copy", "reverse")] == [rows, rows + 1, rows + 2]
    got, got_base = procedures(model, asked())
    assert model(text).logits.shape[-1] == rows + 3
    near(got, theirs, 1e-6)
    same = min(rows, VOCAB)
    near(got_base[..., :same], of_base[..., :same], 1e-6)
    with pytest.raises(ValueError, match=str(rows + 3)):
        model(torch.full((1, 2), rows + 3))
    assert model(text, labels=asked()).loss.isfinite()
    model.resize_token_embeddings(rows + 2)  # and once more
    assert memory.id_of("sort") == rows + 2
    near(procedures(model, asked())[0], theirs, 1e-6)
    ml.detach(model)
    assert model(text).logits.shape[-1] == model.config.vocab_size == rows + 2
    assert not any("forward" in vars(module) for module in model.modules())
    assert "resize_token_embeddings" not in vars(model)
    if n_more > 0:
        near(model(text).logits[..., :VOCAB], case.base()(text).logits)


@torch.no_grad()
def test_a_resize_leaves_other_memories_as_they_are():
    for name in ("recurrent", "neural_mag", "lora", "product_key", "reversible"):
        case = llama(name)
        model = case.model()
        state = given(model, case.kind)
        expected = model(tokens(2, 7), **state).logits
        model.resize_token_embeddings(VOCAB + 8)
        near(model(tokens(2, 7), **state).logits[..., :VOCAB], expected, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["recurrent", "lora", "product_key", "cartridge", "task_tokens"])
def test_embeddings_on_disk(name, tmp_path):
    case = llama(name)
    case.base().save_pretrained(tmp_path / "base")
    parts = {
        "model.embed_tokens": "disk",
        "lm_head": "disk",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
    }
    where = {**parts, "model.norm": "cpu", "model.rotary_emb": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=where, offload_folder=str(tmp_path / "disk")
    ).eval()
    assert base.get_input_embeddings().weight.is_meta
    if name == "task_tokens":  # whose rows stand on those of the embedding
        with pytest.raises(ml.ConfigError, match=says("accelerate", "device_map")):
            wrap(base, case.kind)
        assert ml.memories(base) == {}
        return
    model, expected = wrap(base, case.kind), case.model()
    assert all(p.device.type == "cpu" for _, p in ml.memory_parameters(model))
    for (_, parameter), (_, other) in zip(ml.memory_parameters(model), ml.memory_parameters(expected)):
        parameter.copy_(other)
    near(answers(model, case), answers(expected, case))
    if case.kind.stateful:
        same_state(*(m(tokens(2, 7), **given(m, case.kind)).memory_state for m in (model, expected)))
    ids = tokens(2, 7)
    answer = [
        m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        for m in (model, expected)
    ]
    assert torch.equal(*answer)


@pytest.mark.parametrize("architecture", ["opt", "qwen2_moe", "deepseek_v3"])
def test_flattened_inputs_of_linear_layers(architecture):
    """Rows of different adapters, whose tokens come to some layers without their rows."""
    model = wrap(tiny(architecture).build(), BY_NAME["lora"])
    ids = torch.arange(3, 3 + 2 * TEXT).view(2, TEXT)
    text = torch.stack([torch.arange(50, 50 + TEXT), torch.arange(80, 80 - TEXT, -1)])
    state = ml.write(model, text)
    fields = state[next(iter(state.fields))]
    for field, tensor in fields.items():
        assert (tensor[0] - tensor[1]).abs().max() > 0 or ".lora_A" in field, field
    both = model(ids, memory_state=state).logits
    for row in range(2):
        alone = model(ids[row : row + 1], memory_state=state.select([row])).logits
        near(both[row : row + 1], alone, 1e-4)
        same_state(ml.write(model, text[row : row + 1]), state.select([row]), 1e-3)
    swapped = model(ids, memory_state=state.select([1, 0])).logits
    assert (swapped - both).abs().max() > 1e-2
    cache, logits = None, []
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, TEXT)):
        output = model(
            ids[:, start:stop],
            use_cache=True,
            **({"past_key_values": cache} if cache else {"memory_state": state}),
        )
        cache = output.past_key_values
        logits.append(output.logits)
    near(torch.cat(logits, 1), both, 1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["recurrent", "neural_mag", "lora", "cartridge", "associative", "product_key", "task_tokens"]
)
@pytest.mark.parametrize("inner", ["model", "decoder"])
def test_a_call_inside_of_a_call_is_refused(name, inner):
    case = llama(name)
    model = case.model()
    state = given(model, case.kind)
    expected, calls = answers(model, case, **state), []

    def hook(*_):
        with pytest.raises(ValueError, match=says("inside of a call of its own", "copy of the model")):
            (model if inner == "model" else model.model)(tokens(2, 3))
        calls.append(1)

    handle = model.model.layers[0].register_forward_hook(hook)
    got = model(case.tokens(2, TEXT), **state)
    handle.remove()
    assert calls
    near(got.logits, expected)
    near(answers(model, case, **state), expected)
    if case.kind.stateful:
        same_state(got.memory_state, model(case.tokens(2, TEXT), **state).memory_state)

    other = case.model()  # another model may be called

    def another(*_):
        near(other(case.tokens(2, TEXT), **state).logits, expected)
        calls.append(2)

    model.model.layers[0].register_forward_hook(another)
    near(answers(model, case, **state), expected)
    assert calls[-1] == 2


def loss_of(model, ids, text, kind):
    """Loss of a text after another was written, by reading where the kind does."""
    extra = {}
    if kind.stateful and not kind.by_gradient:
        extra["memory_state"] = model(text, close_memory=True).memory_state
    return model(ids, labels=ids, **extra).loss


def gradients(model, run):
    model.zero_grad()
    run()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def equal_gradients(got, expected):
    assert got.keys() == expected.keys() and any(g.abs().max() > 1e-6 for g in expected.values())
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, atol=1e-5 * scale + 1e-9, rtol=1e-4, msg=name)


INSIDE = ["neural_mag", "neural_mac", "associative", "lora", "cartridge"]


@pytest.mark.parametrize("thread", [False, True], ids=["same_thread", "another_thread"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("architecture", ["stablelm", "gptj", "llama"])
@pytest.mark.parametrize("name", INSIDE)
def test_checkpointing_where_layers_hand_no_keywords_on(name, architecture, reentrant, thread):
    """The backward pass runs layers again, out of the call and perhaps in another thread."""
    kind = BY_NAME[name]
    model = wrap(tiny(architecture).build(), kind).train()
    ids, text = torch.arange(3, 3 + 2 * TEXT).view(2, TEXT), torch.arange(40, 40 + 2 * TEXT).view(2, TEXT)
    expected = gradients(model, lambda: loss_of(model, ids, text, kind).backward())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    decoder = model.get_decoder()
    layers = next(m for m in decoder.children() if isinstance(m, torch.nn.ModuleList))
    calls = []
    part = next(m for n, m in layers[0].named_modules() if n.endswith(("input_layernorm", "ln_1")))
    part.register_forward_hook(lambda *_: calls.append(threading.get_ident()))

    def run():
        loss, errors = loss_of(model, ids, text, kind), []
        n_calls = len(calls)

        def backward():
            try:
                loss.backward()
            except BaseException as error:
                errors.append(error)

        if thread:
            worker = threading.Thread(target=backward)
            worker.start()
            worker.join()
            assert threading.get_ident() not in calls[n_calls:]
        else:
            backward()
        assert len(calls) > n_calls, "nothing was run again"
        if errors:
            raise errors[0]

    equal_gradients(gradients(model, run), expected)
