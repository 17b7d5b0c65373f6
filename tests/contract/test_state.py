"""Contract 6: a state is a value. Snapshot, restore, save, load, select rows; fresh in each call given none."""

import copy

import torch
from matrix import LEARNS, SEGMENT, TEXT, cases, near, same_state, tokens
from safetensors import safe_open

import memlayers as ml

STATEFUL = (lambda kind: kind.stateful, "keeps no state")


def three_states(model):
    """States of one row each that differ in length where the kind's state grows, and in pending tokens."""
    return [
        ml.write(model, tokens(1, length, seed=length), close=close)
        for length, close in [(TEXT, False), (SEGMENT, True), (2 * SEGMENT + 1, False)]
    ]


def answers(model, state, rows=None):
    question = tokens(state.batch_size, 4, seed=77) if rows is None else rows
    return model(question, memory_state=state).logits


@torch.no_grad()
@cases()
def test_each_call_without_a_state_starts_fresh(case):
    model, ids = case.model(), tokens(2, TEXT)
    first = model(ids)
    model(tokens(2, TEXT, seed=3))
    second = model(ids)
    assert torch.equal(first.logits, second.logits)
    if case.kind.stateful:
        same_state(second.memory_state, first.memory_state, tolerance=0)


@cases(*LEARNS)
def test_forward_changes_no_parameter_or_buffer(case):
    model, ids = case.model(), tokens(2, TEXT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    model.train()
    model(ids, labels=ids).loss.backward()
    model.eval()
    with torch.no_grad():
        output = model(ids, close_memory=True)
        if case.kind.stateful:
            model(ids, memory_state=output.memory_state)
    for name, tensor in {**model.state_dict(), **dict(model.named_buffers())}.items():
        assert torch.equal(tensor, {**before, **buffers}[name]), name
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


@torch.no_grad()
@cases(*STATEFUL)
def test_a_given_state_is_not_changed(case):
    model = case.model()
    state = ml.write(model, tokens(2, TEXT), close=False)
    kept = state.clone()
    model(tokens(2, TEXT, seed=3), memory_state=state, close_memory=True)
    ml.write(model, tokens(2, TEXT, seed=4), state)
    model.generate(
        tokens(2, 3), attention_mask=torch.ones(2, 3), past_key_values=state.to_cache(), max_new_tokens=8
    )
    same_state(state, kept, tolerance=0)


@torch.no_grad()
@cases(*STATEFUL, scope="none")
def test_clone_shares_nothing(case):
    model = case.model()
    state = ml.write(model, tokens(2, TEXT), close=False)
    copied = state.clone()
    same_state(copied, state, tolerance=0)
    for part in copied.fields.values():
        for tensor in part.values():
            tensor.zero_()
    assert any(t.any() for part in state.fields.values() for t in part.values())
    assert copied.nbytes == state.nbytes > 0


@torch.no_grad()
@cases(*STATEFUL, scope="none")
def test_save_and_load_are_exact(case, tmp_path):
    model = case.model()
    state = ml.write(model, tokens(2, TEXT), close=False)
    path = tmp_path / "alice.safetensors"
    state.save(path)
    loaded = ml.MemoryState.load(path)
    same_state(loaded, state, tolerance=0)
    assert torch.equal(answers(model, loaded), answers(model, state))
    assert [file.name for file in tmp_path.iterdir()] == ["alice.safetensors"]
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"].startswith("memlayers.state")


@torch.no_grad()
@cases(*STATEFUL)
def test_select_and_cat_keep_rows_apart(case):
    """Rows that wrote different amounts, put together, answer as each does alone."""
    model = case.model()
    states = three_states(model)
    together = ml.MemoryState.cat(states)
    assert together.batch_size == 3
    questions = tokens(3, 4, seed=77)
    batch = answers(model, together, questions)
    for index, state in enumerate(states):
        alone = answers(model, state, questions[index : index + 1])[0]
        near(batch[index], alone)
        near(answers(model, together.select([index]), questions[index : index + 1])[0], alone)
    order = torch.tensor([2, 0, 0, 1])
    near(answers(model, together.select(order), questions[order]), batch[order])
    continued = model(tokens(3, SEGMENT, seed=6), memory_state=together).memory_state
    for index, state in enumerate(states):
        one = model(tokens(3, SEGMENT, seed=6)[index : index + 1], memory_state=state).memory_state
        question = questions[index : index + 1]
        near(answers(model, continued.select([index]), question), answers(model, one, question))


@torch.no_grad()
@cases(*STATEFUL, scope="none")
def test_zeros_like_forgets_the_text_but_not_the_shape(case):
    model = case.model()
    a, b = (ml.write(model, tokens(2, TEXT, seed=seed)) for seed in (1, 2))
    zeros = a.zeros_like()
    assert all(not t.any() for p in zeros.fields.values() for t in p.values() if t.is_floating_point())
    assert torch.equal(answers(model, zeros), answers(model, b.zeros_like()))
    assert (answers(model, zeros) - answers(model, a)).abs().max() > 1e-3
    for name, part in a.fields.items():
        assert {f: t.shape for f, t in zeros[name].items()} == {f: t.shape for f, t in part.items()}


@torch.no_grad()
@cases(*STATEFUL)
def test_a_cache_is_reordered_selected_repeated_and_copied(case):
    """What `generate` does to a cache, on memory and window together."""
    model, ids, follow = case.model(), tokens(3, TEXT), tokens(3, 2, seed=5)
    full = torch.ones(3, TEXT + 2)

    def cache():
        return model(ids, use_cache=True).past_key_values

    expected = model(follow, past_key_values=cache(), attention_mask=full).logits
    order = torch.tensor([2, 2, 0])
    reordered = cache()
    reordered.reorder_cache(order)
    near(model(follow[order], past_key_values=reordered).logits, expected[order])
    selected = cache()
    selected.batch_select_indices(torch.tensor([1]))
    near(model(follow[1:2], past_key_values=selected).logits, expected[1:2])
    repeated = cache()
    repeated.batch_repeat_interleave(2)
    twice = follow.repeat_interleave(2, 0)
    near(model(twice, past_key_values=repeated).logits, expected.repeat_interleave(2, 0))
    copied = copy.deepcopy(original := cache())
    near(model(follow, past_key_values=copied).logits, expected)
    near(model(follow, past_key_values=original).logits, expected)


@torch.no_grad()
@cases(*STATEFUL)
def test_the_state_rides_on_the_cache(case):
    model, ids = case.model(), tokens(2, TEXT)
    output = model(ids, use_cache=True)
    assert output.past_key_values.memory_state is output.memory_state
    given = model(tokens(2, 4, seed=77), past_key_values=output.memory_state.to_cache()).logits
    assert torch.equal(given, answers(model, output.memory_state))
    assert model(ids, use_cache=False).past_key_values is None


@torch.no_grad()
@cases(lambda kind: kind.accumulates, "has a state of constant size", scope="none")
def test_an_accumulating_state_grows_with_each_segment(case):
    model = case.model()
    sizes = [ml.write(model, tokens(1, n * SEGMENT)).nbytes for n in (1, 2, 3, 4)]
    assert sizes[0] < sizes[1] < sizes[2] and sizes[3] - sizes[2] == sizes[2] - sizes[1]


@torch.no_grad()
@cases(lambda kind: kind.stateful and not kind.accumulates, "grows with the text", scope="none")
def test_the_state_has_a_constant_size(case):
    model = case.model()
    assert ml.write(model, tokens(1, SEGMENT)).nbytes == ml.write(model, tokens(1, 9 * SEGMENT)).nbytes


@torch.no_grad()
def test_one_row_that_stands_for_many_is_saved(tmp_path):
    """A tensor that was expanded from one number has no step from one to the next."""
    fields = {
        "length": torch.zeros(1, dtype=torch.int64).expand(3)[:1],
        "x": torch.ones(1, 1, 2).expand(1, 4, 2),
    }
    ml.MemoryState({"m": fields}).save(tmp_path / "x.safetensors")
    same_state(ml.MemoryState.load(tmp_path / "x.safetensors"), ml.MemoryState({"m": fields}), tolerance=0)


@torch.no_grad()
@cases(*STATEFUL, scope="none")
def test_the_numbers_of_a_state_are_looked_at_once(case, tmp_path, monkeypatch):
    """Where it came from outside. Looking would make each token wait for the device."""
    model, looked = case.model(), []
    for memory in ml.memories(model).values():
        monkeypatch.setattr(memory, "check_numbers", lambda fields, name: looked.append(name))
    state = ml.write(model, tokens(2, TEXT), close=False)
    model.generate(tokens(2, 3), past_key_values=state.select([1, 0]).to_cache(), max_new_tokens=3)
    assert looked == []
    state.save(tmp_path / "alice.safetensors")
    loaded = ml.MemoryState.load(tmp_path / "alice.safetensors").select([1, 0])
    model.generate(tokens(2, 3), past_key_values=loaded.to_cache(), max_new_tokens=3)
    answers(model, loaded)
    assert looked == list(ml.memories(model))
