"""A catalogue of tiny random models, one for each architecture of transformers that memory may wrap.
Every entry builds a float32 model in eval mode from a config (nothing is downloaded), the same one each time.
The facts cached, chunked, positions and padded say what the bare model itself can do, as measured."""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

# Options that a config gets where its class has them, under its own name for them.
COMMON = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.2,
    init_std=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    tie_word_embeddings=True,
)
MIXED = ["sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention"]
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
MANY = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=2, topk_group=1)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8, mamba_expand=2)
# No step is cut off at the minimum: that is done for a chunk of tokens but not for a single one.
STEPS = dict(time_step_min=1e-6)
DELTA = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=LINEAR,
)

DENSE = dict(
    llama={},
    qwen2={},
    qwen3={},
    mistral=dict(sliding_window=3),
    gpt2={},
    gpt_neo=dict(attention_types=[[["global", "local"], 1]], window_size=3),
    gpt_neox={},
    gemma={},
    gemma2=dict(layer_types=MIXED, sliding_window=4, query_pre_attn_scalar=8),
    gemma3_text=dict(layer_types=MIXED, sliding_window=4, query_pre_attn_scalar=8),
    phi={},
    phi3={},
    stablelm={},
    gptj=dict(rotary_dim=4),
    bloom={},
    opt=dict(ffn_dim=48, word_embed_proj_dim=32),
    falcon=dict(new_decoder_architecture=True, num_kv_heads=2),
    mpt={},
    olmo={},
    olmo2={},
    olmo3=dict(layer_types=MIXED, sliding_window=4),
    cohere=dict(logit_scale=1.0),
    cohere2=dict(logit_scale=1.0, layer_types=MIXED, sliding_window=4),
    granite={},
    glm={},
    glm4={},
    exaone4=dict(layer_types=MIXED, sliding_window=4),
    smollm3=dict(no_rope_layers=[1, 0]),
    starcoder2={},
    gpt_bigcode={},
    codegen=dict(rotary_dim=4),
    persimmon={},
    biogpt={},
    xglm=dict(ffn_dim=48),
    helium={},
    apertus={},
    nemotron={},
    seed_oss={},
    ernie4_5={},
    hunyuan_v1_dense={},
    nanochat={},
    arcee={},
    bitnet={},
    diffllama={},
    ministral=dict(layer_types=MIXED, sliding_window=4),
    vaultgemma=dict(layer_types=MIXED, sliding_window=4, query_pre_attn_scalar=8),
)
MOE = dict(
    mixtral=EXPERTS,
    qwen2_moe=MANY | dict(shared_expert_intermediate_size=16),
    qwen3_moe=MANY,
    olmoe=MANY,
    deepseek_v2=LATENT | ROUTED | dict(first_k_dense_replace=1, n_shared_experts=1),
    deepseek_v3=LATENT | ROUTED | dict(first_k_dense_replace=1, n_shared_experts=1),
    granitemoe=EXPERTS,
    phimoe=EXPERTS,
    gpt_oss=EXPERTS | dict(layer_types=MIXED, sliding_window=4),
    dbrx=dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=16, moe_top_k=2),
        tie_word_embeddings=False,
    ),
    glm4_moe=ROUTED | dict(first_k_dense_replace=1, n_shared_experts=1),
    ernie4_5_moe=dict(
        moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1, moe_layer_end_index=1
    ),
    jetmoe=EXPERTS | dict(kv_channels=8),
    flex_olmo=MANY,
    llama4_text=dict(
        num_local_experts=4, intermediate_size_mlp=48, attention_chunk_size=32, no_rope_layers=[1, 0]
    ),
    hunyuan_v1_moe=dict(num_experts=4, moe_topk=2),
    minimax_m2=EXPERTS,
)
HYBRID = dict(
    qwen3_next=MANY | DELTA | dict(shared_expert_intermediate_size=16),
    qwen3_5_text=DELTA,
    olmo_hybrid=DELTA,
    falcon_h1=MAMBA | dict(mamba_d_ssm=64),
    jamba=dict(
        num_experts=4,
        mamba_d_state=8,
        attn_layer_period=2,
        attn_layer_offset=1,
    ),
    bamba=MAMBA | dict(attn_layer_indices=[1]),
    granitemoehybrid=MAMBA | EXPERTS | dict(layer_types=LINEAR, shared_intermediate_size=16),
    zamba=dict(
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        num_hidden_layers=3,
        mamba_d_state=8,
        num_key_value_heads=4,
        head_dim=16,
    ),
    zamba2=dict(
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        num_hidden_layers=3,
        n_mamba_heads=4,
        mamba_d_state=8,
        chunk_size=8,
        **STEPS,
    ),
    nemotron_h=dict(
        layers_block_type=["linear_attention", "full_attention", "mlp"],
        num_hidden_layers=3,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
        **STEPS,
    ),
    lfm2=dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    lfm2_moe=MANY | dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    minimax=EXPERTS | dict(layer_types=LINEAR, block_size=4),
    kimi_linear=LATENT
    | EXPERTS
    | dict(
        layer_types=LINEAR,
        q_lora_rank=None,
        moe_intermediate_size=16,
        linear_head_dim=8,
        linear_num_heads=4,
    ),
)
ODD = dict(
    mamba=dict(state_size=8),
    mamba2=dict(state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=8),
    falcon_mamba=dict(state_size=8),
    rwkv=dict(tie_word_embeddings=False),
    xlstm=dict(hidden_size=64, num_heads=4, qk_dim_factor=1.0, tie_word_embeddings=False),
    recurrent_gemma=dict(num_hidden_layers=3, attention_window_size=8),
    gemma3n_text=dict(
        num_hidden_layers=4,
        layer_types=MIXED * 2,
        sliding_window=4,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    gemma4_text=dict(
        num_hidden_layers=4,
        layer_types=MIXED * 2,
        sliding_window=4,
        global_head_dim=8,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
    ),
    longcat_flash=LATENT
    | dict(
        num_layers=2,
        num_hidden_layers=4,
        head_dim=4,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
    ),
    ctrl=dict(dff=48),
    xlnet=dict(d_inner=48),
    bert={},
    bart=dict(decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48),
    **{"openai-gpt": {}},
)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
VISION["image_size"] = 28
PATCHES = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
SECTIONS = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]))
# The decoder's config class by its model_type, the decoder's options, the vision tower's, the wrapper's.
MULTIMODAL = dict(
    gemma3=("gemma3_text", DENSE["gemma3_text"], VISION, dict(mm_tokens_per_image=4)),
    llava=("llama", {}, VISION | dict(model_type="clip_vision_model"), dict(vision_feature_layer=-1)),
    mistral3=("mistral", dict(sliding_window=3), VISION | dict(model_type="pixtral", head_dim=8), {}),
    qwen2_vl=("qwen2_vl_text", SECTIONS, dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2), {}),
    qwen2_5_vl=("qwen2_5_vl_text", SECTIONS, PATCHES | dict(fullatt_block_indexes=[0]), {}),
    qwen3_vl=("qwen3_vl_text", SECTIONS, PATCHES | dict(deepstack_visual_indexes=[0]), {}),
    qwen3_5=("qwen3_5_text", DELTA, PATCHES, {}),
    idefics3=("llama", {}, VISION, {}),
    smolvlm=("llama", {}, VISION, {}),
    internvl=("qwen2", {}, VISION, {}),
    aya_vision=("cohere2", DENSE["cohere2"], VISION | dict(model_type="siglip_vision_model"), {}),
)
# It sees the whole prompt at once: its text isn't causal.
ODD_MULTIMODAL = dict(
    paligemma=("gemma", {}, VISION | dict(model_type="siglip_vision_model"), dict(projection_dim=32))
)

# What a bare model can't do.
NO_FACTS = dict(
    cached={"rwkv", "recurrent_gemma", "openai-gpt", "xlnet", "bert", "paligemma"},
    chunked={"jamba", "zamba", "minimax", "mamba", "falcon_mamba"}
    | {"recurrent_gemma", "openai-gpt", "xlnet", "bert", "paligemma"},
    positions={"bamba", "minimax"},
    padded={"rwkv", "xlstm", "bart", "paligemma"},
)


@dataclasses.dataclass(frozen=True)
class Tiny:
    name: str
    group: str  # dense, moe, hybrid, multimodal, or odd: it may have to be refused
    build: Callable[[], torch.nn.Module]
    cached: bool = True  # tokens one by one after a cached start, given position_ids, match the whole row
    chunked: bool = True  # several tokens at once after a cached start do too
    positions: bool = True  # both hold without position_ids as well
    padded: bool = True  # a left-padded row, with position_ids, gives the logits of the row alone


def _options(kind, options):
    """`options` and whatever of the common ones the config class of `kind` knows, and no dropout."""
    cls = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(cls)}
    both = {name: 0.0 for name in known if "drop" in name or "jitter" in name}
    for key, value in COMMON.items():
        key = key if key in known else cls.attribute_map.get(key)
        if key in known:
            both[key] = value
    return both | copy.deepcopy(options)


def _finish(model):
    """Makes a recurrent state count and last: at first little goes in, and it is gone after a few tokens."""
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.data.fill_(-3.0)
        elif name.endswith(("dt_bias", "dt_proj.bias", "dt_proj_bias")):
            weight.data.zero_()
    return model.eval()


def _text(kind, options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **_options(kind, options))
    return _finish(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def _multimodal(kind, decoder, options, vision, wrapper):
    torch.manual_seed(0)
    text = _options(decoder, options) | dict(model_type=decoder)
    ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=True)
    config = AutoConfig.for_model(
        kind, text_config=text, vision_config=copy.deepcopy(vision), image_token_id=127, **ends, **wrapper
    )
    return _finish(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))


def _entry(name, group, build):
    return Tiny(name, group, build, **{fact: name not in names for fact, names in NO_FACTS.items()})


_TEXT = dict(dense=DENSE, moe=MOE, hybrid=HYBRID, odd=ODD)
TINY = [
    _entry(name, g, partial(_text, name, options))
    for g, some in _TEXT.items()
    for name, options in some.items()
]
TINY += [
    _entry(name, group, partial(_multimodal, name, *parts))
    for group, some in (("multimodal", MULTIMODAL), ("odd", ODD_MULTIMODAL))
    for name, parts in some.items()
]


def tiny(name):
    """The entry called `name`."""
    return next(entry for entry in TINY if entry.name == name)
