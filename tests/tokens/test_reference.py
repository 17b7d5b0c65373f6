"""Memory tokens against a second implementation, written here from the definition, gradients included.

The reference cuts the text with a `for` loop, puts [read ; segment ; write] together by hand and calls the
decoder of a model that knows nothing of memlayers. It runs in float64, only memory itself is float32.
"""

import pytest
import torch
from matrix import ARCHITECTURES as ALL
from matrix import FIRST_WORD, SEGMENT, VOCAB, Case, Kind, tokens

import memlayers as ml

ARCHITECTURES = {a.name: a for a in ALL if a.name in ("llama", "gpt2", "mistral_sliding", "gemma3")}
N_TOKENS = 2


def to_memory(written, parameters, projection):
    """What the write tokens' hidden states become, float32."""
    written = written.float()
    if projection != "none":
        scale = (written.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        written = written * scale * parameters["norm.weight"]
    if projection == "linear":
        written = written @ parameters["proj"].T
    return written


def reference(base, ids, parameters, config, close=False):
    """Logits (batch, tokens, vocab) and memory (batch, slots, hidden_size) after all written segments."""
    decoder, embed = base.get_decoder(), base.get_input_embeddings()
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    rows, dtype = ids.shape[0], embed.weight.dtype
    outputs = []
    handle = layers[config.write_layer].register_forward_hook(
        lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    recurrent = config.mode == "recurrent"
    learned = config.write_input == "learned" or not recurrent
    memory = torch.zeros(rows, 0, base.config.hidden_size)
    first = parameters["initial_memory"].expand(rows, -1, -1) if recurrent and not learned else None
    pieces = ids.split(config.segment_length, dim=1)
    logits = []
    for index, piece in enumerate(pieces):
        from_end = len(pieces) - index
        if index and config.bptt_segments and from_end % config.bptt_segments == 0:
            memory = memory.detach()  # a group of bptt_segments segments starts here, counted from the end
        read, text = memory.to(dtype), embed(piece)
        last = index == len(pieces) - 1
        write = parameters["write_tokens"].expand(rows, -1, -1) if learned else memory if index else first
        write = write.to(dtype)  # nothing is read before something was written
        sequence = torch.cat([read, text] + ([] if last and not close else [write]), dim=1)
        positions = torch.arange(sequence.shape[1])[None]
        hidden = decoder(inputs_embeds=sequence, position_ids=positions, use_cache=False).last_hidden_state
        start = read.shape[1]
        logits.append(base.get_output_embeddings()(hidden[:, start : start + piece.shape[1]]))
        if not last or close:
            new = to_memory(outputs[-1][:, -config.n_tokens :], parameters, config.projection)
            memory = new if recurrent else torch.cat([memory, new], dim=1)
    handle.remove()
    return torch.cat(logits, dim=1), memory


def loss_of(logits, memory, ids):
    """Next-token loss and a term that reaches the final memory."""
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return nll + memory.double().pow(2).mean()


def config_of(**fields):
    return ml.MemoryTokensConfig(n_tokens=N_TOKENS, segment_length=SEGMENT, **fields)


VARIANTS = {
    "recurrent": config_of(),
    "recurrent_bptt1": config_of(bptt_segments=1),
    "recurrent_bptt2": config_of(bptt_segments=2),
    "recurrent_learned": config_of(write_input="learned", projection="linear", write_layer=0),
    "recurrent_plain": config_of(projection="none"),
    "accumulate": config_of(mode="accumulate"),
    "accumulate_bptt2": config_of(mode="accumulate", bptt_segments=2, projection="linear"),
}


@pytest.mark.parametrize("close", [False, True], ids=["open", "closed"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_memory_and_gradients(architecture, variant, close):
    config, ids = VARIANTS[variant], tokens(2, 4 * SEGMENT + 2)
    case = Case(Kind("reference", {"stream": config}), ARCHITECTURES[architecture])
    model = case.model(freeze_base=False).double()
    memory = ml.memories(model)["stream"].float()
    base = case.base().double()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in memory.named_parameters()}

    expected_logits, expected_memory = reference(base, ids, parameters, config, close)
    expected_loss = loss_of(expected_logits, expected_memory, ids)
    expected_loss.backward()
    output = model(ids, close_memory=close)
    state = output.memory_state["stream"]["memory"]
    loss_of(output.logits, state, ids).backward()

    # Memory is rounded to float32 once a segment on both sides: 1e-6 relative, a few segments deep.
    torch.testing.assert_close(output.logits, expected_logits, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(state, expected_memory, atol=2e-5, rtol=2e-5)
    for name, parameter in memory.named_parameters():
        if parameters[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            scale = parameters[name].grad.abs().max()
            torch.testing.assert_close(
                parameter.grad, parameters[name].grad, atol=float(2e-5 * scale) + 1e-8, rtol=2e-4
            )
    wrapped = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(
            wrapped[name].grad, parameter.grad, atol=float(2e-5 * scale) + 1e-8, rtol=2e-4
        )


def test_truncation_changes_the_gradient_and_nothing_else():
    """The control of the test above: with another bptt_segments the values agree and the gradients do not."""
    ids, grads, logits = tokens(2, 4 * SEGMENT + 2), [], []
    for length in (None, 1, 2, 4):
        case = Case(Kind("bptt", {"stream": config_of(bptt_segments=length)}), ARCHITECTURES["llama"])
        model = case.model()
        output = model(ids)
        output.logits[:, -1].logsumexp(-1).sum().backward()
        grads.append(ml.memories(model)["stream"].initial_memory.grad)
        logits.append(output.logits)
    assert all(torch.equal(other, logits[0]) for other in logits)
    assert grads[0].abs().max() > 0
    for length, grad in zip((1, 2, 4), grads[1:], strict=True):  # five segments: the first is out of reach
        assert grad is None or not grad.any(), length


def test_the_words_of_the_matrix_are_in_every_vocabulary():
    ids = tokens(4, 100)
    assert ids.min() >= FIRST_WORD and ids.max() < VOCAB
