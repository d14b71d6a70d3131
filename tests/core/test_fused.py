import copy
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedsim.core.fused import ROTATION, GatedMLP, RMSNorm, Rotation, _Gate, _Rotation, fuse

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def unfused_model(kind, monkeypatch, **others):
    """Returns a small random transformers model with its original code, even where an earlier test has fused it."""
    settings = CONFIG_MAPPING[kind]()
    for name, value in (SIZES | others).items():
        if hasattr(settings, name):
            setattr(settings, name, value)
    if kind == "gemma3_text":
        settings.layer_types = ["full_attention"] * 2
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").requires_grad_(False).eval()
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.weight.copy_(torch.rand_like(module.weight))
    for module in {type(each).__module__ for each in model.modules()}:
        rotation = getattr(sys.modules[module], ROTATION, None)
        if rotation is not None:
            monkeypatch.setattr(sys.modules[module], ROTATION, getattr(rotation, "original", rotation))
    return model


def logits_and_gradient(model):
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).to(model.dtype).requires_grad_()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    logits = model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits
    return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]


def rotation_of(model):
    return next(
        getattr(sys.modules[module], ROTATION, None)
        for module in {type(each).__module__ for each in model.modules()}
        if ".models." in module
    )


KINDS = {
    "llama": (2, True),
    "mistral": (2, True),
    "qwen3": (2, True),
    "granite": (2, True),
    "gemma3_text": (0, True),
    "phi3": (0, True),
    "cohere2": (2, False),
    "glm4": (0, False),
    "olmo2": (2, True),  # rotates in float32, so that only a float32 model takes the fused path
    "gpt2": (0, False),
}
"""How many gates of a model are fused, and whether its rotation is."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "num_gates", "turns"), [(kind, *parts) for kind, parts in KINDS.items()])
def test_a_fused_model_gives_the_same_logits_and_gradients_bit_for_bit(kind, num_gates, turns, dtype, monkeypatch):
    model = unfused_model(kind, monkeypatch).to(dtype)
    before = logits_and_gradient(model)

    fuse(model)

    assert [torch.equal(one, other) for one, other in zip(before, logits_and_gradient(model), strict=True)] == [True, True]
    assert sum(isinstance(module, GatedMLP) for module in model.modules()) == num_gates
    assert isinstance(rotation_of(model), Rotation) == turns


def test_a_partial_rotation_keeps_the_gradients_bit_for_bit(monkeypatch):
    model = unfused_model("phi3", monkeypatch, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    before = logits_and_gradient(model)

    fuse(model)

    assert isinstance(rotation_of(model), Rotation)
    assert torch.equal(logits_and_gradient(model)[1], before[1])


def test_fusing_keeps_names_and_random_state_and_a_copy_has_its_own_weights(monkeypatch):
    model = unfused_model("llama", monkeypatch)
    names, random_state = list(model.state_dict()), torch.get_rng_state()

    fuse(model)

    assert list(model.state_dict()) == names
    assert torch.equal(torch.get_rng_state(), random_state)
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert not torch.equal(logits_and_gradient(other)[0], logits_and_gradient(model)[0])


def test_the_backward_passes_match_finite_differences():
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 3, 4, dtype=torch.float64)

    assert torch.autograd.gradcheck(_Gate.apply, (a, b))
    assert torch.autograd.gradcheck(lambda each: _Rotation.apply(each, cos, sin), (x,))


class Doubled(nn.Module):
    """A gate that also doubles its output."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return 2 * self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Routed(Doubled):
    """A gate with an optional second argument."""

    def forward(self, x, expert=None):
        y = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y if expert is None else y[expert]


class InFloat32(Doubled):
    """A gate that multiplies in float32."""

    def forward(self, x):
        gate = nn.functional.silu(self.gate_proj(x).float()) * self.up_proj(x).float()
        return self.down_proj(gate.to(x.dtype))


def rotation_in_float32(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def rotated(x):
        first, second = x.float().chunk(2, dim=-1)
        return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    return rotated(q), rotated(k)


def test_fits_accepts_only_modules_that_compute_the_same(monkeypatch):
    gemma, llama = (unfused_model(kind, monkeypatch).model.layers[0] for kind in ("gemma3_text", "llama"))

    assert not GatedMLP.fits(Doubled())
    assert not GatedMLP.fits(Routed())
    assert not GatedMLP.fits(InFloat32())
    assert not GatedMLP.fits(gemma.mlp)
    assert not RMSNorm.fits(gemma.input_layernorm)  # its weight is added to one
    assert not RMSNorm.fits(nn.LayerNorm(8))
    assert GatedMLP.fits(llama.mlp)
    assert RMSNorm.fits(llama.input_layernorm)
    assert not Rotation.fits(lambda q, k, cos, sin, unsqueeze_dim=1: (q * sin, k * cos))
    assert not Rotation.fits(rotation_in_float32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
def test_the_fused_norm_equals_that_of_transformers_up_to_rounding(dtype, tolerance, monkeypatch):
    original = unfused_model("llama", monkeypatch).model.norm.to(dtype)
    x = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    weights = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = []
    for norm in (original, RMSNorm(original)):
        y = norm(x)
        found.append((y, torch.autograd.grad((y * weights).sum(), x)[0]))

    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance)


def test_a_model_with_fused_norms_differs_only_by_rounding(monkeypatch):
    model = unfused_model("llama", monkeypatch)
    names, before = list(model.state_dict()), logits_and_gradient(model)
    for layer in [model.model, *model.model.layers]:
        for name, child in layer.named_children():
            if RMSNorm.fits(child):
                setattr(layer, name, RMSNorm(child))

    assert sum(isinstance(module, RMSNorm) for module in model.modules()) == 5
    assert list(model.state_dict()) == names
    torch.testing.assert_close(logits_and_gradient(copy.deepcopy(model)), before, rtol=1e-4, atol=1e-5)


def test_a_fused_gate_saves_less_for_the_backward_pass(monkeypatch):
    def saved_values(model):
        total = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
            x = torch.randn(2, 9, 32).requires_grad_()
            model(inputs_embeds=x, use_cache=False)
        return sum(each.numel() for each in total.values() if each.shape[-1] == SIZES["intermediate_size"] and each.dim() == 3)

    model = unfused_model("llama", monkeypatch)
    before = saved_values(model)
    fuse(model)

    assert saved_values(model) == before * 2 / 3 > 0  # gate and up, but not the gate after its activation
