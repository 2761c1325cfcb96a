"""LoRA by hand: W = W_base + s·B·A, with one adapter w = {A, B} shared by the two bases θ and θ̂.

BRIDGE evaluates the same w on two base models (Algorithm 2): on θ, where w ascends J_RL, and on the RL-only shadow θ̂,
where w descends it. So an adapted linear contains its base linear and points at A and B; attaching the same w to a
second model makes the second policy. Merging writes into another model's weights: adding s·B·A to the base in place
and subtracting it later would leave rounding errors in the base.

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
        self.base = base
        self.lora_A = A  # [r, in]
        self.lora_B = B  # [out, r]
        self.scale = scale  # s

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return F.linear(x, self.merged_weight(), self.base.bias)

    def merged_weight(self) -> Tensor:
        """W_base + s·B·A as a new tensor [out, in], in the weights' own precision even under autocast."""
        # Autocast would round the sum to bf16; the sampler's weights are rounded once, from this sum.
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return torch.addmm(full_tensor(self.base.weight), self.lora_B, self.lora_A, alpha=self.scale)


def create(
    model: nn.Module,
    targets: list[str],  # last names of linear layers, such as q_proj
    rank: int,  # r
    seed: int,  # of A
    device: torch.device | None = None,  # None: the model's
) -> Adapter:
    """A fresh adapter for every nn.Linear of `model` whose last name is in `targets`.

    A is uniform in ±1/√in (PEFT's Kaiming initialisation), B is zero: a fresh adapter changes nothing.
    Raises ValueError when a target matches no linear layer; the message lists the layers there are.
    """
    # The vocabulary head is often tied to the embedding, which no adapter may touch.
    lm_head = model.get_output_embeddings()
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not lm_head:
            linears[name] = module

    last_names = {last_name(name) for name in linears}
    missing = [target for target in targets if target not in last_names]
    if missing or not targets:
        known = sorted(last_names)
        raise ValueError(f"lora_targets: no linear layer is named {missing or targets}; this model has {known}")

    generator = torch.Generator().manual_seed(seed)
    w: Adapter = {}
    for name, linear in linears.items():
        if last_name(name) in targets:
            place = device or linear.weight.device
            bound = 1 / math.sqrt(linear.in_features)
            # Random numbers are drawn on the CPU, so every device and rank has the same.
            uniform = torch.rand(rank, linear.in_features, generator=generator)  # in [0, 1)
            A = (uniform * 2 - 1) * bound
            B = torch.zeros(linear.out_features, rank, device=place)
            w[f"{name}.lora_A.weight"] = nn.Parameter(A.to(place))
            w[f"{name}.lora_B.weight"] = nn.Parameter(B)
    return w


def last_name(path: str) -> str:
    """The last part of a module's path: q_proj of model.layers.0.self_attn.q_proj."""
    return path.rpartition(".")[2]


def attach(model: nn.Module, w: Adapter, scale: float) -> list[str]:
    """Wraps the linears that w adapts, sharing w's tensors; returns the wrapped module paths."""
    # w's names end in the names that PEFT gives A and B.
    paths = [name.removesuffix(".lora_A.weight") for name in w if name.endswith(".lora_A.weight")]
    for path in paths:
        A = w[f"{path}.lora_A.weight"]
        B = w[f"{path}.lora_B.weight"]
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, last_name(path), LoRALinear(model.get_submodule(path), A, B, scale))
    return paths


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """θ (or θ̂): every parameter but the adapter's, under the names the model had before `attach`."""
    parameters = {}
    for name, p in model.named_parameters():
        # A wrapped linear is the child "base" of its LoRALinear.
        if not name.endswith((".lora_A", ".lora_B")):
            parameters[name.replace(".base.", ".")] = p
    return parameters


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole of a parameter that is sharded over ranks (all ranks must call); any other parameter unchanged."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def merge_into(plain: nn.Module, model: nn.Module) -> None:
    """Overwrites the weights of `plain` (same architecture, no adapter) by θ + s·B·A of `model`, matrix by matrix."""
    target = dict(plain.named_parameters())
    merged = set()  # names of the weights that have w in them
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            merged.add(f"{name}.weight")
            # One matrix at a time: a sharded base is gathered here
            target[f"{name}.weight"].copy_(module.merged_weight())
    for name, parameter in base_parameters(model).items():
        if name not in merged:
            target[name].copy_(full_tensor(parameter))


@torch.no_grad()
def delta_norm(w: Adapter, scale: float) -> float:
    """‖ΔW‖ over all wrapped linears: sqrt(Σ ‖s·B·A‖²), from r x r products only."""
    total = 0.0
    for name, A in w.items():
        if name.endswith(".lora_A.weight"):
            B = w[name.replace(".lora_A.", ".lora_B.")]
            # ‖B·A‖² = tr(BᵀB·AAᵀ), the sum of products of two [r, r] matrices, since both are symmetric
            squared_norm = ((B.T @ B) * (A @ A.T)).sum()
            total += float(squared_norm)
    return scale * math.sqrt(max(total, 0.0))  # rounding can leave less than 0
