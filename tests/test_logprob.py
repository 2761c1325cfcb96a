"""logprob.py and model.py: the definition, TRL's, transformers', and what must not matter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, exact, rows, tiny_model
from transformers import AutoModelForCausalLM

import logprob
from grpo import grpo_loss
from infra import model
from infra.model import ModelError, checkpoint_layers, micro_batches, offsets, pack, packed_attention, response_logprobs


def unpacked(model, row):
    """The same log-probs from transformers' own attention, one sequence at a time."""
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
    expected = [unpacked(any_model, row) for row in batch]
    torch.testing.assert_close(logp, torch.cat([e[0] for e in expected]), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(entropy, torch.cat([e[1] for e in expected]), rtol=1e-5, atol=5e-6)


def test_logprobs_and_entropy_equal_trl():
    utils = pytest.importorskip("trl.trainer.utils")
    hidden, weight = torch.randn(6, 8), torch.randn(VOCABULARY, 8)
    targets = torch.randint(0, VOCABULARY, (6,))
    logp, entropy = logprob.token_logprobs(hidden, weight, targets, temperature=0.7)
    logits = hidden @ weight.T / 0.7
    torch.testing.assert_close(logp, utils.selective_log_softmax(logits, targets), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, utils.entropy_from_logits(logits), rtol=1e-5, atol=1e-5)


def test_chunks_change_neither_logprobs_nor_gradients(monkeypatch):
    hidden, weight = torch.randn(11, 8, requires_grad=True), torch.randn(VOCABULARY, 8, requires_grad=True)
    targets, upstream = torch.randint(0, VOCABULARY, (11,)), torch.randn(2, 11)

    def run(chunk):
        monkeypatch.setattr(logprob, "CHUNK", chunk)
        outputs = logprob.token_logprobs(hidden, weight, targets)
        loss = sum((o * u).sum() for o, u in zip(outputs, upstream, strict=True))
        return *outputs, *torch.autograd.grad(loss, (hidden, weight))

    for whole, chunked in zip(run(100), run(3), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_no_logits_beyond_one_chunk_are_ever_stored(monkeypatch):
    monkeypatch.setattr(logprob, "CHUNK", 4)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        logprob.token_logprobs(
            torch.randn(40, 8, requires_grad=True), torch.randn(VOCABULARY, 8), torch.arange(32).repeat(2)[:40]
        )
    assert all(len(s) < 2 or s[0] <= 4 or s == (VOCABULARY, 8) for s in sizes), sizes


def test_logprobs_are_fp32_whatever_goes_in_and_never_positive():
    hidden = torch.randn(5, 8, dtype=torch.bfloat16) * 20
    logp, entropy = logprob.token_logprobs(hidden, torch.randn(9, 8, dtype=torch.bfloat16), torch.arange(5))
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp <= 0).all()
    assert (entropy >= -1e-5).all()


def test_temperature_zero_has_no_logprobs():
    with pytest.raises(ValueError, match="temperature must be > 0"):
        logprob.token_logprobs(torch.randn(1, 8), torch.randn(9, 8), torch.tensor([0]), temperature=0.0)


def gradients(model, batch):
    model.zero_grad()
    logp, _ = response_logprobs(model, batch)
    logp.sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_neighbours_and_order_change_no_row_and_no_gradient():
    model, batch = tiny_model(), rows(6)
    together, _ = response_logprobs(model, batch)
    at = offsets(batch)
    order = [4, 0, 5, 2, 1, 3]
    shuffled, _ = response_logprobs(model, [batch[i] for i in order])
    expected = torch.cat([together[at[i] : at[i + 1]] for i in order])
    torch.testing.assert_close(shuffled, expected, rtol=1e-5, atol=1e-5)
    alone, _ = response_logprobs(model, batch[2:3])
    torch.testing.assert_close(alone, together[at[2] : at[3]], rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(model, batch), gradients(model, [batch[i] for i in order]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_longer_neighbour_which_means_more_padding_in_attention_changes_nothing():
    model, batch = tiny_model(), rows(2)
    alone, _ = response_logprobs(model, batch)
    beside, _ = response_logprobs(model, [*batch, ([1, 2, 3], list(range(1, 30)))])
    torch.testing.assert_close(beside[: len(alone)], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [{"sliding_window": 4}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_attention_that_is_not_plain_causal_is_refused_rather_than_computed_wrongly(attention):
    packed = pack([[1, 2, 3, 4, 5]], torch.device("cpu"))
    x = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ModelError, match="only full causal attention is supported"):
        packed_attention(None, x, x, x, None, 1.0, segments=packed.segments, **attention)
    assert packed_attention(None, x, x, x, None, 1.0, segments=packed.segments, sliding_window=5)[0].shape == (
        1,
        5,
        2,
        8,
    )


def test_positions_restart_with_each_sequence():
    packed = pack([[5, 6, 7], [8], [9, 9]], torch.device("cpu"))
    assert packed.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert packed.segments.index.tolist() == [0, 1, 2, 3, 6, 7]


def test_micro_batches_cover_every_row_once_within_the_budget():
    batch = rows(20)
    ranges = micro_batches(batch, 30)
    assert [i for r in ranges for i in r] == list(range(20))
    assert all(len(r) * max(len(p) + len(a) for p, a in (batch[i] for i in r)) <= 30 or len(r) == 1 for r in ranges)
    assert len(ranges) > 3
    assert len(micro_batches(batch, 1)) == 20
    unpadded = micro_batches(batch, 30, padded=False)
    assert [i for r in unpadded for i in r] == list(range(20))
    assert all(sum(len(p) + len(a) for p, a in (batch[i] for i in r)) <= 30 for r in unpadded)
    assert len(unpadded) < len(ranges)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_under_autocast_attention_gets_bf16_only_and_the_residual_stream_is_bf16(family, monkeypatch):
    seen = []
    monkeypatch.setattr(
        model,
        "causal_attention",
        lambda q, k, v, *rest: seen.extend((q.dtype, k.dtype, v.dtype)) or torch.zeros_like(q),
    )
    policy = tiny_model(family)
    policy.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    response_logprobs(policy, rows(2), 1.0, torch.bfloat16)
    assert len(seen) == 7
    assert set(seen) == {torch.bfloat16}


# ---- the training head


def sft(logp, entropy, tokens):
    return -logp.sum() / 11


def grpo(logp, entropy, tokens):
    """Of off-policy tokens: half of the ratios are clipped, and some tokens have no weight."""
    g = torch.Generator().manual_seed(1)
    old, advantage, weight = -torch.rand(11, generator=g) * 6, torch.randn(11, generator=g), torch.rand(11, generator=g)
    weight[::4] = 0.0
    return grpo_loss(logp, old[tokens].to(logp), advantage[tokens].to(logp), weight[tokens].to(logp))[0]


def entropy_bonus(logp, entropy, tokens):
    return (logp.exp() - 0.3 * entropy**2).sum()


def head_inputs(dtype=torch.float32, N=11, H=8):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=g) * 2, torch.randn(VOCABULARY, H, generator=g)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.arange(N) * 3


@pytest.mark.parametrize("loss_fn", [sft, grpo, entropy_bonus])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_head_s_loss_has_the_value_and_gradients_of_the_definition_and_of_fp64(loss_fn, temperature, chunk):
    hidden, weight, targets = head_inputs()
    loss = logprob.head_loss(hidden, weight, targets, loss_fn, temperature, chunk)
    ours = loss, *torch.autograd.grad(3 * loss, (hidden, weight))
    for definition in (logprob.token_logprobs, exact):
        expected = loss_fn(*definition(hidden, weight, targets, temperature), slice(0, 11))
        theirs = expected, *torch.autograd.grad(3 * expected, (hidden, weight))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=2e-4)  # logits reach 25


def test_a_tied_head_gets_its_gradient_as_head_and_as_embedding():
    _, weight, targets = head_inputs()
    hidden = torch.tanh(weight[:11])
    ours = torch.autograd.grad(logprob.head_loss(hidden, weight, targets, sft), weight, retain_graph=True)
    theirs = torch.autograd.grad(sft(*exact(hidden, weight, targets, 1.0), slice(0, 11)), weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_costs_no_gradient_of_its_weight(monkeypatch):
    hidden, weight, targets = head_inputs()
    monkeypatch.setattr(logprob, "_accumulate", lambda *a: pytest.fail("a gradient nobody asked for"))
    logprob.head_loss(hidden, weight.detach(), targets, sft).backward()
    assert hidden.grad.abs().sum() > 0


def test_a_chunk_without_weight_leaves_no_gradient_and_no_nan_however_extreme_its_logits():
    hidden, weight, targets = head_inputs()
    with torch.no_grad():
        hidden[:4] *= 1e4  # probabilities of exactly 0 and 1

    def loss_fn(logp, entropy, tokens):
        w = torch.arange(tokens.start, tokens.stop) >= 4
        return grpo_loss(logp, torch.zeros_like(logp), torch.ones_like(logp), w.float())[0]

    logprob.head_loss(hidden, weight, targets, loss_fn, chunk=4).backward()
    assert (hidden.grad[:4] == 0).all()
    assert (hidden.grad[4:] != 0).any()
    assert weight.grad.isfinite().all()


def test_a_single_token_is_enough():
    hidden, weight, targets = head_inputs(N=1)
    logprob.head_loss(hidden, weight, targets, sft).backward()
    assert hidden.grad.shape == (1, 8)


def test_the_gradient_of_a_nearly_certain_token_is_not_lost_to_bf16():
    """1 − p of a target with p = 1 − 1e-4: in bf16, whose numbers near 1 are 2⁻⁸ apart, it would be 0."""
    weight = torch.zeros(3, 8, dtype=torch.bfloat16)
    weight[0, 0] = 10.0
    hidden = torch.zeros(1, 8, dtype=torch.bfloat16)
    hidden[0, 0] = 1.0
    hidden.requires_grad_()
    target = torch.tensor([0])
    ours = torch.autograd.grad(logprob.head_loss(hidden, weight, target, sft), hidden)
    theirs = torch.autograd.grad(sft(*exact(hidden, weight, target, 1.0), slice(0, 1)), hidden)
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


def test_the_weight_s_gradient_is_summed_over_chunks_in_fp32_though_all_else_is_bf16():
    hidden, weight, targets = head_inputs(torch.bfloat16, N=12)
    weight = weight.detach().float().requires_grad_()
    whole, pieces = (
        torch.autograd.grad(logprob.head_loss(hidden, weight, targets, sft, 1.0, chunk), weight)[0] for chunk in (12, 1)
    )
    assert whole.dtype == torch.float32
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-7)


def test_the_head_never_holds_logits_of_more_than_a_chunk(monkeypatch):
    rows = []
    project = logprob.project
    monkeypatch.setattr(logprob, "project", lambda h, w: rows.append(len(h)) or project(h, w))
    hidden, weight, targets = head_inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        logprob.head_loss(hidden, weight, targets, sft, chunk=4).backward()
    assert rows == [4, 4, 3], "each logit is computed once"
    assert not saved, "the gradients are there already: nothing waits for the backward pass"


def test_scoring_equals_the_definition_and_keeps_no_graph():
    hidden, weight, targets = head_inputs()
    for ours, theirs in zip(
        logprob.score(hidden, weight, targets, 0.7), logprob.token_logprobs(hidden, weight, targets, 0.7), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        assert not ours.requires_grad


def test_checkpointed_layers_are_run_again_and_change_no_gradient(any_model):
    batch = rows(4)
    expected = gradients(any_model, batch)
    checkpoint_layers(any_model, 1)
    runs = [0, 0]
    for i, layer in enumerate(any_model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    for ours, theirs in zip(gradients(any_model, batch), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert runs == [2, 1], "only the first layer is limited to its inputs"


def test_under_fsdp2_two_ranks_get_the_gradients_of_one():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               here / "fsdp_head.py"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parent}:{here}"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("gradients equal") == 2
