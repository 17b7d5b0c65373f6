"""Bad input to the core: each case is one clear error that names the field and says what to do."""

import pytest
import torch
import transformers
from matrix import SEGMENT, TEXT, llama, says, tokens
from transformers import AutoModelForCausalLM

import memlayers as ml

TOKENS = ml.MemoryTokensConfig(n_tokens=2, segment_length=SEGMENT)


# configs


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        (
            {"type": "tokens", "n_token": 4},
            ["memories.stream.n_token: unknown field", "did you mean 'n_tokens'?"],
        ),
        (
            {"type": "tokens", "zzz": 4},
            ["memories.stream.zzz: unknown field", "known fields", "segment_length"],
        ),
        ({"type": "tokens", "n_tokens": "four"}, ["memories.stream.n_tokens:", "integer", "'four'"]),
        ({"type": "tokens", "n_tokens": 4.0}, ["memories.stream.n_tokens:", "integer"]),
        (
            {"type": "tokens", "n_tokens": 0},
            ["memories.stream.n_tokens:", "greater than or equal to 1", "got 0"],
        ),
        (
            {"type": "tokens", "bptt_segments": 0},
            ["memories.stream.bptt_segments:", "greater than or equal to 1"],
        ),
        ({"type": "tokens", "mode": "recurent"}, ["memories.stream.mode:", "'recurrent'", "'accumulate'"]),
        (
            {"type": "tokens", "write_while_decoding": "yes"},
            ["memories.stream.write_while_decoding:", "boolean"],
        ),
        ({"type": "tokns"}, ["memories.stream.type:", "'tokns'", "did you mean 'tokens'?"]),
        ({"n_tokens": 4}, ["memories.stream.type:", "tokens"]),
        ("tokens", ["memories.stream.type"]),
        (
            {"type": "tokens", "n_token": 4, "modes": "x"},
            ["memories.stream.n_token: unknown field", "memories.stream.modes: unknown field"],
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_config_that_is_wrong(block, parts):
    with pytest.raises(ml.ConfigError, match=says(*parts)):
        ml.parse_memory_config(block, where="memories.stream")


def test_a_config_in_python_that_is_wrong():
    with pytest.raises(ml.ConfigError, match=says("n_token: unknown field", "did you mean 'n_tokens'?")):
        ml.MemoryTokensConfig(n_token=4)
    with pytest.raises(Exception, match="frozen"):
        TOKENS.n_tokens = 5


@pytest.mark.parametrize("layer", [2, -3, 100])
def test_a_layer_that_is_not_there(layer):
    model = llama().base()
    config = ml.MemoryTokensConfig(segment_length=SEGMENT, n_tokens=2, write_layer=layer)
    with pytest.raises(ml.ConfigError, match=says("write_layer", f"layer {layer} is out of range", "0 to 1")):
        ml.attach(model, config)
    assert ml.memories(model) == {} and "memlayers" not in dict(model.named_children())
    assert all(p.requires_grad for p in model.parameters())


# attach


T5 = dict(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
BERT = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        lambda: transformers.BertLMHeadModel(transformers.BertConfig(is_decoder=True, **BERT)),
        lambda: transformers.ModernBertForMaskedLM(
            transformers.ModernBertConfig(pad_token_id=0, cls_token_id=1, sep_token_id=2, **BERT)
        ),
        lambda: llama().base().model,
        lambda: transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(num_key_value_heads=2, pad_token_id=0, **BERT)
        ),
    ],
    ids=["T5", "BERT", "BERT_decoder", "ModernBERT", "no_head", "classifier"],
)
def test_a_model_that_is_not_a_decoder_only_language_model(build):
    model = build()
    with pytest.raises(
        TypeError,
        match=says(
            type(model).__name__, "supported", "decoder-only", "Llama", "GPT-2", "AutoModelForCausalLM"
        ),
    ):
        ml.attach(model, TOKENS)
    assert ml.memories(model) == {}


def test_what_is_no_model_or_no_config():
    with pytest.raises(TypeError, match=says("Linear", "Hugging Face", "supported")):
        ml.attach(torch.nn.Linear(2, 2), TOKENS)
    with pytest.raises(TypeError, match=says("MemoryTokensConfig", "dict")):
        ml.attach(llama().base(), {"type": "tokens"})


def test_a_name_that_is_taken_or_cannot_be_used():
    model = llama().model()
    with pytest.raises(
        ValueError, match=says("already has a memory named 'stream'", "detach", "another name")
    ):
        ml.attach(model, TOKENS, name="stream")
    assert list(ml.memories(model)) == ["stream"]
    for name in ("", "pending", "a.b", "a b", "forward", "1st"):
        with pytest.raises(ValueError, match="cannot name a memory"):
            ml.attach(model, TOKENS, name=name)
    ml.attach(model, TOKENS, name="second-one")


def test_memories_that_do_not_fit_together_or_into_the_model():
    model = llama().model()
    with pytest.raises(
        ml.ConfigError, match=says("other.segment_length: 9", "5", "'stream'", "same segments")
    ):
        ml.attach(model, ml.MemoryTokensConfig(n_tokens=2, segment_length=9), name="other")
    with pytest.raises(ml.ConfigError, match=says("big.segment_length", "97 positions", "the model has 96")):
        ml.attach(llama().base(), ml.MemoryTokensConfig(n_tokens=3, segment_length=91), name="big")


def test_a_memory_that_is_not_there():
    model = llama().model()
    for call in (lambda: ml.detach(model, "strem"), lambda: ml.disabled(model, "strem").__enter__()):
        with pytest.raises(KeyError, match=says("no memory named 'strem'", "'stream'")):
            call()
    with pytest.raises(KeyError, match="none"):
        ml.detach(llama().base(), "stream")
    assert ml.detach(base := llama().base()) is base


# forward and write


@pytest.mark.parametrize("kind", ["recurrent", "neural_mag"])
def test_no_token_to_read(kind):
    model, empty = llama(kind).model(), torch.zeros(1, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one token"):
        model(empty)
    with pytest.raises(ValueError, match="at least one token"):
        model()
    with pytest.raises(ValueError, match=says("at least one token", "(1, 0)")):
        ml.write(model, empty)
    with pytest.raises(ValueError, match=says("(batch, tokens)", "(5,)")):
        ml.write(model, tokens(1, 5)[0])


@pytest.mark.parametrize("kind", ["neural_mag", "neural_mal", "neural_mac", "neural_window"])
def test_nan_in_the_stream_names_its_row(kind):
    """And the other rows, with it out of the batch or behind the mask, are as ever."""
    model, ids = llama(kind).model(), tokens(3, TEXT)
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[1, 4] = torch.nan
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        model(inputs_embeds=embeds)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    embeds[1, 4] = 0
    torch.testing.assert_close(
        model(inputs_embeds=embeds, attention_mask=mask).logits[::2], model(ids).logits[::2]
    )


def test_write_without_a_memory_that_remembers():
    with pytest.raises(ValueError, match=says("nothing to write to", "none")):
        ml.write(llama().base(), tokens(1, 5))
    model = llama().model()
    with ml.disabled(model), pytest.raises(ValueError, match=says("nothing to write to", "stream")):
        ml.write(model, tokens(1, 5))


def test_labels_of_another_length():
    model = llama().model()
    with pytest.raises(ValueError, match=says("labels have shape (2, 12)", "(2, 13)", "-100")):
        model(tokens(2, TEXT), labels=tokens(2, TEXT - 1))


def test_masks_that_do_not_fit():
    model, ids = llama().model(), tokens(2, TEXT)
    for mask in (torch.ones(2, TEXT - 1), torch.ones(3, TEXT), torch.ones(2, 1, TEXT, TEXT)):
        with pytest.raises(ValueError, match=says("attention_mask has shape", "(batch, tokens)", "(2, 13)")):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=says("attention_mask (2, 12)", "(2, 13)")):
        ml.write(model, ids, attention_mask=torch.ones(2, TEXT - 1))


def test_a_state_of_another_batch_size():
    model = llama().model()
    state = ml.write(model, tokens(3, TEXT))
    for call in (
        lambda: model(tokens(2, 4), memory_state=state),
        lambda: ml.write(model, tokens(2, 4), state),
        lambda: model.generate(tokens(2, 4), past_key_values=state.to_cache(), max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=says("3 rows", "the input 2", "state.select")):
            call()


def test_a_state_of_another_memory():
    model = llama().model()
    other_name = llama().base()
    ml.attach(other_name, TOKENS, name="diary")
    with pytest.raises(ValueError, match=says("['diary']", "['stream']")):
        model(tokens(1, 4), memory_state=ml.write(other_name, tokens(1, 4)))
    for config, parts in [
        (ml.MemoryTokensConfig(n_tokens=3, segment_length=SEGMENT), ["'stream'", "3 slots", "2 tokens"]),
        (
            ml.MemoryTokensConfig(n_tokens=3, segment_length=SEGMENT, mode="accumulate"),
            ["'stream'", "mode accumulate", "mode recurrent"],
        ),
    ]:
        other = llama().base()
        ml.attach(other, config, name="stream")
        with pytest.raises(ValueError, match=says(*parts, "written by another memory")):
            model(tokens(1, 4), memory_state=ml.write(other, tokens(1, 4)))
    config = transformers.LlamaConfig(num_key_value_heads=2, pad_token_id=0, **{**BERT, "vocab_size": 512})
    narrow = AutoModelForCausalLM.from_config(config)
    ml.attach(narrow, TOKENS, name="stream")
    with pytest.raises(ValueError, match=says("'stream'", "'memory'", "(1, 2, 16)", "(1, 2, 32)")):
        model(tokens(1, 4), memory_state=ml.write(narrow, tokens(1, 4)))


def test_what_is_no_state():
    model = llama().model()
    with pytest.raises(TypeError, match=says("MemoryState", "dict")):
        model(tokens(1, 4), memory_state={"stream": 1})
    a, b = ml.write(model, tokens(1, 4)), ml.write(model, tokens(1, 4))
    with pytest.raises(ValueError, match=says("memory_state=", "past_key_values", "give one of them")):
        model(tokens(1, 4), memory_state=a, past_key_values=b.to_cache())
    with pytest.raises(ValueError, match="differ in batch size"):
        ml.MemoryState({"stream": {"memory": torch.zeros(2, 1), "length": torch.zeros(3)}})
    with pytest.raises(IndexError, match=says("row 1", "1 rows")):
        a.select([1])
    with pytest.raises(IndexError, match="row -1"):
        a.select([-1])
    with pytest.raises(ValueError, match="at least one state"):
        ml.MemoryState.cat([])
    with pytest.raises(ValueError, match="different memories"):
        ml.MemoryState.cat([a, ml.MemoryState({"other": {"memory": torch.zeros(1, 2, 32)}})])


def test_a_cache_that_was_filled_without_memory():
    base, model = llama().base(), llama().model()
    past = base(tokens(1, 6), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=says("6 tokens read without memory", "state.to_cache()")):
        model(tokens(1, 2), past_key_values=past)


def test_a_state_given_to_a_model_whose_memory_is_off():
    model = llama().model()
    state = ml.write(model, tokens(1, TEXT))
    with ml.disabled(model), pytest.raises(ValueError, match=says("MemoryCache", "disabled")):
        model(tokens(1, 3), past_key_values=state.to_cache())


def test_more_generated_tokens_than_positions():
    model, ids = llama().model(), tokens(1, 4)
    with pytest.raises(ValueError, match=says("positions for 96", "segment_length", "generate fewer tokens")):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=120, do_sample=False)


# decoding that goes back


@pytest.mark.parametrize("kind", ["recurrent", "neural_mag", "neural_mac"])
def test_a_cache_cannot_be_cropped(kind):
    model = llama(kind).model()
    cache = model(tokens(1, TEXT), use_cache=True).past_key_values
    with pytest.raises(
        NotImplementedError, match=says("cropped", "greedy, sampling or beam search", "state.clone()")
    ):
        cache.crop(-1)


@pytest.mark.parametrize("how", ["prompt_lookup", "assistant"])
@pytest.mark.parametrize("given", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("kind", ["recurrent", "neural_mag"])
def test_assisted_decoding_is_refused(kind, how, given):
    model, ids = llama(kind).model(), tokens(1, 3).repeat(1, 3)
    options = (
        {"prompt_lookup_num_tokens": 2} if how == "prompt_lookup" else {"assistant_model": llama().base()}
    )
    if given:
        options["past_key_values"] = ml.write(model, tokens(1, TEXT)).to_cache()
    with pytest.raises((NotImplementedError, ValueError), match=says("crop", "greedy")):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **options)


def test_packed_texts_in_one_row_are_refused(tiny_llama):
    ml.attach(tiny_llama, ml.MemoryTokensConfig(n_tokens=2, segment_length=8))
    ids = torch.randint(3, 40, (1, 12))
    positions = torch.arange(12)[None]
    plain = tiny_llama(ids).logits
    assert torch.equal(tiny_llama(ids, position_ids=positions).logits, plain)
    with pytest.raises(ValueError, match="packed into one row"):
        tiny_llama(ids, position_ids=positions % 6)
