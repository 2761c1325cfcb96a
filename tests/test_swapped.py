"""bench/swapped.py: weights of the demonstrations find the right annotator, where mixing provably cannot."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import lines, rows, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import swapped
import variants
from measure import ROOT
from swapped import LEAST, SWAPPED, Weights, ascent, install

import bridge
from rewards import is_correct
from settings import PRESETS, Settings

CONTEXTS = 8
REWARDED = torch.arange(CONTEXTS) < 4


def likelihood(logits, omega):
    """J_SFT(·; ω) of two annotators, who choose action 0 and action 1 in every context.  logits [contexts, 2]"""
    logp = logits.log_softmax(1).sum(0)  # [2] of each annotator's demonstrations
    return (omega * logp).sum() / (omega * CONTEXTS).sum()


def trained(lam, rate):
    """(P(action 0) in each context, ω) after gradient ascent; RL rewards action 0 in half of the contexts."""
    policy = torch.zeros(CONTEXTS, 2, dtype=torch.float64, requires_grad=True)
    shadow = torch.zeros(CONTEXTS, 2, dtype=torch.float64, requires_grad=True)
    omega = torch.ones(2, dtype=torch.float64)
    for _ in range(400):
        reward = policy.softmax(1)[REWARDED, 0].mean()
        (of_policy,) = torch.autograd.grad((1 - lam) * likelihood(policy, omega) + lam * reward, policy)
        (of_shadow,) = torch.autograd.grad(likelihood(shadow, omega), shadow)
        with torch.no_grad():
            logp, logp_shadow = (x.log_softmax(1).sum(0) for x in (policy, shadow))
            omega = (omega + rate * ascent(logp, logp_shadow, omega, torch.tensor([CONTEXTS] * 2))).clamp(LEAST, 1)
            policy += 8 * of_policy
            shadow += 8 * of_shadow
    return policy.detach().softmax(1)[:, 0], omega


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_without_reward_mixing_leaves_two_annotators_even_and_learned_weights_find_the_right_one(lam):
    """Where no reward reaches, the two annotators cancel for every λ; the contexts with one tell who is right."""
    mixed, _ = trained(lam, rate=0.0)
    torch.testing.assert_close(mixed[~REWARDED], torch.full((4,), 0.5, dtype=torch.float64))
    weighed, omega = trained(lam, rate=0.02)
    assert omega.tolist() == [1.0, LEAST]
    assert (weighed[~REWARDED] > 0.95).all()
    assert (weighed[REWARDED] > mixed[REWARDED]).all()


def test_the_step_of_the_weights_is_the_derivative_of_the_penalised_objective():
    generator = torch.Generator().manual_seed(0)
    logp, logp_shadow = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([3, 1, 4, 1, 5])
    omega = torch.rand(5, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = (omega * lengths).sum()
    (expected,) = torch.autograd.grad((omega * (logp - logp_shadow)).sum() / tokens, omega)
    torch.testing.assert_close(ascent(logp, logp_shadow, omega.detach(), lengths), expected * tokens.detach())


@pytest.fixture
def restored(monkeypatch):
    """What `install` replaces is put back at the end."""
    for name in ("make_policies", "sft_pass", "sft_token_weights", "evaluate_policies"):
        monkeypatch.setattr(bridge, name, getattr(bridge, name))
    return monkeypatch


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("tokens", [1, 4096])
def test_demonstrations_of_weight_zero_are_left_out_and_equal_weights_change_nothing(tokens):
    s = Settings(tokens_per_micro_batch=tokens)
    demonstrations = rows(6)
    model = tiny_model()

    def gradient(chosen):
        model.zero_grad()
        bridge.sft_pass(model, chosen, 0.5, s)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    some = gradient(demonstrations[::2])
    all_of_them = gradient(demonstrations)
    weights = Weights(rate=0.0, key_of={str(row): str(row) for row in demonstrations})
    install(weights)
    weights.omega = {str(row): 0.3 for row in demonstrations}
    torch.testing.assert_close(gradient(demonstrations), all_of_them)
    weights.omega = {str(row): 0.3 * (i % 2 == 0) for i, row in enumerate(demonstrations)}
    torch.testing.assert_close(gradient(demonstrations), some)


ANNOTATORS = f"{ROOT}/bench/variants.py:sources"
CASES = [("chains", "weighed"), ("chains", "useful"), ("chains", "likely"), *((ANNOTATORS, kind) for kind in SWAPPED)]


@pytest.mark.parametrize(("task", "kind"), CASES)
def test_a_run_weighs_its_demonstrations(task, kind, tmp_path, restored):
    restored.setattr(swapped, "WARM_UP", 1)
    restored.setattr(bridge.plot, "draw", lambda *_: None)
    SWAPPED[kind]()
    flags = ["--preset", "smoke", "--task", task, "--method", "mix_lora", "--steps", "3", "--eval-problems", "2"]
    bridge.main([*flags, "--eval-every", "3", "--out", str(tmp_path / "run")])
    first, last = lines(tmp_path / "run" / "probe.jsonl")
    if kind == "useful":
        assert (last["weight useful"], last["weight useless"]) == (1, 0)
    elif kind.startswith("like"):
        assert last == first | {"step": 3}
        assert 0 < last["weight useful"] + last["weight useless"] < 2
    else:
        assert (first["weight useful"], first["weight useless"]) == (1, 1)
        assert last["weight useful"] + last["weight useless"] < 2


def test_the_weights_move_by_the_policy_s_likelihood_minus_the_shadow_s(tmp_path, restored):
    restored.setattr(swapped, "WARM_UP", 1)
    restored.setattr(bridge.plot, "draw", lambda *_: None)
    seen = []
    restored.setattr(Weights, "move", lambda self, rows, nll, nll_shadow: seen.append((nll, nll_shadow)))
    install(Weights(rate=0.1))
    bridge.main(["--preset", "smoke", "--method", "mix_lora", "--steps", "4", "--out", str(tmp_path / "run")])
    logged = [record["sft_nll"] for record in lines(tmp_path / "run" / "metrics.jsonl")]
    assert [nll.mean().item() for nll, _ in seen] == pytest.approx(logged[1:], rel=1e-5)
    assert not any(torch.equal(nll, nll_shadow) for nll, nll_shadow in seen)

    restored.undo()
    weights = Weights(rate=0.1, key_of={str(row): name for row, name in zip(rows(2), "ab", strict=True)})
    tokens = [len(response) for _, response in rows(2)]
    likelier = torch.cat([torch.full((tokens[0],), 1.0), torch.full((tokens[1],), 3.0)])
    weights.move(rows(2), likelier, torch.full((sum(tokens),), 2.0))
    assert weights.omega["a"] == 1.0
    assert weights.omega["b"] < 1.0


def test_of_four_annotators_one_answers_wrongly_and_one_leaves_out_a_step():
    task = variants.sources(Settings(**PRESETS["chains"]))
    by_source = {}
    for d in task.demonstrations:
        right = is_correct(d.response, d.answer).correct
        steps = d.response.count("=")
        operations = sum(d.question.count(sign) for sign in "+-*")
        by_source.setdefault((d.source, d.extra["useless"]), set()).add((right, operations - steps))
    worked = {(True, 0)}
    at_once = {(False, n) for n in range(2, 7)}
    assert by_source == {("0", False): worked, ("1", False): worked, ("2", True): at_once, ("3", True): {(True, 1)}}
    assert {p.group for p in task.problems} == {"n=3", "n=4", "n=5"}
