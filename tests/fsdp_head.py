"""Run by two ranks: the head's loss of a model sharded by FSDP2, whose head weight is tied to the embedding.

The loss is a method that FSDP2 knows of as a forward; inside it the head's weight is a plain tensor.
"""

import types

import torch
import torch.distributed as dist
from conftest import rows, tiny_model
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from infra.model import response_loss


def negative_logp(logp, entropy, tokens):
    return -logp.sum() + 0.1 * entropy.sum()


dist.init_process_group("gloo")
rank = dist.get_rank()
batches = [rows(3, seed=0), rows(3, seed=1)]

alone = tiny_model()
for batch in batches:
    (response_loss(alone, batch, negative_logp) / 2).backward()  # FSDP2 averages over ranks

model = tiny_model()
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model, reshard_after_forward=False)
model.loss = types.MethodType(lambda self, batch: response_loss(self, batch, negative_logp).clone(), model)
register_fsdp_forward_method(model, "loss")
model.loss(batches[rank]).backward()
for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5, msg=name)
print("gradients equal", flush=True)
dist.destroy_process_group()
