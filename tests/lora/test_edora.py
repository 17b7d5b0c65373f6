"""EDoRA on PEFT's layers: the formula, what learns, files, merging."""

import pytest
import torch
from matrix import ARCHITECTURES, says, tokens
from peft import LoraConfig, PeftModel, get_peft_model

from memlayers.files import DamagedFile
from memlayers.lora.edora import bake, edora, load_edora, save_edora

LLAMA, GPT2 = ARCHITECTURES[0], ARCHITECTURES[3]
each = pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=lambda a: a.name)


def build(architecture, r=4, **fields):
    targets = ["q_proj", "down_proj"] if architecture is LLAMA else ["c_attn", "c_proj"]
    options = {"use_dora": True, "fan_in_fan_out": architecture is GPT2, **fields}
    config = LoraConfig(r=r, lora_alpha=8, target_modules=targets, **options)
    return get_peft_model(architecture.build().eval(), config)


def shaken(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".R") or "magnitude" in name:
                parameter.add_(0.3 * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.3))
    return model


@each
@torch.no_grad()
def test_it_starts_as_the_base(architecture):
    ids = tokens(2, 9)
    expected = architecture.build().eval()(ids).logits
    torch.testing.assert_close(edora(build(architecture))(ids).logits, expected, atol=1e-5, rtol=1e-5)


@each
def test_only_magnitudes_and_r_by_r_learn(architecture):
    model = edora(build(architecture)).train()
    model(input_ids=tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert learns and all(name.endswith(".R") or "magnitude" in name for name in learns)
    assert all(p.shape == (4, 4) for name, p in learns.items() if name.endswith(".R"))
    assert all(p.grad is not None and p.grad.any() for p in learns.values())


@each
@torch.no_grad()
def test_formula_and_merge(architecture):
    """Each layer against W written down; merged into the base the model gives the same."""
    model, ids = shaken(edora(build(architecture))), tokens(2, 9)
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_magnitude_vector") or not layer.lora_A:
            continue
        base = layer.get_base_layer()
        w0 = base.weight.T if architecture is GPT2 else base.weight
        a, b = layer.lora_A["default"].parametrizations.weight, layer.lora_B["default"].weight
        torch.testing.assert_close(a.original @ a.original.T, torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(w0 @ a.original.T, b, atol=1e-4, rtol=1e-4)  # B = U Σ
        torch.testing.assert_close(b.norm(dim=0), torch.linalg.svdvals(w0)[:4])
        w = w0 + 2.0 * b.double() @ a[0].R.double() @ a.original.double()
        w = layer.lora_magnitude_vector["default"].weight[:, None] * w / w.norm(dim=1, keepdim=True)
        x = torch.randn(3, w0.shape[1])
        expected = x.double() @ w.T + (0 if base.bias is None else base.bias)
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5, msg=name)
    expected = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_saved_with_checksums(tmp_path):
    model, ids = shaken(edora(build(LLAMA))), tokens(2, 9)
    save_edora(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(load_edora(LLAMA.build().eval(), tmp_path).eval()(ids).logits, model(ids).logits)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[-5] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match=says(str(path), "not as it was written")):
            load_edora(LLAMA.build(), tmp_path)
        path.write_bytes(whole)


@each
@torch.no_grad()
def test_saved_loaded_and_baked(architecture, tmp_path):
    model, ids = shaken(edora(build(architecture))), tokens(2, 9)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "edora")
    again = load_edora(architecture.build().eval(), tmp_path / "edora").eval()
    assert torch.equal(again(ids).logits, expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    bake(model).save_pretrained(tmp_path / "dora")
    assert torch.equal(model(ids).logits, expected)
    plain = PeftModel.from_pretrained(architecture.build().eval(), tmp_path / "dora")
    assert torch.equal(plain(ids).logits, expected)
    with pytest.raises(ValueError, match="no EDoRA adapter"):
        load_edora(architecture.build(), tmp_path / "dora")


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=says("'default'", "use_dora=True")):
        edora(build(LLAMA, use_dora=False))
    with pytest.raises(ValueError, match="no LoRA adapter called 'other'"):
        edora(build(LLAMA), "other")
    with pytest.raises(ValueError, match=says("r: 33", "32 singular values")):
        edora(build(LLAMA, r=33))
    with pytest.raises(ValueError, match="EDoRA already"):
        edora(edora(build(LLAMA)))
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        load_edora(LLAMA.build(), tmp_path)
