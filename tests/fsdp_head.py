"""Two ranks run this: gradients of log-probs and entropies of a model sharded by FSDP2 equal those of one process.

The head's weight is tied to the embedding. Inside run_forward FSDP2 has gathered it to a plain tensor. In the second
pass rank 1 has no rows.

    python tests/fsdp_head.py STORE RANK
"""

import sys
from types import MethodType

import torch
import torch.distributed as dist
from conftest import rows, tiny_model
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from logprob import response_logprobs


def loss_of(model, batch):
    logp, entropy = response_logprobs(model, batch)
    return -logp.sum() + 0.1 * entropy.sum()


dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
batches = [[rows(3, seed=0), rows(3, seed=1)], [rows(2, seed=2), []]]  # passes, of each rank

alone = tiny_model()
for of_ranks in batches:
    for batch in of_ranks:
        (loss_of(alone, batch) / 2).backward()  # FSDP2 averages over ranks

model = tiny_model()
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model, reshard_after_forward=False)
model.run_forward = MethodType(lambda self, function: function(self), model)
register_fsdp_forward_method(model, "run_forward")
for of_ranks in batches:
    loss_of(model, of_ranks[dist.get_rank()]).backward()
for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5, msg=name)
print("gradients equal", flush=True)
dist.destroy_process_group()
