"""Every Triton kernel of ops/ against its PyTorch twin and fp64, and compiled for Hopper.

Without a GPU Triton's interpreter runs the kernels on CPU tensors, one program after the other. It shows neither speed
nor races between programs. It truncates to bf16 and multiplies bf16 wrongly, so the kernels raise operands to fp32
there. With a GPU the same tests run on the GPU.
"""

import contextlib
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import exact, tiny_model
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

import sampler
from logprob import token_logprobs
from ops import attention, decoder, graphs, head, sample
from ops.slots import uniforms
from sampler import Sampler

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(not GPU and not head.UPCAST, reason="needs a GPU or TRITON_INTERPRET=1")
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
KEYS = [(0, i) for i in range(3)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)  # a test's random inputs must not depend on the tests before it


@pytest.fixture
def kernels(monkeypatch):
    """The kernels run instead of their twins, on every device."""
    for module in (head, attention, sample, decoder):
        monkeypatch.setattr(module, "use_kernels", lambda x: True)


def head_inputs(N, H, V, dtype=torch.float32):
    """Hidden states whose targets have p of about 0.5: flat random logits would hide numerical errors."""
    g = torch.Generator().manual_seed(N + V)
    weight = torch.randn(V, H, generator=g)
    targets = torch.randint(0, V, (N,), generator=g)
    hidden = torch.randn(N, H, generator=g) * 0.5 + weight[targets] * (6.0 / H**0.5)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE)


# ---- ops/head.py


@pytest.mark.parametrize("V", [2, 37, 1003, 4096, 5001])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_row_statistics_equal_fp64_for_vocabularies_that_no_block_divides(kernels, V, temperature):
    hidden, weight, targets = head_inputs(3, 16, V)
    logits = head.project(hidden, weight)
    logits[1, -1] = logits[1].max() + 1  # running sums must follow a maximum that comes last
    logits[2, 0] = logits[2].max() + 100  # and must not follow a later block down: exp would overflow
    exactly = (logits.double() / temperature).log_softmax(-1)
    logp, entropy, lse = (x.double() for x in head.row_stats(logits, targets, temperature))
    torch.testing.assert_close(logp, exactly.gather(-1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(exactly.exp() * exactly).sum(-1), rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(lse, (logits.double() / temperature).logsumexp(-1), rtol=1e-5, atol=1e-5)


def gradients_by(function, logits, *numbers, dtype=torch.float32):
    out = torch.empty(logits.shape, dtype=dtype, device=DEVICE)
    function(logits, *numbers, out)
    return out


def test_row_gradients_equal_the_twins_also_in_bf16(kernels):
    hidden, weight, targets = head_inputs(5, 16, 5001)
    logits = head.project(hidden, weight)
    _, entropy, lse = head.row_stats_torch(logits, targets, 0.7)
    g_logp, g_entropy = torch.randn(2, 5, device=DEVICE)
    arguments = logits, targets, lse, entropy, g_logp, g_entropy, 0.7
    twin = gradients_by(head.row_gradients_torch, *arguments)
    torch.testing.assert_close(gradients_by(head.row_gradients, *arguments), twin, rtol=1e-4, atol=1e-6)
    rounded = gradients_by(head.row_gradients, *arguments, dtype=torch.bfloat16)
    torch.testing.assert_close(rounded.float(), twin, rtol=2**-7, atol=1e-6)  # the interpreter truncates: one ulp


@pytest.mark.parametrize(("N", "H", "V"), [(1, 64, 1003), (130, 72, 257), (50, 8, 700)])
@pytest.mark.parametrize("dtype", [torch.bfloat16] if GPU else [torch.bfloat16, torch.float32])
def test_scoring_equals_fp64_to_1e_5_when_no_tile_divides_the_shape(N, H, V, dtype):
    hidden, weight, targets = head_inputs(N, H, V, dtype)
    logp, entropy = head.score(hidden, weight, targets, 0.8)
    expected = exact(hidden, weight, targets, 0.8)
    torch.testing.assert_close(logp.double(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=1e-5)
    assert (logp <= 0).all()


def test_the_log_prob_of_a_certain_token_is_zero(kernels):
    dtype = torch.bfloat16 if GPU else torch.float32
    hidden, weight = torch.full((1, 8), 30.0, dtype=dtype), torch.zeros(1003, 8, dtype=dtype)
    weight[7] = 30.0
    hidden, weight, targets = (x.to(DEVICE) for x in (hidden, weight, torch.tensor([7])))
    for logp, entropy in (
        head.score(hidden, weight, targets, 1.0),
        head.row_stats(head.project(hidden, weight), targets, 1.0)[:2],
    ):
        assert logp.item() == 0.0
        assert entropy.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("chunk", [4, 100])
def test_kernels_give_a_loss_of_log_probs_and_entropies_its_fp64_value_and_gradients(kernels, monkeypatch, chunk):
    monkeypatch.setattr(head, "CHUNK", chunk)
    hidden, weight, targets = (t.requires_grad_() if t.is_floating_point() else t for t in head_inputs(9, 16, 103))
    advantage = torch.randn(9, device=DEVICE)

    def loss_of(logp, entropy):
        return (advantage * logp.exp() - 0.1 * entropy**2).sum()

    loss = loss_of(*token_logprobs(hidden, weight, targets, 0.7))
    expected = loss_of(*exact(hidden, weight, targets, 0.7))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_plain_sum_which_autograd_stores_as_one_number_reaches_every_row(kernels):
    hidden, weight, targets = head_inputs(9, 16, 103)
    hidden.requires_grad_()
    results = token_logprobs(hidden, weight, targets), exact(hidden, weight, targets)
    ours, expected = (torch.autograd.grad(logp.sum() + entropy.sum(), hidden)[0] for logp, entropy in results)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# ---- ops/sample.py


def sampling_logits(n, V):
    g = torch.Generator().manual_seed(V)
    logits = torch.randn(n, V, generator=g) * 3
    logits[:, ::7] = float("-inf")
    logits[0, -1] = 12.0  # running sums must follow a maximum that comes last
    return logits.to(DEVICE), torch.from_numpy(uniforms((V,), n)).to(DEVICE)


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
@pytest.mark.parametrize(("n", "V"), [(12, 37), (6, 2048), (6, 5003)])
def test_the_sampling_kernel_draws_the_twin_s_tokens_from_the_same_uniforms(kernels, n, V, temperature, top_p):
    logits, u = sampling_logits(n, V)
    tokens, logp = sample.sample_tokens(logits, u, temperature, top_p)
    expected, expected_logp = sample.sample_tokens_torch(logits, u, temperature, top_p)
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(logp, expected_logp, rtol=1e-5, atol=1e-5)


def test_the_sampling_kernel_reaches_both_ends_and_no_token_of_probability_zero(kernels):
    logits = torch.full((2, 5003), float("-inf"), device=DEVICE)
    logits[:, [1, 5000]] = 0.0
    tokens, _ = sample.sample_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64, device=DEVICE), 1.0)
    assert tokens.tolist() == [1, 5000]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [1.0, 0])
def test_a_row_with_a_logit_that_is_not_finite_gets_a_log_prob_that_is_not_finite(kernels, bad, temperature):
    logits, u = sampling_logits(2, 2100)
    logits[1, 2060] = bad
    _, logp = sample.sample_tokens(logits, u, temperature)
    assert logp.isfinite().tolist() == [True, False]


# ---- ops/attention.py


@pytest.mark.parametrize(("h", "kv_heads", "d"), [(4, 2, 24), (8, 1, 16), (3, 1, 64), (2, 2, 128)])
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_split_attention_equals_the_twin_and_fp64(kernels, h, kv_heads, d, splits):
    torch.manual_seed(d)
    n, L = 3, 100
    shapes = (n, h, d), (5, L, kv_heads, d), (5, L, kv_heads, d)
    q, keys, values = (torch.randn(shape).to(DEVICE) for shape in shapes)
    length = torch.tensor([1, 70, 100], device=DEVICE)  # with 8 splits the first sequence has 7 empty ones
    out = attention.attend(q, keys, values, length, 0.3, splits=splits)
    twin = attention.attend_torch(q, keys, values, length, 0.3)
    torch.testing.assert_close(out, twin, rtol=1e-5, atol=1e-5)
    for i in range(n):
        k, v = (x[i, : length[i]].transpose(0, 1) for x in (keys, values))
        k, v = (x.double().repeat_interleave(h // kv_heads, 0) for x in (k, v))
        p = (q[i, :, None].double() @ k.transpose(1, 2) * 0.3).softmax(-1)
        torch.testing.assert_close(out[i].double(), (p @ v)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("d", [24, 64])
def test_rotation_equals_transformers_and_caches_keys_and_values(kernels, norms, d):
    torch.manual_seed(0)
    T, h, kv_heads, S, L = 4, 4, 2, 3, 10
    qkv, kv = torch.randn(T, h + 2 * kv_heads, d).to(DEVICE), torch.zeros(2, S, L, kv_heads, d, device=DEVICE)
    slot, position = torch.tensor([[0, 2, 2, 1], [3, 0, 9, 4]], device=DEVICE)
    angle = torch.rand(T, d // 2).repeat(1, 2).to(DEVICE)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    signed = torch.cat((-sin[..., : d // 2], sin[..., d // 2 :]), -1)
    head_norms = torch.rand(2, d).to(DEVICE) + 0.5 if norms else None
    q, k, v = qkv.split([h, kv_heads, kv_heads], 1)
    if norms:
        q, k = (torch.nn.functional.rms_norm(x, (d,), w, 1e-6) for x, w in zip((q, k), head_norms, strict=True))
    expected = [*apply_rotary_pos_emb(q, k, cos[:, 0], sin[:, 0]), v.clone()]

    cells = decoder.Cache(kv[None], cos, sin, kv).cells(slot, position)
    for function in (attention.rope_and_store_torch, attention.rope_and_store):
        kv.zero_()
        rotated = function(qkv.clone(), cos, signed, head_norms, 1e-6, kv, cells)
        for ours, theirs in zip(rotated, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(kv[:, slot, position], expected[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (kv != 0).any(-1).sum() == T * 2 * kv_heads, "no other cell is written"


def test_swiglu_equals_the_twin(kernels):
    x = torch.randn(3, 2 * 1100).to(DEVICE)
    torch.testing.assert_close(attention.swiglu(x), attention.swiglu_torch(x), rtol=1e-5, atol=1e-6)


# ---- the engine


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_the_engine_with_kernels_samples_the_completions_of_the_twins_on_the_cpu(request, monkeypatch, family):
    engine = Sampler(tiny_model(family).to(DEVICE), [0], slots=2)
    monkeypatch.setattr(sampler, "pick_device", lambda: torch.device("cpu"))
    twins = Sampler(tiny_model(family), [0], slots=2)
    assert twins.model.device.type == "cpu", "the twins run on CPU tensors"
    expected = twins.generate(PROMPTS[:2], KEYS[:2], 2, 4, 1.0)
    request.getfixturevalue("kernels")
    sampled = engine.generate(PROMPTS[:2], KEYS[:2], 2, 4, 1.0)
    for ours, theirs in zip(chain(*sampled), chain(*expected), strict=True):
        assert ours.ids == theirs.ids
        assert ours.logps == pytest.approx(theirs.logps, abs=1e-4)


@pytest.mark.parametrize("slots", [7, 16, 30])
def test_graphs_that_decode_beyond_the_end_with_unused_slots_change_no_completion(monkeypatch, slots):
    """A stand-in for CUDA graphs: the capture runs the step, and a replay runs it again."""
    replayed = []

    class Graph:
        def replay(self):
            replayed.append(self.bucket)
            self.step(self.bucket)

    engine = Sampler(tiny_model(), [0, 1, 2], slots=slots)
    prompts, keys = PROMPTS * 5, [(0, i) for i in range(15)]
    expected = engine.generate(prompts, keys, 2, 21, 1.0)

    def graphed(step, size):
        def step_of_current(n):
            current["step"], current["bucket"] = step, n
            step(n)

        return real_graphed(step_of_current, size)

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local", "NCCL's watchdog thread may call CUDA during the capture"
        yield
        graph.step, graph.bucket = current["step"], current["bucket"]

    current, real_graphed = {}, sampler.graphed
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = dict(CUDAGraph=Graph, graph=capture, current_stream=lambda: stream, stream=contextlib.nullcontext,
                 graph_pool_handle=lambda: None)  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(sampler, "graphed", graphed)
    monkeypatch.setattr(graphs, "side_stream", lambda: stream)
    engine.graphs = True
    replayed_groups = engine.generate(prompts, keys, 2, 21, 1.0)
    assert [[c.ids for c in group] for group in replayed_groups] == [[c.ids for c in group] for group in expected]
    assert {c.finish_reason for group in replayed_groups for c in group} == {"stop", "length"}
    assert max(replayed) == slots, "the number of slots bounds a bucket"
    assert min(replayed) <= 8


# ---- offsets beyond 2³¹: the interpreter's int32 wraps around like a GPU's


def far_apart(near):
    """Copies three rows to places 2³⁰ + 64 elements apart: this stride fits an int32, twice the stride does not."""
    stride = 2**30 + 64
    try:
        memory = torch.empty(2 * stride + near[0].numel(), device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no address space for 2³¹ elements: {error}")
    return memory.as_strided(near.shape, (stride, *near.stride()[1:])).copy_(near)


def test_kernels_read_logits_beyond_element_2_to_the_31(kernels):
    near, u = sampling_logits(3, 50)
    near[near.isinf()] = -5.0
    far = far_apart(near)
    targets, g = torch.tensor([3, 4, 5], device=DEVICE), torch.randn(3).to(DEVICE)
    stats = head.row_stats(far, targets, 1.0)
    for ours, expected in zip(stats, head.row_stats_torch(near, targets, 1.0), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    rest = targets, stats[2], stats[1], g, g, 1.0
    ours = gradients_by(head.row_gradients, far, *rest)
    torch.testing.assert_close(ours, gradients_by(head.row_gradients_torch, near, *rest), rtol=1e-4, atol=1e-6)
    assert sample.sample_tokens(far, u, 1.0)[0].tolist() == sample.sample_tokens_torch(near, u, 1.0)[0].tolist()


def test_attention_reads_keys_beyond_element_2_to_the_31(kernels):
    q, near = torch.randn(3, 2, 16).to(DEVICE), torch.randn(3, 70, 1, 16).to(DEVICE)
    far = far_apart(near)
    length = torch.tensor([70, 33, 50], device=DEVICE)
    expected = attention.attend_torch(q, near, near, length, 0.25)
    torch.testing.assert_close(attention.attend(q, far, far, length, 0.25), expected, rtol=1e-5, atol=1e-5)


# ---- compiled for a GPU


def test_every_kernel_compiles_for_hopper_without_spilling_and_the_matmul_uses_its_tensor_cores():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    finished = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = [json.loads(line) for line in finished.stdout.splitlines()]
    modules = (head, attention, sample)
    assert {row["kernel"] for row in rows} == {n for m in modules for n in vars(m) if n.endswith("_kernel")}
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= 227 * 1024, row
    (score,) = (row for row in rows if row["kernel"] == "score_kernel")
    assert score["wgmma"], score
    assert score["tma"], score
