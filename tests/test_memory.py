"""The memory that infra/memory.py computes equals what a run allocates; its model sizes equal the published ones."""

import re
import weakref
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

import bridge
import sampler
from infra import memory
from infra.model import checkpoint_layers
from logprob import response_hidden
from ops import head, packed
from ops.packed import ModelError
from settings import METHODS, PRESETS, SettingError, Settings, check

QWEN, LLAMA, QWEN3 = memory.PUBLISHED
BILLIONS = {QWEN: 3.09, LLAMA: 3.21, QWEN3: 8.19}


def paper(**changed) -> Settings:
    """The paper's batch on Qwen2.5-3B with all layers checkpointed, in 320 slots, not sharded."""
    return check(Settings(**PRESETS["qwen2.5-3b"] | dict(sampler_slots=320, shard=False) | changed))


def shapes_of(name: str) -> memory.Shapes:
    return memory.shapes(memory.config_of(name))


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", BILLIONS)
def test_the_three_models_have_their_published_sizes_without_a_network(name):
    assert shapes_of(name).parameters / 1e9 == pytest.approx(BILLIONS[name], abs=0.005)
    assert shapes_of(f"{name}@main") == shapes_of(name)


def test_config_of_reads_a_folder_and_refuses_one_without_config(tmp_path):
    with pytest.raises(ModelError, match="is a folder without a usable model"):
        memory.config_of(str(tmp_path))
    tiny_model().config.save_pretrained(tmp_path)
    assert memory.shapes(memory.config_of(str(tmp_path))) == memory.shapes(tiny_model().config)


def test_config_of_passes_the_revision_on(monkeypatch):
    calls = []
    monkeypatch.setattr(memory.AutoConfig, "from_pretrained", lambda name, **options: calls.append((name, options)))
    memory.config_of("owner/name@abc")
    memory.config_of("owner/name")
    assert [(name, options["revision"]) for name, options in calls] == [("owner/name", "abc"), ("owner/name", None)]
    assert not any(options["trust_remote_code"] for _, options in calls), "and nobody is asked"


def test_the_stated_constant_equals_the_samplers():
    assert memory.PREFILL_TOKENS == sampler.PREFILL_TOKENS


@pytest.mark.parametrize(
    ("name", "world", "gib"), [(QWEN, 1, 92.0), (QWEN, 4, 23.0), (QWEN, 8, 11.5), (QWEN3, 4, 61.0), (QWEN3, 8, 30.5)]
)
def test_theta_and_its_shadow_take_sixteen_bytes_per_parameter_each_divided_by_the_ranks(name, world, gib):
    m = shapes_of(name)
    parts, gradients = memory.state(paper(shard=True), m, world)
    sharded = sum(value for part, value in (parts | gradients).items() if part.startswith("θ"))
    assert sharded / memory.GiB == pytest.approx(gib, abs=0.05)
    full, _ = memory.state(paper(), m, world)
    assert full["θ weights"] == world * parts["θ weights"]
    assert full["sampler's merged copy"] == parts["sampler's merged copy"]


def test_shard_changes_nothing_on_one_gpu():
    assert memory.memory(paper(shard=True), shapes_of(QWEN), 1) == memory.memory(paper(), shapes_of(QWEN), 1)


@pytest.mark.parametrize(
    ("family", "method"), [*(("qwen2", method) for method in METHODS), ("qwen3", "bridge"), ("llama", "bridge")]
)
def test_weights_gradients_moments_and_caches_equal_the_allocated_bytes(family, method):
    s = check(Settings(method=method, kl_coef=0.1, lora_rank=4, prompts_per_step=3, group_size=2, max_new_tokens=7))
    model = tiny_model(family)
    m, generator = memory.shapes(model.config), sampler.Sampler(model, [0], s.sampler_slots)
    policies = bridge.make_policies(model, s)
    for name, parameters in policies.parameters.items():
        for p in parameters:
            p.grad = torch.zeros_like(p)
        policies.optimizers[name].step()
    if method == "alternating":
        policies.optimizers["theta_sft"].step()

    expected, gradients = {}, {}
    for name, letter in (("theta", "θ"), ("theta_hat", "θ̂"), ("w", "w")):
        if name in policies.parameters:
            optimizers = [policies.optimizers[o] for o in (name, f"{name}_sft") if o in policies.optimizers]
            moments = [t for o in optimizers for state in o.state.values() for t in state.values() if t.dim()]
            expected[f"{letter} weights"] = size(policies.parameters[name])
            expected[f"{letter} moments"] = size(moments)
            gradients[f"{letter} gradients"] = size(p.grad for p in policies.parameters[name])
    if "w" in policies.parameters:  # g_sft, g_rl and g_rl_hat
        gradients["w gradients"] *= {"mix_lora": 2, "no_meta": 2, "bridge": 3}[method]
    expected["reference"] = size(policies.reference.parameters())
    expected["sampler's merged copy"] = size(generator.model.parameters())
    assert memory.state(s, m, 1) == (expected, gradients)
    assert memory.sampling(s, m, 1, prompt=5)["KV cache"] == size([generator.decoder.new_cache(3 * 2, 12).kv])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointed", [0, 1, 2])
@pytest.mark.parametrize("short", [39, 40])  # with 39 attention keeps no [L, L] matrix
def test_the_bytes_that_autograd_saves_in_a_forward_pass_are_computed_within_five_percent(
    dtype, family, checkpointed, short, monkeypatch
):
    monkeypatch.setattr(packed, "SHORT", short)
    model, saved = tiny_model(family), {}
    m, weights = memory.shapes(model.config), {p.untyped_storage().data_ptr() for p in model.parameters()}
    checkpoint_layers(model, checkpointed)

    def save(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            saved[t.untyped_storage().data_ptr()] = t
        return t

    rows = [([i] * 20, [2] * 21) for i in range(10)]  # 400 tokens are fed, none is shared
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        response_hidden(model, rows, getattr(torch, dtype))
    measured = sum(t.untyped_storage().nbytes() for t in saved.values())
    b = 4 if dtype == "float32" else 2
    casts = (2 - checkpointed) / 2 * 2 * m.linear if b == 2 else 0
    final_norm = (8 if b == 4 else 6) * m.hidden
    layers = (2 - checkpointed) * memory.saved_by_layer(m, b, False, 40) + checkpointed * b * m.hidden
    index = 8 * 210  # int64 positions of the hidden states that predict a response token
    assert measured == pytest.approx(400 * (layers + final_norm) + casts + index, rel=0.05)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations return and that are not freed yet; keeps the peak."""

    def __init__(self, existing: list[torch.Tensor]):
        super().__init__()
        self.ids, self.now, self.peak = {t.untyped_storage()._cdata for t in existing}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.ids:
                self.ids.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key: int, nbytes: int) -> None:
        self.ids.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize(("method", "dtype"), [("sft", "bfloat16"), ("mix_lora", "float32")])
@pytest.mark.parametrize(
    ("checkpointed", "count", "prompt", "vocabulary", "chunk", "above"),
    [
        (0, 10, 40, 256, 2048, 1.05),
        (4, 10, 40, 256, 2048, 1.25),  # a recomputed layer
        (0, 4, 340, 256, 2048, 1.05),  # the [L, L] matrices
        (4, 2, 40, 8192, 2048, 1.05),  # the vocabulary head, forward
        (4, 4, 40, 8192, 120, 1.05),  # and backward, with two chunks of two blocks
    ],
)
def test_the_peak_of_a_forward_and_backward_pass_is_computed_closely_and_not_below(
    method, dtype, checkpointed, count, prompt, vocabulary, chunk, above, monkeypatch
):
    monkeypatch.setattr(head, "CHUNK", chunk)
    monkeypatch.setattr(head, "CACHED", 512 * chunk)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=350, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    ))  # fmt: skip
    model.set_attn_implementation("packed")
    s = check(Settings(method=method, dtype=dtype, checkpoint_layers=checkpointed, sft_batch=count, group_size=2,
                       prompts_per_step=count // 2, max_new_tokens=60, tokens_per_micro_batch=4000))  # fmt: skip
    policies, rows = bridge.make_policies(model, s), [([i] * prompt, [2] * 60) for i in range(count)]
    bridge.sft_pass(policies.policy, rows, 1.0, s)  # makes the gradients
    existing = [p for parameters in policies.parameters.values() for p in parameters]
    with LiveBytes([*existing, *(p.grad for p in existing)]) as live:
        bridge.sft_pass(policies.policy, rows, 1.0, s)
    computed = sum(memory.training(s, memory.shapes(model.config), 1, cuda=False, prompt=prompt).values())
    assert 0.98 < computed / live.peak < above


def test_changes_that_the_message_proposes_make_the_run_fit():
    m, limit = shapes_of(QWEN), memory.GPUS["h100"]
    with pytest.raises(SettingError, match="shard True, gpus 2"):
        memory.check(paper(), m, 1, limit)
    memory.check(paper(shard=True), m, 2, limit)
    for changed, name in (
        (dict(shard=True, prompts_per_step=256), "sampler_slots"),
        (dict(shard=True, tokens_per_micro_batch=65536), "tokens_per_micro_batch"),
    ):
        s = paper(**changed)
        tight = memory.memory(s, m, 4)[-1] - memory.GiB
        with pytest.raises(SettingError, match=f"it fits with {name}") as error:
            memory.check(s, m, 4, tight)
        value = re.search(rf"{name} (\d+), gpus 4", str(error.value))[1]
        memory.check(paper(**changed | {name: int(value)}), m, 4, tight)


def test_a_run_that_needs_exactly_the_limit_is_not_refused():
    m = shapes_of(QWEN)
    memory.check(paper(), m, 1, memory.memory(paper(), m, 1)[-1])
    with pytest.raises(SettingError, match="smaller model"):
        memory.check(paper(), m, 1, memory.GiB)


def test_a_dry_run_prints_the_memory_by_part_and_makes_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--preset", "qwen2.5-3b", "--dry-run", "--gpus", "4", "--out", str(tmp_path / "run")]
    bridge.main(flags)
    any_kind = capsys.readouterr().out
    *groups, peak = memory.memory(Settings(**PRESETS["qwen2.5-3b"]), shapes_of(QWEN), 4)
    sizes = {part: size for parts in groups for part, size in parts.items()} | {"peak, with libraries": peak}
    for part, size in sizes.items():
        assert re.search(rf"^ +{re.escape(part)} +{size / memory.GiB:.2f}$", any_kind, re.MULTILINE), part
    bridge.main([*flags, "--gpu", "h100"])
    assert capsys.readouterr().out == any_kind.replace("4 x GPU", "4 x h100").replace("43.12", "43.12 of 79.0")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_that_cannot_be_computed_or_does_not_fit_ends_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="is a folder without a usable model"):
        bridge.main(["--model", str(tmp_path), "--dry-run", "--gpu", "h100"])
    with pytest.raises(SystemExit, match="gpu must be one of"):
        bridge.main(["--preset", "qwen2.5-3b", "--dry-run", "--gpu", "h101"])
    with pytest.raises(SystemExit, match=r"does not fit: it needs 112.2 of 79.0 GiB; it fits with shard True, gpus 2$"):
        bridge.main(["--preset", "qwen2.5-3b", "--dry-run", "--gpu", "h100"])


def test_the_table_in_the_docs_has_the_computed_numbers():
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    lines = re.findall(r"^\| `([\w.-]+)` \| (\d)" + r" \| ([\d.]+)" * 4, text, re.MULTILINE)
    assert len(lines) == 9
    for preset, world, *numbers in lines:
        s = Settings(**PRESETS[preset])
        *groups, peak = memory.memory(s, shapes_of(s.model), int(world))
        totals = [*(sum(parts.values()) for parts in groups), peak]
        assert [float(number) for number in numbers] == [round(total / memory.GiB, 1) for total in totals]
