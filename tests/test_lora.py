"""lora.py: what an adapter must change and what it must not, with PEFT as reference."""

import copy

import pytest
import torch
from conftest import rows, tiny_model

import lora
from infra import export
from logprob import response_logprobs

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[1, 5, 3, 9, 2]])


def logits(model):
    """Logits by transformers' own attention, which PEFT's copy runs too."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(IDS).logits


def adapted(seed=0, trained=True, rank=4, scale=2.0):
    model = tiny_model(seed=seed)
    w = lora.create(model, TARGETS, rank, seed)
    if trained:
        g = torch.Generator().manual_seed(7)
        for p in w.values():
            p.data = torch.randn(p.shape, generator=g) * 0.1
    lora.attach(model, w, scale)
    return model, w


def test_a_fresh_adapter_changes_nothing_bit_for_bit(any_model):
    before = logits(any_model)
    names = lora.attach(any_model, lora.create(any_model, TARGETS, 4, 0), 2.0)
    assert len(names) == 14
    assert torch.equal(logits(any_model), before)


def test_a_step_of_w_changes_b_and_not_one_bit_of_theta():
    model, w = adapted(trained=False)
    before = {n: p.clone() for n, p in lora.base_parameters(model).items()}
    optimizer = torch.optim.AdamW(w.values(), lr=0.1, weight_decay=0.0)
    response_logprobs(model, rows(3))[0].sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in lora.base_parameters(model).items())
    assert all(p.any() for n, p in w.items() if "lora_B" in n)


def test_base_parameters_have_the_names_from_before_attach():
    model, plain = adapted()[0], tiny_model()
    assert set(lora.base_parameters(model)) == set(dict(plain.named_parameters()))


def test_merging_equals_the_adapted_model_is_idempotent_and_does_not_change_it():
    model, _ = adapted()
    target, before = tiny_model(seed=5), copy.deepcopy(model.state_dict())
    lora.merge_into(target, model)
    torch.testing.assert_close(logits(target), logits(model), rtol=1e-4, atol=1e-4)
    once = copy.deepcopy(target.state_dict())
    lora.merge_into(target, model)
    assert all(torch.equal(once[n], t) for n, t in target.state_dict().items())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_merging_and_training_round_no_weight_under_autocast():
    model, _ = adapted()
    layer = model.model.layers[0].mlp.up_proj
    expected = layer.merged_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.merged_weight(), expected)
        target = tiny_model(seed=5)
        lora.merge_into(target, model)
    assert torch.equal(target.model.layers[0].mlp.up_proj.weight, expected)


def test_two_bases_share_one_adapter_and_their_gradients_of_it_add_up():
    model = tiny_model()
    shadow, w = copy.deepcopy(model), lora.create(model, TARGETS, 4, 0)
    for p in w.values():
        p.data = torch.randn_like(p) * 0.1
    for base in (model, shadow):
        lora.attach(base, w, 2.0)
    assert torch.equal(logits(model), logits(shadow))
    assert all(p is not q for p, q in zip(*(lora.base_parameters(m).values() for m in (model, shadow)), strict=True))
    for base in (model, shadow):
        base.set_attn_implementation("packed")
    response_logprobs(model, rows(3))[0].sum().backward()
    of_model = [p.grad.clone() for p in w.values()]
    assert any(g.any() for g in of_model)
    assert all(p.grad is None for p in lora.base_parameters(shadow).values())
    response_logprobs(shadow, rows(3))[0].sum().backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(w.values(), of_model, strict=True))


def test_delta_norm_is_the_norm_of_the_merged_difference():
    model, w = adapted()
    modules = [m for m in model.modules() if isinstance(m, lora.LoRALinear)]
    direct = sum(((m.merged_weight() - m.base.weight) ** 2).sum() for m in modules).sqrt().item()
    assert lora.delta_norm(w, 2.0) == pytest.approx(direct, rel=1e-4)


@pytest.mark.parametrize("targets", [["qproj", "k_proj"], ["lm_head"], []])
def test_an_unknown_target_is_refused_with_the_names_of_the_layers(targets):
    with pytest.raises(ValueError, match=r"k_proj.*q_proj"):
        lora.create(tiny_model(), targets, 4, 0)


def test_the_refusal_of_a_target_names_it():
    with pytest.raises(ValueError, match=r"lora_targets: no linear layer is named \['qproj'\]"):
        lora.create(tiny_model(), ["qproj", "k_proj"], 4, 0)


def test_peft_loads_the_saved_adapter_and_gives_the_same_logits(tmp_path):
    peft = pytest.importorskip("peft")
    model, w = adapted()
    export.save_adapter(tmp_path, w, rank=4, alpha=8.0, targets=TARGETS)
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs.base_model.model), logits(model), rtol=1e-5, atol=1e-5)


def test_initialisation_equals_pefts():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    w = lora.create(model, ["q_proj"], 4, 0)
    theirs = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    name = "model.layers.0.self_attn.q_proj"
    ours, bound = w[f"{name}.lora_A.weight"], 32**-0.5
    their_a = theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
    assert ours.shape == their_a.shape
    for a in (ours, their_a):
        assert 0.8 * bound < a.abs().max() <= bound
    assert not w[f"{name}.lora_B.weight"].any()


def test_a_is_uniform_between_plus_and_minus_the_inverse_root_of_the_inputs():
    w = lora.create(tiny_model(), TARGETS, 64, 0)
    for a in (p for name, p in w.items() if "lora_A" in name):
        in_bounds = a * a.shape[1] ** 0.5  # [r, in]
        assert -1 <= in_bounds.min() < -0.99
        assert 0.99 < in_bounds.max() <= 1
        assert in_bounds.mean().abs() < 0.05


def test_layers_of_one_shape_begin_with_different_random_numbers():
    w = lora.create(tiny_model(), TARGETS, 4, 0)
    rows_of_a = {tuple(row.tolist()) for name, p in w.items() if "lora_A" in name for row in p}
    assert len(rows_of_a) == 14 * 4


def test_the_same_seed_makes_the_same_adapter():
    a, b, c = (lora.create(tiny_model(), TARGETS, 4, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)
