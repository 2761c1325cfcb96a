"""logprob.py and ops/packed.py against the definition, fp64, TRL and transformers."""

import os
import runpy
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, exact, fork_ranks, rows, tiny_model
from transformers import AutoModelForCausalLM

from grpo import grpo_loss
from infra.model import checkpoint_layers
from infra.parallel import micro_batches
from logprob import response_hidden, response_logprobs, token_logprobs, token_logprobs_naive
from ops import head, packed
from ops.packed import ModelError, pack, packed_attention


def unpacked_logprobs(model, row):
    """Log-probs and entropies of one sequence by transformers' own attention."""
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("eager")
    prompt, response = row
    logits = plain.eval()(torch.tensor([prompt + response])).logits[0]
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logp.gather(-1, torch.tensor(response)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def test_packed_logprobs_and_entropies_equal_transformers_one_by_one(any_model):
    batch = rows(5)
    logp, entropy = response_logprobs(any_model, batch)
    expected = [unpacked_logprobs(any_model, row) for row in batch]
    torch.testing.assert_close(logp, torch.cat([e[0] for e in expected]), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(entropy, torch.cat([e[1] for e in expected]), rtol=1e-5, atol=5e-6)


def test_logprobs_and_entropy_equal_trl():
    utils = pytest.importorskip("trl.trainer.utils")
    hidden, weight = torch.randn(6, 8), torch.randn(VOCABULARY, 8)
    targets = torch.randint(0, VOCABULARY, (6,))
    logp, entropy = token_logprobs(hidden, weight, targets, temperature=0.7)
    logits = hidden @ weight.T / 0.7
    torch.testing.assert_close(logp, utils.selective_log_softmax(logits, targets), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, utils.entropy_from_logits(logits), rtol=1e-5, atol=1e-5)


def test_log_probs_of_bf16_inputs_are_fp32_and_never_positive():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8, dtype=torch.bfloat16) * 20, torch.randn(9, 8, dtype=torch.bfloat16)
    logp, entropy = token_logprobs(hidden, weight, torch.arange(5))
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp <= 0).all()
    largest = (hidden.float() @ weight.float().T).abs().max()
    assert (entropy >= -1e-6 * largest).all(), "the entropy is a difference of two fp32 numbers as large as the logits"


def test_temperature_zero_has_no_log_probs():
    with pytest.raises(ValueError, match="temperature must be > 0"):
        token_logprobs(torch.randn(1, 8), torch.randn(9, 8), torch.tensor([0]), temperature=0.0)


def test_unequal_numbers_of_hidden_states_and_targets_are_refused():
    with pytest.raises(ValueError, match="3 hidden states but 2 targets"):
        token_logprobs(torch.randn(3, 8), torch.randn(9, 8), torch.tensor([0, 1]))


def gradients(model, batch):
    model.zero_grad()
    logp, _ = response_logprobs(model, batch)
    logp.sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_neither_neighbours_nor_order_change_a_row_or_a_gradient():
    model, batch = tiny_model(), rows(6)
    together, _ = response_logprobs(model, batch)
    start = [0, *accumulate(len(response) for _, response in batch)]
    order = [4, 0, 5, 2, 1, 3]
    shuffled, _ = response_logprobs(model, [batch[i] for i in order])
    expected = torch.cat([together[start[i] : start[i + 1]] for i in order])
    torch.testing.assert_close(shuffled, expected, rtol=1e-5, atol=1e-5)
    alone, _ = response_logprobs(model, batch[2:3])
    torch.testing.assert_close(alone, together[start[2] : start[3]], rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(model, batch), gradients(model, [batch[i] for i in order]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_longer_neighbour_that_pads_attention_changes_no_log_prob():
    model, batch = tiny_model(), rows(2)
    alone, _ = response_logprobs(model, batch)
    beside, _ = response_logprobs(model, [*batch, ([1, 2, 3], list(range(1, 30)))])
    torch.testing.assert_close(beside[: len(alone)], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [{"sliding_window": 4}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_attention_that_is_not_plain_causal_is_refused(attention):
    packed = pack([[1, 2, 3, 4, 5]], torch.device("cpu"))
    x = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ModelError, match="only full causal attention is supported"):
        packed_attention(None, x, x, x, None, 1.0, packed=packed, **attention)
    out, _ = packed_attention(None, x, x, x, None, 1.0, packed=packed, sliding_window=5)
    assert out.shape == (1, 5, 2, 8), "a window of the longest sequence is plain causal attention"


def test_positions_restart_with_each_sequence():
    three = pack([[5, 6, 7], [8], [9, 9]], torch.device("cpu"))
    assert three.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert three.cell.tolist() == [0, 1, 2, 3, 6, 7]
    assert three.cu_seqlens.tolist() == [0, 3, 4, 6]


def test_sequences_that_begin_alike_share_these_tokens_and_equal_ones_all():
    p = pack([[5, 6, 7], [5, 6, 8, 6], [5, 6, 7], [6, 7]], torch.device("cpu"))
    assert p.ids.tolist() == [[5, 6, 7, 8, 6, 6, 7]]
    assert p.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert p.node.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1, 2, 5, 6]
    assert p.attended.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6], "attention runs on the equal sequence once"
    assert p.place.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert p.cells.tolist() == [0, 1, 2, 0, 0, 1, 3, 4, 5, 6, 0, 0]
    assert p.cell.tolist() == [0, 1, 2, 6, 7, 8, 9]


def test_a_token_that_sequences_share_is_fed_once_and_its_logits_are_computed_once(any_model, monkeypatch):
    prompt = [5, 6, 7]
    batch = [(prompt, [1, 2, 3]), (prompt, [1, 2, 4]), (prompt, [1, 5]), (prompt, [1, 2, 3]), ([5, 8], [1])]
    fed, projected, project = [], [], head.project
    any_model.model.layers[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    monkeypatch.setattr(head, "project", lambda h, w: projected.append(len(h)) or project(h, w))
    logp, entropy = response_logprobs(any_model, batch)
    assert fed == [6], "5 6 7 1 2, and 8"
    assert projected == [6], "1, 2, 3, 4, 5 of the first prompt, 1 of the second"
    alone = [response_logprobs(any_model, [row]) for row in batch]
    for together, separate in zip((logp, entropy), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(separate), rtol=1e-5, atol=1e-5)


def test_gradients_of_shared_tokens_are_the_sums_of_those_of_their_sequences(any_model):
    prompt = [5, 6, 7]
    batch = [(prompt, [1, 2, 3]), (prompt, [1, 2, 4]), (prompt, [1, 5]), (prompt, [1, 2, 3])]
    expected = [torch.zeros_like(p) for p in any_model.parameters()]
    for row in batch:
        for total, gradient in zip(expected, gradients(any_model, [row]), strict=True):
            total += gradient
    for ours, theirs in zip(gradients(any_model, batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_attention_by_matmuls_equals_torchs():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 7, 8, generator=g, requires_grad=True) for heads in (6, 2, 2))
    ours = packed.attend_by_matmuls(q, k, v, 0.4)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(ours.shape, generator=g)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), upstream) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_vector_that_all_keys_share_costs_no_accuracy_in_bf16():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 20, 16, generator=g).bfloat16() for heads in (4, 2, 2))
    k += 30 * torch.randn(16, generator=g)  # as by Qwen2's bias: logits of some hundreds
    ours = packed.attend_by_matmuls(q, k, v, 0.25).double()
    q, k, v = q.double(), k.double(), v.double()
    exactly = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    assert (ours - exactly).norm() / exactly.norm() < 0.01


def test_long_sequences_use_the_attention_that_keeps_no_matrix(any_model, monkeypatch):
    batch = rows(3)
    expected = response_logprobs(any_model, batch)
    monkeypatch.setattr(packed, "SHORT", 4)
    monkeypatch.setattr(packed, "attend_by_matmuls", lambda *_: pytest.fail("the sequences are longer"))
    torch.testing.assert_close(response_logprobs(any_model, batch), expected, rtol=1e-5, atol=1e-5)


def test_micro_batches_cover_every_row_once_within_the_budget():
    batch = rows(20)
    ranges = micro_batches(batch, range(20), 30, padded=True)
    assert [i for r in ranges for i in r] == list(range(20))
    assert all(len(r) * max(len(p) + len(a) for p, a in (batch[i] for i in r)) <= 30 or len(r) == 1 for r in ranges)
    assert len(ranges) > 3
    assert len(micro_batches(batch, range(20), 1, padded=True)) == 20
    assert [i for r in micro_batches(batch, range(5, 9), 30, padded=True) for i in r] == [5, 6, 7, 8]
    unpadded = micro_batches(batch, range(20), 30, padded=False)
    assert [i for r in unpadded for i in r] == list(range(20))
    assert all(sum(len(p) + len(a) for p, a in (batch[i] for i in r)) <= 30 for r in unpadded)
    assert len(unpadded) < len(ranges)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_under_autocast_attention_gets_bf16_only_and_the_residual_stream_is_bf16(family, monkeypatch):
    dtypes = []

    def attention(q, k, v, *rest):
        dtypes.extend((q.dtype, k.dtype, v.dtype))
        return torch.zeros_like(q)

    monkeypatch.setattr(packed, "causal_attention", attention)
    policy = tiny_model(family)
    policy.model.layers[1].register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    response_logprobs(policy, rows(2), 1.0, torch.bfloat16)
    assert len(dtypes) == 7
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_those_of_hidden_states_in_the_dtype_of_the_pass(any_model, dtype):
    batch = rows(4)
    hidden, weight, targets, source = response_hidden(any_model, batch, dtype)
    assert hidden.dtype == dtype
    expected = exact(hidden, weight.to(dtype), targets, 0.7)
    for ours, theirs in zip(response_logprobs(any_model, batch, 0.7, dtype), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs[source], rtol=1e-5, atol=1e-5)


def test_without_rows_the_result_is_empty_and_every_parameter_gets_a_zero_gradient(any_model):
    """Every rank of a sharded model must run the same passes, with or without rows."""
    logp, entropy = response_logprobs(any_model, [])
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    for name, p in any_model.named_parameters():
        assert p.grad is not None, name
        assert not p.grad.any(), name


def test_without_gradients_log_probs_are_scored_and_keep_no_graph(any_model, monkeypatch):
    batch, scored = rows(3), lambda *inputs: token_logprobs_naive(*inputs)  # in place of the kernel for GPUs
    expected = response_logprobs(any_model, batch, 0.7)
    for on_gpu in (False, True):
        monkeypatch.setattr(head, "can_score", lambda hidden, on_gpu=on_gpu: on_gpu)
        monkeypatch.setattr(head, "score", scored if on_gpu else None)
        with torch.no_grad():
            results = response_logprobs(any_model, batch, 0.7)
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            assert not ours.requires_grad
            assert theirs.requires_grad
    monkeypatch.setattr(head, "score", None)
    assert response_logprobs(any_model, batch, 0.7)[0].requires_grad, "with gradients on nothing is scored"


# ---- the vocabulary head


def sft(logp, entropy):
    return -logp.sum() / 11


def grpo(logp, entropy):
    """An off-policy batch: half of the ratios are clipped, and some tokens have no weight."""
    g = torch.Generator().manual_seed(1)
    old, advantage, weight = -torch.rand(11, generator=g) * 6, torch.randn(11, generator=g), torch.rand(11, generator=g)
    weight[::4] = 0.0
    return grpo_loss(logp, old.to(logp), advantage.to(logp), weight.to(logp))[0]


def entropy_bonus(logp, entropy):
    return (logp.exp() - 0.3 * entropy**2).sum()


def head_inputs(dtype=torch.float32, N=11, H=8):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=g) * 2, torch.randn(VOCABULARY, H, generator=g)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.arange(N) * 3


@pytest.mark.parametrize("has_entropy", [True, False])
def test_the_gradients_of_rows_of_logits_are_autograds(has_entropy):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, VOCABULARY, generator=g, dtype=torch.float64)
    g_logp, g_entropy = torch.randn(2, 5, generator=g, dtype=torch.float64)
    targets = torch.arange(5) * 7
    leaf = logits.clone().requires_grad_()
    logp, entropy, lse = head.row_stats_torch(leaf, targets, 0.7)
    loss = g_logp @ logp + g_entropy @ entropy * has_entropy
    (expected,) = torch.autograd.grad(loss, leaf)
    out = torch.empty_like(logits)
    numbers = targets, lse.detach(), entropy.detach(), g_logp, g_entropy if has_entropy else None
    head.row_gradients_torch(logits, *numbers, 0.7, out)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("loss_of", [sft, grpo, entropy_bonus])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_losses_have_the_value_and_gradients_of_the_definition_and_of_fp64(monkeypatch, loss_of, temperature, chunk):
    monkeypatch.setattr(head, "CHUNK", chunk)
    hidden, weight, targets = head_inputs()
    logp, entropy = token_logprobs(hidden, weight, targets, temperature)
    loss = loss_of(logp, entropy)
    ours = logp, entropy, loss, *torch.autograd.grad(3 * loss, (hidden, weight))
    for definition in (token_logprobs_naive, exact):
        logp, entropy = definition(hidden, weight, targets, temperature)
        loss = loss_of(logp, entropy)
        theirs = logp, entropy, loss, *torch.autograd.grad(3 * loss, (hidden, weight))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=2e-4)  # logits reach 25


@pytest.mark.parametrize("loss_of", [sft, entropy_bonus])
def test_blocks_of_a_chunk_change_no_value_and_no_gradient(monkeypatch, loss_of):
    monkeypatch.setattr(head, "CHUNK", 7)
    monkeypatch.setattr(head, "blocks", lambda rows, *_: [slice(i, min(i + 3, rows)) for i in range(0, rows, 3)])
    hidden, weight, targets = head_inputs()
    results = []
    for definition in (token_logprobs, exact):
        logp, entropy = definition(hidden, weight, targets, 0.7)
        gradients = torch.autograd.grad(loss_of(logp, entropy), (hidden, weight))
        results.append([x.double() for x in (logp, entropy, *gradients)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=2e-4)


def test_blocks_cover_all_rows_once_and_on_a_cpu_their_logits_take_at_most_32_mib():
    for kind, V, count in (("cuda", 152_000, 5000), ("cpu", 50_000, 5000), ("cpu", 37, 5000), ("cpu", 50_000, 100)):
        parts = head.blocks(count, V, torch.device(kind))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
        longest = max(part.stop - part.start for part in parts)
        assert longest <= head.CHUNK
        if kind == "cuda" or V == 37:
            assert longest == head.CHUNK
        else:
            assert 4 * longest * V <= 32 * 2**20


def test_a_tied_head_gets_its_gradient_as_head_and_as_embedding():
    _, weight, targets = head_inputs()
    hidden = torch.tanh(weight[:11])
    ours = torch.autograd.grad(sft(*token_logprobs(hidden, weight, targets)), weight, retain_graph=True)
    theirs = torch.autograd.grad(sft(*exact(hidden, weight, targets)), weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_costs_no_gradient_of_its_weight(monkeypatch):
    hidden, weight, targets = head_inputs()
    monkeypatch.setattr(head, "accumulate_weight_gradient", lambda *a: pytest.fail("the weight needs no gradient"))
    sft(*token_logprobs(hidden, weight.detach(), targets)).backward()
    assert hidden.grad.abs().sum() > 0


def test_tokens_without_weight_and_with_extreme_logits_get_no_gradient_and_no_nan(monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 4)
    hidden, weight, targets = head_inputs()
    with torch.no_grad():
        hidden[:4] *= 1e4  # probabilities of exactly 0 and 1
    logp, _ = token_logprobs(hidden, weight, targets)
    token_weight = (torch.arange(11) >= 4).float()
    grpo_loss(logp, torch.zeros(11), torch.ones(11), token_weight)[0].backward()
    assert (hidden.grad[:4] == 0).all()
    assert (hidden.grad[4:] != 0).any()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_a_loss_of_the_entropy_alone_has_the_gradient_of_the_definition():
    hidden, weight, targets = head_inputs()
    ours = torch.autograd.grad(token_logprobs(hidden, weight, targets, 0.7)[1].sum(), (hidden, weight))
    theirs = torch.autograd.grad(token_logprobs_naive(hidden, weight, targets, 0.7)[1].sum(), (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_single_token_is_enough():
    hidden, weight, targets = head_inputs(N=1)
    sft(*token_logprobs(hidden, weight, targets)).backward()
    assert hidden.grad.shape == (1, 8)


def test_the_gradient_of_a_nearly_certain_token_is_not_lost_to_bf16():
    """1 − p of a target with p = 1 − 1e-4: in bf16, whose numbers near 1 are 2⁻⁸ apart, it would be 0."""
    weight = torch.zeros(3, 8, dtype=torch.bfloat16)
    weight[0, 0] = 10.0
    hidden = torch.zeros(1, 8, dtype=torch.bfloat16)
    hidden[0, 0] = 1.0
    hidden.requires_grad_()
    target = torch.tensor([0])
    ours = torch.autograd.grad(sft(*token_logprobs(hidden, weight, target)), hidden)
    theirs = torch.autograd.grad(sft(*exact(hidden, weight, target)), hidden)
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


def test_the_weight_gradient_of_bf16_inputs_is_summed_over_chunks_in_fp32(monkeypatch):
    hidden, weight, targets = head_inputs(torch.bfloat16, N=12)
    weight = weight.detach().float().requires_grad_()
    gradients = []
    for chunk in (12, 1):
        monkeypatch.setattr(head, "CHUNK", chunk)
        gradients += torch.autograd.grad(sft(*token_logprobs(hidden, weight, targets)), weight)
    one_chunk, twelve_chunks = gradients
    assert one_chunk.dtype == torch.float32
    torch.testing.assert_close(twelve_chunks, one_chunk, rtol=1e-5, atol=1e-7)


def test_no_logits_beyond_one_chunk_exist_and_none_wait_for_the_backward_pass(monkeypatch):
    project, projected, saved = head.project, [], []
    monkeypatch.setattr(head, "CHUNK", 4)
    monkeypatch.setattr(head, "project", lambda h, w: projected.append(len(h)) or project(h, w))
    hidden, weight, targets = head_inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        logp, _ = token_logprobs(hidden, weight, targets)
    assert projected == [4, 4, 3], "the forward pass computes each logit once"
    assert sorted(saved) == sorted([(11, 8), (VOCABULARY, 8), (11,), (11,), (11,)]), "three numbers per token"
    logp.sum().backward()
    assert projected == 2 * [4, 4, 3], "the backward pass computes each logit once more"


def test_checkpointed_layers_run_again_and_change_no_gradient(any_model):
    batch = rows(4)
    expected = gradients(any_model, batch)
    checkpoint_layers(any_model, 1)
    forward_passes = [0, 0]
    for i, layer in enumerate(any_model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: forward_passes.__setitem__(i, forward_passes[i] + 1))
    for ours, theirs in zip(gradients(any_model, batch), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert forward_passes == [2, 1], "only the first layer is computed again"


def test_under_fsdp2_two_ranks_get_the_gradients_of_one(tmp_path):
    """By fsdp_head.py, which two ranks run."""

    def command():
        sys.argv = ["fsdp_head.py", str(tmp_path / "store"), os.environ["RANK"]]
        runpy.run_path(str(Path(__file__).with_name("fsdp_head.py")))

    for status, output, errors in fork_ranks(command, 2):
        assert status == 0, errors[-3000:]
        assert "gradients equal" in output
