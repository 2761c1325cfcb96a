"""A step runs on a pretended GPU: a mark on tensors whose numbers lie in the host's memory.

A marked tensor says that its device is CUDA, and what is computed from it is marked. So the code of a GPU runs: kernels
instead of twins, variable-length attention, bf16 matmuls with fp32 results. It fails where an operation has tensors of
two places (torch would copy indices), a matmul has two dtypes, or no compiled kernel serves a launch.

torch's FakeTensorMode has no values, and in a torch that was built without CUDA no backward pass for CUDA tensors.

Not covered: kernels on hardware (Triton's interpreter runs them), CUDA graphs and streams, several GPUs, memory, speed,
the loop around a step. Autocast has the CPU's lists. torch's attention with a mask replaces varlen_attn.
"""

import re
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bridge
import sampler
from infra.model import pick_device
from ops import attention, decoder, head, packed, sample
from rollout import Group, make_rollouts, statistics
from settings import Settings
from tasks.task import Problem

pytestmark = pytest.mark.skipif(not head.UPCAST, reason="needs Triton's interpreter; with a GPU nothing is pretended")
KERNELS = pytest.importorskip("compile_kernels").KERNELS  # it needs Triton
HOST, GPU = torch.device("cpu"), torch.device("cuda")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int64: "i64"}  # Triton's
COMPILED = set()  # (kernel, types of its tensors in order); those of bf16 serve --dtype float32, too
for kernel, types, *_ in KERNELS:
    names = re.findall(r"(?:\*|tensordesc<)(\w+)", " ".join(types.values()))
    COMPILED |= {(kernel, " ".join(names)), (kernel, " ".join(names).replace("bf16", "fp32"))}


def tensors_in(x) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def is_marked(x) -> bool:
    return isinstance(x, Tensor) and hasattr(x.untyped_storage(), "on_gpu")  # views share their storage


def is_gpu(x) -> bool:
    return isinstance(x, torch.device) and x.type == "cuda"


def mark(x):
    for tensor in tensors_in(x):
        tensor.untyped_storage().on_gpu = True
    return x


class Operations(TorchDispatchMode):
    """Marks what is computed from marked tensors, in backward passes, too. Refuses tensors of two places."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = tensors_in((args, kwargs))
        # autograd's zeros for a result without a gradient: Places has not seen the call
        is_zeros = function is torch.ops.aten.zeros.default and _get_current_function_mode()
        if function is torch.ops.aten.copy_.default or not (is_zeros or any(map(is_marked, tensors))):
            return out
        on_host = [x.shape for x in tensors if x.dim() and not is_marked(x)]  # a single number may lie there
        assert not on_host, f"{function} of tensors on the GPU and, with shapes {on_host}, on the host"
        return mark(out)


class Places(TorchFunctionMode):
    """Creates tensors on the pretended GPU, and moves them there and back."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.device, torch._C._nn._parse_to):
            return function(*args, **kwargs)
        if function is Tensor.backward:
            with self:  # for what autograd calls; its own functions would end here again
                ones = torch.ones_like(args[0])
                return _engine_run_backward(args, (ones,), False, False, (), True, accumulate_grad=True)
        if function is Tensor.numpy:
            assert not is_marked(args[0]), "numpy reads the host's memory only"
        if function is Tensor.cpu:
            return torch.empty(args[0].shape, dtype=args[0].dtype).copy_(args[0])
        if "out_dtype" in kwargs:
            return mixed_matmul(*args, **kwargs)
        moves = function is Tensor.to
        places = [*args[1:], *kwargs.values()] if moves else [kwargs.get("device")]
        to_gpu = any(is_marked(x) or is_gpu(x) for x in places)
        args = [HOST if is_gpu(x) else x for x in args]
        out = function(*args, **{name: HOST if is_gpu(x) else x for name, x in kwargs.items()})
        if is_marked(out) or not to_gpu:
            return out
        return mark(out.clone() if moves else out)


def mixed_matmul(*operands: Tensor, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """torch.mm and torch.addmm with out_dtype, which exist on a GPU only."""
    *added, a, b = operands
    assert [a.dtype, b.dtype, *(x.dtype for x in added)] == [torch.bfloat16] * 2 + [out_dtype] * len(added)
    result = sum(added, a.float() @ b.float())
    return result if out is None else out.copy_(result)


def varlen_attention(query, key, value, ends, ends_k, longest, longest_k, *, scale, window_size, enable_gqa=True):
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert ends.dtype == torch.int32
    assert ends.diff().max() == longest
    assert all(x.is_cuda and x.stride(-1) == 1 for x in (query, key, value, ends))
    place = torch.arange(len(query), device=query.device)
    sequence = torch.bucketize(place, ends, right=True)
    mask = (sequence[:, None] == sequence) & (place[:, None] >= place)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).transpose(0, 1)


class Kernel:
    """A kernel in the interpreter that refuses what the compiled one would compute wrongly."""

    launched: ClassVar = set()

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert min(grid) > 0
        return partial(self.launch, self.kernel[grid])

    def launch(self, run, *args, **constants):
        numbers = [x for x in args if isinstance(x, int)]
        tensors = tensors_in([getattr(x, "base", x) for x in args])  # a TMA descriptor has a base
        assert all(map(is_marked, tensors))
        assert (self.kernel, " ".join(NAMES[x.dtype] for x in tensors)) in COMPILED
        for x in tensors:
            assert x.is_contiguous() or (x[0].is_contiguous() and x.stride(0) in numbers)
        self.launched.add(self.kernel)
        run(*args, **constants)


@contextmanager
def pretended_gpu(monkeypatch):
    """The program finds one GPU."""
    generator, autocast, device = torch.Generator, torch.autocast, Tensor.device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (9, 0))
    monkeypatch.setattr(Tensor, "device", property(lambda x: GPU if is_marked(x) else device.__get__(x)))
    monkeypatch.setattr(Tensor, "is_cuda", property(is_marked))
    monkeypatch.setattr(torch, "Generator", lambda place=None: generator())
    monkeypatch.setattr(torch, "autocast", lambda place, **options: autocast("cpu", **options))
    monkeypatch.setattr(packed, "varlen_attn", varlen_attention)
    monkeypatch.setattr(sampler, "graphed", lambda step, size: step)
    for module in (head, attention, sample):
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Kernel(value))
    with Places(), Operations():
        yield


def step(family: str, s: Settings) -> list[dict]:
    """Samples from a tiny model and updates it twice on the samples; metrics of both updates."""
    model = tiny_model(family).to(pick_device())
    model.generation_config.suppress_tokens = [36]
    engine = sampler.Sampler(model, [0], s.sampler_slots, getattr(torch, s.dtype))
    m = bridge.make_policies(model, s, sources=2)
    engine.refresh(m.policy)
    prompts = [[1, 2, 3], [4]]
    groups = []
    for prompt, drawn in zip(prompts, engine.generate(prompts, [(0,), (1,)], 2, s.max_new_tokens, 1.0), strict=True):
        rewards = [float(sum(completion.ids) % 3) for completion in drawn]
        groups.append(Group(0, Problem("", ""), prompt, drawn, ["", ""], rewards, [None, None]))
    rollouts = make_rollouts(groups, s, statistics(groups))
    shown = [([5], [7, 8]), ([6], [3])]
    metrics = []
    for _ in range(2):
        seen = bridge.bilevel_gradients(m, rollouts, rollouts, shown, 0.5, 0.5, s, nullcontext, [0, 1])
        bridge.keep_old_logp(seen, rollouts, rollouts, s)
        norms, _ = bridge.clip_and_step(m, seen.stats, s)
        weights = {} if m.omega is None else {"omega": m.omega.tolist()}
        metrics.append(seen.stats | norms | weights)
    return metrics


CASES = [
    ("bridge", "qwen2", "float32", 0.1, 0),
    ("bridge", "qwen3", "bfloat16", 0.1, 0),
    ("bridge", "llama", "bfloat16", 0.0, 1),
    ("weighed", "qwen2", "float32", 0.0, 0),
]


@pytest.mark.parametrize(("method", "family", "dtype", "kl_coef", "recomputed"), CASES)
def test_the_code_of_a_gpu_samples_and_trains_like_that_of_a_cpu(
    monkeypatch, method, family, dtype, kl_coef, recomputed
):
    monkeypatch.setattr(decoder, "PROBE_TOKENS", 3)  # the interpreter is slow
    small = dict(checkpoint_layers=recomputed, max_new_tokens=3, sampler_slots=4)
    s = Settings(method=method, dtype=dtype, kl_coef=kl_coef, **small)
    expected = step(family, s)
    scores = head.score_kernel
    Kernel.launched.clear()
    with pretended_gpu(monkeypatch):
        metrics = step(family, s)
    assert len(Kernel.launched) == 6 + (scores in Kernel.launched), "all but the merge of split attention"
    assert (scores in Kernel.launched) == (dtype == "bfloat16" and kl_coef > 0)
    tolerance = dict(rel=1e-4, abs=1e-5) if dtype == "float32" else dict(rel=0.03, abs=0.03)
    for ours, cpu in zip(metrics, expected, strict=True):
        assert ours.pop("omega", []) == pytest.approx(cpu.pop("omega", []), **tolerance)
        assert ours == pytest.approx(cpu, nan_ok=True, **tolerance)
