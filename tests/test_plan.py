"""What plan.py computes is what a run allocates, and what the literature of this project says of large models."""

import weakref

import pytest
import torch
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

import bridge
from infra import memory as plan
from infra import model as M
from sampler import Sampler
from settings import SettingError, Settings, check, parse

COUNTS = {"Qwen/Qwen2.5-3B": 3.09, "meta-llama/Llama-3.2-3B-Instruct": 3.21, "Qwen/Qwen3-8B-Base": 8.19}


def large(**changed) -> Settings:
    paper = dict(
        model="Qwen/Qwen2.5-3B", dtype="bfloat16", prompts_per_step=64, group_size=5, lora_rank=16, sft_batch=64,
        max_new_tokens=3000, checkpoint_layers=36, sampler_slots=320,
    )  # fmt: skip
    return check(Settings(**paper | changed))


def of(name: str) -> plan.Shapes:
    return plan.shapes(plan.config_of(name))


@pytest.mark.parametrize("name", COUNTS)
def test_the_paper_s_models_have_their_published_sizes_without_a_network(name):
    assert of(name).parameters / 1e9 == pytest.approx(COUNTS[name], abs=0.005)


@pytest.mark.parametrize(
    ("name", "world", "gib"),
    [
        ("Qwen/Qwen2.5-3B", 1, 92.0),
        ("Qwen/Qwen2.5-3B", 4, 23.0),
        ("Qwen/Qwen2.5-3B", 8, 11.5),
        ("Qwen/Qwen3-8B-Base", 4, 61.0),
        ("Qwen/Qwen3-8B-Base", 8, 30.5),
    ],
)
def test_the_state_of_theta_and_its_shadow_is_sixteen_bytes_a_parameter_each_divided_by_the_ranks(name, world, gib):
    parts = plan.state(large(shard=True), of(name), world)
    assert sum(v for k, v in parts.items() if k[0] == "θ") / plan.GiB == pytest.approx(gib, abs=0.05)
    whole = plan.state(large(), of(name), world)
    assert plan.memory(large(shard=True), of(name), 1) == plan.memory(large(), of(name), 1)  # nothing to cut
    assert whole["θ weights"] == world * parts["θ weights"]
    assert whole["sampler's merged copy"] == parts["sampler's merged copy"]


@pytest.mark.parametrize("method", ["rl", "mix_lora", "bridge"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_weights_gradients_moments_and_caches_are_to_the_byte_what_a_run_allocates(method, family):
    s = check(Settings(method=method, kl_coef=0.1, lora_rank=4, prompts_per_step=3, group_size=2, max_new_tokens=7))
    model = tiny_model(family)
    m, sampler = plan.shapes(model.config), Sampler(model, [0], s.sampler_slots)
    policies = bridge.make_policies(model, s)
    for name, parameters in policies.parameters.items():
        for p in parameters:
            p.grad = torch.zeros_like(p)
        policies.optimizers[name].step()

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    def moments(name: str) -> int:
        return size(t for each in policies.optimizers[name].state.values() for t in each.values())

    parts = plan.state(s, m, 1)
    expected = {
        "reference": size(policies.reference.parameters()),
        "sampler's merged copy": size(sampler.model.parameters()),
    }
    for name, letter in (("theta", "θ"), ("theta_hat", "θ̂")):
        if parameters := policies.parameters.get(name):
            expected |= {f"{letter} weights": size(parameters), f"{letter} gradients": size(p.grad for p in parameters)}
            expected[f"{letter} moments"] = moments(name)
    if parameters := policies.parameters.get("w"):
        expected |= {"w weights": size(parameters), "w gradients": size(parameters), "w moments": moments("w")}
    assert parts == expected
    _, slots, kv = plan.cache(s, m, 1, prompt=5)
    assert kv == size([sampler.decoder.new_cache(slots, 12).kv])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointed", [0, 1, 2])
def test_what_autograd_keeps_of_a_forward_pass_is_what_is_computed(dtype, family, checkpointed):
    model, kept = tiny_model(family), {}
    m, weights = plan.shapes(model.config), {p.untyped_storage().data_ptr() for p in model.parameters()}
    M.checkpoint_layers(model, checkpointed)

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    rows = [([1] * 20, [2] * 21)] * 10  # 400 tokens are fed
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        M._response_hidden(model, rows, getattr(torch, dtype))
    measured = sum(t.untyped_storage().nbytes() for t in kept.values())
    b = 4 if dtype == "float32" else 2
    casts = (2 - checkpointed) / 2 * 2 * m.linear if b == 2 else 0
    final = (8 if b == 4 else 6) * m.hidden
    layers = (2 - checkpointed) * plan.kept(m, b, padded=True) + checkpointed * b * m.hidden
    chosen = 8 * 210  # int64, of the hidden states that predict a response token
    assert measured == pytest.approx(400 * (layers + final) + casts + chosen, rel=0.05)


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and their peak, of all tensors that operations return."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.ids, self.now, self.peak = {t.untyped_storage()._cdata for t in known}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.ids:
                self.ids.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key: int, size: int) -> None:
        self.ids.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layers", "above"), [(0, 1.05), (4, 1.30)])  # recomputed, no layer's pieces all live at once
def test_the_peak_of_a_forward_and_backward_is_computed_closely_and_not_below(dtype, layers, above):
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=512, hidden_size=256, intermediate_size=700, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    ))  # fmt: skip
    model.set_attn_implementation("packed")
    s = check(Settings(dtype=dtype, checkpoint_layers=layers, sft_batch=20, prompts_per_step=2, group_size=10,
                       max_new_tokens=60, tokens_per_micro_batch=4000))  # fmt: skip
    policies, rows = bridge.make_policies(model, s), [([1] * 40, [2] * 60)] * 20
    bridge.sft_backward(policies.policy, rows, 1.0, s)  # makes the gradients
    parameters = list(model.parameters())
    with Live([*parameters, *(p.grad for p in parameters)]) as live:
        bridge.sft_backward(policies.policy, rows, 1.0, s)
    computed = sum(plan.training(s, plan.shapes(model.config), 1, cuda=False, prompt=40).values())
    assert 0.98 < computed / live.peak < above


def test_the_decode_floor_of_the_paper_s_step_is_the_hand_calculation_s(monkeypatch):
    monkeypatch.setattr(plan, "MEAN_RESPONSE", 950 / 3000)
    ceilings = plan.GPU(790e12, 67e12, 4.3e12, 139 * plan.GiB, 450e9)
    times = plan.seconds(large(), of("Qwen/Qwen2.5-3B"), ceilings, 1, compute=1, bandwidth=1, prompt=150)
    assert times["sample"] == pytest.approx(7.1, rel=0.05)
    assert times["rl"] + times["shadow"] + times["sft"] == pytest.approx(27.2, rel=0.15)


def test_what_is_said_to_fit_fits_and_a_run_that_fits_is_not_refused():
    m, limit = of("Qwen/Qwen2.5-3B"), plan.GPUS["h100"].memory
    with pytest.raises(SettingError, match="GPUs with --shard"):
        plan.check(large(), m, 1, limit)
    plan.check(large(shard=True), m, 8, limit)
    tight = plan.memory(large(sampler_slots=100, shard=True), m, 4)[-1]
    with pytest.raises(SettingError, match="sampler_slots"):
        plan.check(large(prompts_per_step=256, shard=True), m, 4, tight)


def test_a_dry_run_prints_the_plan_and_makes_no_folder(tmp_path, capsys):
    bridge.main(["--preset", "smoke", "--dry-run", "--gpu", "4090", "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert all(word in out for word in ("θ̂ moments", "peak", "TFLOP", "estimated, not measured"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="no config found"):
        bridge.main(["--model", str(tmp_path), "--dry-run", "--gpu", "h100"])
    with pytest.raises(SettingError, match="dry-run"):
        parse(["--gpus", "4"])
