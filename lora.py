"""LoRA by hand: W = W_base + s·B·A, with one adapter w = {A, B} shared by the two bases θ and θ̂.

BRIDGE evaluates the same w on two base models (Algorithm 2): on θ, where w ascends J_RL, and on the RL-only shadow θ̂,
where w descends it. So an adapted linear contains its base linear and points at A and B; attaching the same w to a
second model makes the second policy. Merging writes into another model's weights: adding and subtracting in place
would let the base drift.

Shapes: in, out of the linear; r rank; s = lora_alpha / r.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Adapter = dict[str, nn.Parameter]  # w: "<module path>.lora_A.weight" -> [r, in], "….lora_B.weight" -> [out, r]


class LoRALinear(nn.Module):
    """y = (W_base + s·B·A)·x + bias.

    The weights are added, not the outputs. θ is trained in full, so the gradient G [out, in] of the sum is needed
    anyway; ∇_B = s·G·Aᵀ and ∇_A = s·Bᵀ·G follow without another pass over the tokens. The trained weight equals the
    sampler's (`merge_into`) to the last bit.
    """

    def __init__(self, base: nn.Linear, A: nn.Parameter, B: nn.Parameter, scale: float):
        super().__init__()
        self.base, self.lora_A, self.lora_B, self.scale = base, A, B, scale

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return F.linear(x, self.merged_weight(), self.base.bias)

    def merged_weight(self) -> Tensor:
        """W_base + s·B·A as a new tensor [out, in], in the weights' own precision even under autocast."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return torch.addmm(full_tensor(self.base.weight), self.lora_B, self.lora_A, alpha=self.scale)


def create(model: nn.Module, targets: list[str], rank: int, seed: int, device: torch.device | None = None) -> Adapter:
    """A fresh adapter for every nn.Linear of `model` whose last name is in `targets`; on `device`, or else the model's.

    A is uniform in ±1/√in (PEFT's Kaiming initialisation), B is zero: a fresh adapter changes nothing.
    Raises ValueError when a target matches no linear layer; the message lists the layers there are.
    """
    lm_head = model.get_output_embeddings()  # often tied to the embedding, which no adapter may touch
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not lm_head}
    missing = [t for t in targets if not any(n.split(".")[-1] == t for n in linears)]
    if missing or not targets:
        names = sorted({n.split(".")[-1] for n in linears})
        raise ValueError(f"lora_targets: no linear layer is named {missing or targets}; this model has {names}")
    generator = torch.Generator().manual_seed(seed)
    w: Adapter = {}
    for name, linear in linears.items():
        if name.split(".")[-1] in targets:
            bound, device = 1 / math.sqrt(linear.in_features), device or linear.weight.device
            A = (torch.rand(rank, linear.in_features, generator=generator) * 2 - 1) * bound  # [r, in]
            w[f"{name}.lora_A.weight"] = nn.Parameter(A.to(device))
            w[f"{name}.lora_B.weight"] = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
    return w


def attach(model: nn.Module, w: Adapter, scale: float) -> list[str]:
    """Wraps the linears that w adapts, sharing w's tensors; returns the wrapped module paths."""
    names = [n.removesuffix(".lora_A.weight") for n in w if n.endswith(".lora_A.weight")]
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        A, B = w[f"{name}.lora_A.weight"], w[f"{name}.lora_B.weight"]
        setattr(parent, name.rpartition(".")[2], LoRALinear(model.get_submodule(name), A, B, scale))
    return names


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """θ (or θ̂): every parameter but the adapter's, under the names the model had before `attach`."""
    named = model.named_parameters()
    return {n.replace(".base.", "."): p for n, p in named if not n.endswith((".lora_A", ".lora_B"))}


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole of a parameter that is sharded over ranks (all ranks must call); any other parameter unchanged."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def merge_into(plain: nn.Module, model: nn.Module) -> None:
    """Overwrites the weights of `plain` (same architecture, no adapter) by θ + s·B·A of `model`, matrix by matrix."""
    target, wrapped = dict(plain.named_parameters()), set()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            wrapped.add(f"{name}.weight")
            target[f"{name}.weight"].copy_(module.merged_weight())
    for name, parameter in base_parameters(model).items():
        if name not in wrapped:
            target[name].copy_(full_tensor(parameter))


@torch.no_grad()
def delta_norm(w: Adapter, scale: float) -> float:
    """‖ΔW‖ over all wrapped linears: sqrt(Σ ‖s·B·A‖²), from r x r products only."""
    total = 0.0
    for name, A in w.items():
        if name.endswith(".lora_A.weight"):
            B = w[name.replace(".lora_A.", ".lora_B.")]
            total += float(((B.T @ B) * (A @ A.T)).sum())  # ‖BA‖² = tr(BᵀB·AAᵀ)
    return scale * math.sqrt(max(total, 0.0))
