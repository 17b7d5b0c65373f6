"""Context distillation of a writer: what the teacher draws and says, the loss beside a brute-force KL, the rows apart."""

import pytest
import torch
from matrix import ARCHITECTURES, near, pad, says, tokens

import memlayers as ml
from memlayers.writing import DistillSection, Segments, WriterSection, of_teacher, row_losses

LLAMA = ARCHITECTURES[0]
UNLIKE = [a for a in ARCHITECTURES if a.name in ("llama", "mistral_sliding", "gpt2", "gemma3")]
DISTILL = {"continuations": 3, "length": 4}


def wrapped(architecture=LLAMA, dtype=torch.float32, n_tokens=3, **writer):
    model = architecture.build().eval().to(dtype)
    writer = {"steps": 2, "learning_rate": 0.1, "distill": DISTILL, **writer}
    torch.manual_seed(1)
    ml.attach(model, ml.CartridgeConfig(n_tokens=n_tokens, writer=writer), name="notes")
    return model


def lesson(model, ids, mask=None):
    return ml.memories(model)["notes"].writer.lesson(
        model, ids, torch.ones_like(ids) if mask is None else mask
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", UNLIKE, ids=lambda a: a.name)
def test_the_teacher_is_the_base_that_reads_the_text(architecture, side):
    """Whatever is padded, and whatever the memory holds."""
    model, base = wrapped(architecture), architecture.build().eval()
    texts = [tokens(1, n, seed=n)[0] for n in (9, 2, 14)]
    segments, teacher = lesson(model, *pad(texts, side))
    assert segments.ids.shape == (3, 3, 4) and segments.mask.all()
    for row, text in enumerate(texts):
        for drawn, said in zip(segments.ids[row], teacher[row]):
            whole = base(torch.cat([text, drawn])[None]).logits[0, len(text) :]
            near(said, whole.log_softmax(-1))


def test_what_is_drawn_is_of_the_row_and_the_seed_alone():
    model, ids = wrapped(), tokens(3, 9)
    together, _ = lesson(model, ids)
    alone, _ = lesson(model, ids[1:2])
    assert torch.equal(together.ids[1:2], alone.ids)
    assert not torch.equal(together.ids[0], together.ids[1])
    torch.manual_seed(7)
    again, _ = lesson(model, ids)
    assert torch.equal(again.ids, together.ids)
    other, _ = of_teacher(model, ids, torch.ones_like(ids), DistillSection(seed=1, **DISTILL))
    assert not torch.equal(other.ids, together.ids)


def test_tokens_are_drawn_as_the_base_has_them():
    """The first token of 4,000 continuations, beside the probabilities."""
    model, ids = wrapped(), tokens(1, 9)
    segments, _ = of_teacher(model, ids, torch.ones_like(ids), DistillSection(continuations=4000, length=1))
    expected = LLAMA.build().eval()(ids).logits[0, -1].softmax(-1)
    share = segments.ids.flatten().bincount(minlength=len(expected)) / 4000
    assert (share - expected).abs().max() < 4 * (expected.max() / 4000).sqrt()
    assert expected.max() > 0.02


def test_the_loss_is_the_kl_and_reaches_all_keys_and_values():
    """Beside a sum over the vocabulary, token by token, of a model that is given the same keys and values."""
    model, ids = wrapped(dtype=torch.float64), tokens(2, 9)
    segments, teacher = lesson(model, ids)
    mask = segments.mask.clone()
    mask[0, 1, 2:] = False  # an end of sequence
    segments = Segments(segments.ids, mask, mask)
    with torch.no_grad():
        start = wrapped(dtype=torch.float64, steps=0)
        state = ml.write(start, ids)
    fields = {f: x.requires_grad_() if x.is_floating_point() else x for f, x in state["notes"].items()}
    losses = row_losses(model, segments, ml.MemoryState({"notes": fields}), teacher=teacher)
    base = LLAMA.build().eval().double()
    for row in range(2):
        each = []
        for i, continuation in enumerate(segments.ids[row]):
            logits = base(torch.cat([ids[row, :3], continuation])[None]).logits[0, 3:]
            whole = base(torch.cat([ids[row], continuation])[None]).logits[0, 9:]
            for place in range(4):
                if mask[row, i, place]:
                    p, q = whole[place].softmax(-1), logits[place].softmax(-1)
                    each.append(sum(a * (a / b).log() for a, b in zip(p, q)))
        near(losses[row].double(), torch.stack(each).mean(), 1e-5)
    gradients = torch.autograd.grad(losses.sum(), [x for x in fields.values() if x.is_floating_point()])
    assert len(gradients) == 4 and all((g.flatten(2).abs().amax(-1) > 0).all() for g in gradients)


def test_a_cartridge_of_the_whole_text_has_nothing_to_learn():
    model, ids = wrapped(n_tokens=9, steps=0), tokens(2, 9)
    segments, teacher = of_teacher(model, ids, torch.ones_like(ids), DistillSection(**DISTILL))
    assert row_losses(model, segments, ml.write(model, ids), teacher=teacher).max() < 1e-6


@pytest.mark.parametrize("kind", ["cartridge", "lora"])
def test_writing_lowers_it_and_keeps_rows_apart(kind):
    writer = {"steps": 20, "learning_rate": 0.05, "distill": {"continuations": 4, "length": 4, "batch": 3}}
    config = {
        "cartridge": ml.CartridgeConfig(n_tokens=3, writer=writer),
        "lora": ml.LoRAMemoryConfig(r=4, lora_alpha=8, writer=writer),
    }[kind]
    model, ids = LLAMA.build().eval(), tokens(2, 12)
    torch.manual_seed(1)
    memory = ml.attach(model, config, name="notes")
    segments, teacher = memory.writer.lesson(model, ids, torch.ones_like(ids))
    state = ml.write(model, ids)
    before = ml.MemoryState({"notes": memory.new_state(2)})
    first, last = (row_losses(model, segments, s, teacher=teacher) for s in (before, state))
    assert (last < 0.7 * first).all()
    for field, tensor in ml.write(model, ids[1:])["notes"].items():
        torch.testing.assert_close(state["notes"][field][1:], tensor, atol=2e-3, rtol=2e-3)


def test_a_continuation_ends_where_the_base_ends_it():
    model, ids = wrapped(), tokens(2, 9)
    drawn, _ = lesson(model, ids)
    model.generation_config.eos_token_id = [int(drawn.ids[1, 2, 1]), 1]
    ended, _ = lesson(model, ids)
    assert torch.equal(ended.ids, drawn.ids) and ended.mask[1, 2].tolist() == [True, False, False, False]


def test_a_step_takes_the_next_continuations():
    writer = ml.memories(wrapped(distill={"continuations": 3, "length": 4, "batch": 2}))["notes"].writer
    ids = torch.arange(3)[None, :, None]
    taken = [writer._batch(step, Segments(ids, ids, ids), ids[..., None]) for step in range(3)]
    assert [part.ids.flatten().tolist() for part, _ in taken] == [[0, 1], [2, 0], [1, 2]]
    assert all(torch.equal(said[..., 0], part.ids) for part, said in taken)


def test_training_mode_is_not_the_teachers():
    """Neither dropout nor checkpointing, which keeps no cache, reaches the teacher; the modes are as they were."""
    model, ids = wrapped(), tokens(2, 9)
    segments, teacher = lesson(model, ids)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    again, said = lesson(model, ids)
    assert torch.equal(again.ids, segments.ids) and torch.equal(said, teacher)
    assert [module.training for module in model.modules()] == modes


def test_what_does_not_apply_is_named():
    for field in ("streaming", "token_weights"):
        with pytest.raises(ml.ConfigError, match=says(f"{field}:", "distill")):
            WriterSection(distill=DistillSection(), **{field: True})
    with pytest.raises(ml.ConfigError, match=says("batch: 9", "8 continuations")):
        DistillSection(continuations=8, batch=9)
    model = wrapped(distill={"continuations": 1, "length": 90})
    with pytest.raises(ValueError, match=says("writer.distill", "7 + 90", "96 positions", "length")):
        ml.write(model, tokens(1, 7))
    ids = tokens(2, 4)
    with pytest.raises(ValueError, match=says("row 1 has no token", "writer.distill")):
        lesson(wrapped(), ids, torch.tensor([[1] * 4, [0] * 4]))
