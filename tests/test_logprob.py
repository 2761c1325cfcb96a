"""logprob.py and model.py: the definition, TRL's, transformers', and what must not matter."""

import pytest
import torch
from conftest import VOCABULARY, rows, tiny_model
from transformers import AutoModelForCausalLM

import logprob
from model import ModelError, micro_batches, offsets, pack, packed_attention, response_logprobs


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
