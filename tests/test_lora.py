"""lora.py: what an adapter must and must not change, and PEFT as the oracle."""

import copy

import pytest
import torch
from conftest import rows, tiny_model

import lora
from infra.model import response_logprobs

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[1, 5, 3, 9, 2]])


def logits(model):
    """Through transformers' own attention, so that PEFT's copy runs the same code."""
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


def test_a_step_of_w_moves_b_and_leaves_theta_bit_identical():
    model, w = adapted(trained=False)
    before = {n: p.clone() for n, p in lora.base_parameters(model).items()}
    optimizer = torch.optim.AdamW(w.values(), lr=0.1, weight_decay=0.0)
    response_logprobs(model, rows(3))[0].sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in lora.base_parameters(model).items())
    assert all(p.any() for n, p in w.items() if "lora_B" in n)


def test_base_parameters_are_the_model_s_own_under_their_old_names():
    model, plain = adapted()[0], tiny_model()
    assert set(lora.base_parameters(model)) == set(dict(plain.named_parameters()))


def test_merging_equals_the_adapted_model_is_idempotent_and_leaves_it_alone():
    model, _ = adapted()
    target, before = tiny_model(seed=5), copy.deepcopy(model.state_dict())
    lora.merge_into(target, model)
    torch.testing.assert_close(logits(target), logits(model), rtol=1e-4, atol=1e-4)
    once = copy.deepcopy(target.state_dict())
    lora.merge_into(target, model)
    assert all(torch.equal(once[n], t) for n, t in target.state_dict().items())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_two_bases_share_one_adapter_and_a_sign_of_minus_one_flips_only_its_gradient():
    model = tiny_model()
    shadow, w = copy.deepcopy(model), lora.create(model, TARGETS, 4, 0)
    for p in w.values():
        p.data = torch.randn_like(p) * 0.1
    lora.attach(model, w, 2.0)
    lora.attach(shadow, w, 2.0, sign=-1.0)
    batch, gradients = rows(3), []
    for m in (model, shadow):
        for p in w.values():
            p.grad = None
        logp, _ = response_logprobs(m, batch)
        logp.sum().backward()
        gradients.append(([p.grad for p in w.values()], [p.grad for p in lora.base_parameters(m).values()]))
    assert all(torch.equal(a, -b) for a, b in zip(gradients[0][0], gradients[1][0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients[0][1], gradients[1][1], strict=True))
    assert any(g.any() for g in gradients[0][0])


def test_delta_norm_is_the_norm_of_the_merged_difference():
    model, w = adapted()
    modules = [m for m in model.modules() if isinstance(m, lora.LoRALinear)]
    direct = sum(((m.merged_weight() - m.base.weight) ** 2).sum() for m in modules).sqrt().item()
    assert lora.delta_norm(w, 2.0) == pytest.approx(direct, rel=1e-4)


def test_unknown_target_names_the_layers_there_are():
    with pytest.raises(ValueError, match=r"no linear layer is named \['qproj'\].*q_proj"):
        lora.create(tiny_model(), ["qproj", "k_proj"], 4, 0)
    with pytest.raises(ValueError, match=r"no linear layer is named \['lm_head'\]"):
        lora.create(tiny_model(), ["lm_head"], 4, 0)


def test_peft_loads_the_saved_adapter_and_gives_the_same_logits(tmp_path):
    peft = pytest.importorskip("peft")
    model, w = adapted()
    lora.save(tmp_path, w, rank=4, alpha=8.0, targets=TARGETS)
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs.base_model.model), logits(model), rtol=1e-5, atol=1e-5)


def test_initialisation_is_peft_s():
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


def test_the_same_seed_makes_the_same_adapter():
    a, b, c = (lora.create(tiny_model(), TARGETS, 4, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)
