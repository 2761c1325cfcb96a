"""weighed.py: weights of the sources of demonstrations find the right annotator, where mixing provably cannot."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import lines, rows, shipped_tokenizer, tiny_model
from test_loop import make_run

import bridge
from infra.files import write_lines
from infra.run import Timer
from settings import SettingError, Settings, parse
from tasks.loading import describe_data
from tasks.sources import read_demonstrations
from tasks.task import Demonstration, Problem, Task, sources_of
from weighed import LEAST, step_of_omega

ROOT = Path(__file__).parents[1]
CONTEXTS = 8
REWARDED = torch.arange(CONTEXTS) < 4
ANNOTATOR = torch.arange(2).repeat_interleave(CONTEXTS)  # of each token: a demonstration is one token


def logp(logits):
    """[T] log π of the demonstrations of two annotators, who choose action 0 and action 1 in every context."""
    return logits.log_softmax(1).T.flatten()


def likelihood(logits, omega):
    """J_SFT(·; ω)"""
    of_token = omega[ANNOTATOR]
    return (of_token * logp(logits)).sum() / of_token.sum()


def trained(lam, eta):
    """(P(action 0) in each context, ω) after gradient ascent; RL rewards action 0 in half of the contexts."""
    policy = torch.zeros(CONTEXTS, 2, dtype=torch.float64, requires_grad=True)
    shadow = torch.zeros(CONTEXTS, 2, dtype=torch.float64, requires_grad=True)
    omega = torch.ones(2, dtype=torch.float64)
    for _ in range(400):
        reward = policy.softmax(1)[REWARDED, 0].mean()
        (of_policy,) = torch.autograd.grad((1 - lam) * likelihood(policy, omega) + lam * reward, policy)
        (of_shadow,) = torch.autograd.grad(likelihood(shadow, omega), shadow)
        with torch.no_grad():
            step = step_of_omega(logp(policy) - logp(shadow), omega, ANNOTATOR)
            omega = (omega + eta * step).clamp(LEAST, 1)
            policy += 8 * of_policy
            shadow += 8 * of_shadow
    return policy.detach().softmax(1)[:, 0], omega


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_without_reward_mixing_leaves_two_annotators_even_and_learned_weights_find_the_right_one(lam):
    """Where no reward reaches, the two annotators cancel for every λ; the contexts with one tell who is right."""
    mixed, _ = trained(lam, eta=0.0)
    torch.testing.assert_close(mixed[~REWARDED], torch.full((4,), 0.5, dtype=torch.float64))
    weighed, omega = trained(lam, eta=0.2)
    assert omega.tolist() == [1.0, LEAST]
    assert (weighed[~REWARDED] > 0.95).all()
    assert (weighed[REWARDED] > mixed[REWARDED]).all()


def test_the_step_of_omega_is_the_derivative_of_the_penalised_objective_times_tokens_per_token():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(9, generator=generator, dtype=torch.float64)
    source = torch.tensor([0, 0, 3, 1, 0, 3, 3, 1, 3])  # source 2 has no token
    omega = torch.rand(4, generator=generator, dtype=torch.float64, requires_grad=True)
    weighed = omega[source]
    (expected,) = torch.autograd.grad((weighed * g).sum() / weighed.sum(), omega)
    tokens = torch.bincount(source, minlength=4)
    step = step_of_omega(g, omega.detach(), source)
    torch.testing.assert_close(step * tokens / weighed.detach().sum(), expected)
    assert step[2] == 0


def gradient(model, chosen, s, omega=None):
    model.zero_grad()
    bridge.sft_pass(model, chosen, 0.5, s, omega)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("tokens", [1, 4096])
def test_demonstrations_of_weight_zero_are_left_out_and_equal_weights_change_nothing(tokens):
    s = Settings(tokens_per_micro_batch=tokens)
    demonstrations = rows(6)
    model = tiny_model()
    some = gradient(model, demonstrations[::2], s)
    all_of_them = gradient(model, demonstrations, s)
    lengths = torch.tensor([len(response) for _, response in demonstrations])
    torch.testing.assert_close(gradient(model, demonstrations, s, torch.full((int(lengths.sum()),), 0.3)), all_of_them)
    omega = torch.tensor([0.3 * (i % 2 == 0) for i in range(6)]).repeat_interleave(lengths)
    torch.testing.assert_close(gradient(model, demonstrations, s, omega), some)


def test_the_policy_takes_both_gradients_the_shadow_imitates_and_omega_ascends_their_difference(tmp_path):
    run = make_run(tmp_path, method="weighed", lam=0.25, eta=2.0)
    m, s = run.m, run.s
    rollouts, rollouts_hat = bridge.sample_rollouts(run.env, run.prompt_order, m.policy, m.shadow, 0, Timer(1))
    assert rollouts_hat is rollouts
    demonstrations = run.demonstrations[:4]
    sources = [0, 1, 1, 3]
    with torch.no_grad():
        for p in m.parameters["theta_hat"]:
            p.mul_(1.1)
        m.omega.copy_(torch.linspace(0.4, 1.0, len(m.omega)))
    lengths = torch.tensor([len(response) for _, response in demonstrations])
    omega = m.omega.detach()[sources].repeat_interleave(lengths)

    def grads(parameters):
        return torch.cat([p.grad.flatten() for p in parameters])

    def alone(part):
        for optimizer in m.optimizers.values():
            optimizer.zero_grad()
        return part()

    alone(lambda: bridge.rl_pass(m.policy, rollouts, None, None, s))
    of_rl = grads(m.parameters["theta"])
    nll = alone(lambda: bridge.sft_pass(m.policy, demonstrations, 1.0, s, omega))
    of_sft = grads(m.parameters["theta"])
    nll_hat = alone(lambda: bridge.sft_pass(m.shadow, demonstrations, 1.0, s, omega))
    imitation = grads(m.parameters["theta_hat"])

    weights = 0.75, 0.25
    update = bridge.bilevel_gradients(
        m, rollouts, rollouts, demonstrations, *weights, s, lambda phase: nullcontext(), sources
    )
    torch.testing.assert_close(grads(m.parameters["theta"]), 0.75 * of_sft + 0.25 * of_rl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads(m.parameters["theta_hat"]), imitation)
    assert "cooperative_gain" not in update.stats
    step = step_of_omega((nll_hat - nll).float(), m.omega.detach(), torch.tensor(sources).repeat_interleave(lengths))
    expected = (m.omega.detach() + 2.0 * step).clamp(LEAST, 1.0)
    bridge.clip_and_step(m, update.stats, s)
    torch.testing.assert_close(m.omega.detach(), expected)
    assert m.omega.min() >= LEAST


def test_a_loss_of_the_shadow_that_is_not_finite_steps_nothing(tmp_path):
    m = make_run(tmp_path, method="weighed").m
    for parameters in m.parameters.values():
        for p in parameters:
            p.grad = torch.ones_like(p)
    m.omega.grad = torch.full_like(m.omega, float("nan"))
    _, stepped = bridge.clip_and_step(m, {"sft_nll": 1.0, "sft_nll_hat": float("inf")}, Settings(method="weighed"))
    assert not stepped
    assert (m.omega == 1).all()


@pytest.mark.parametrize(("lam", "moves"), [("0", False), ("0.5", True)])
def test_without_a_reward_policy_and_shadow_are_one_and_omega_stays(lam, moves, tmp_path):
    flags = ["--preset", "smoke", "--steps", "3", "--eval-every", "3", "--method", "weighed", "--lam", lam]
    bridge.main([*flags, "--out", str(tmp_path / "run")])
    assert (lines(tmp_path / "run/metrics.jsonl")[-1]["omega_mean"] < 1) == moves


def test_without_steps_of_omega_the_method_is_mix_at_equal_weights(tmp_path):
    flags = ["--preset", "smoke", "--steps", "3", "--eval-every", "3"]
    bridge.main([*flags, "--method", "weighed", "--eta", "0", "--lam", "0.5", "--out", str(tmp_path / "weighed")])
    bridge.main([*flags, "--method", "mix", "--mu", "1", "--out", str(tmp_path / "mix")])
    for a, b in zip(lines(tmp_path / "weighed/metrics.jsonl"), lines(tmp_path / "mix/metrics.jsonl"), strict=True):
        assert a["omega_mean"] == 1.0
        assert (a["sft_nll"], a["reward"], a["grad_norm_theta"]) == (b["sft_nll"], b["reward"], b["grad_norm_theta"])


def test_settings_of_a_shadow_that_takes_rl_are_refused():
    for flags in (["--shadow-rollouts", "own"], ["--shadow-ratio-cap", "3"]):
        with pytest.raises(SettingError, match="does nothing with method weighed, only with bridge"):
            parse(["--method", "weighed", *flags])


ANNOTATORS = f"{ROOT}/bench/variants.py:sources"


@pytest.mark.parametrize(("most", "logged"), [(4, 4), (3, 0)])
def test_a_run_logs_the_weight_of_each_named_source_if_they_are_few(most, logged, tmp_path, monkeypatch):
    monkeypatch.setattr("weighed.NAMED", most)
    flags = ["--preset", "smoke", "--method", "weighed", "--task", ANNOTATORS, "--steps", "2", "--eval-every", "2"]
    bridge.main([*flags, "--out", str(tmp_path / "run")])
    last = lines(tmp_path / "run/metrics.jsonl")[-1]
    named = [last[f"omega_{name}"] for name in range(4) if f"omega_{name}" in last]
    assert len(named) == logged
    if named:
        assert last["omega_mean"] == pytest.approx(sum(named) / 4)


def test_demonstrations_of_one_source_share_a_weight_and_one_without_has_its_own():
    named = ["a", "", "b", "a", "", "b"]
    task = Task([], [Demonstration("q", "r", source=name) for name in named], [])
    assert sources_of(task) == (["a", "", "b", ""], [0, 1, 2, 0, 3, 2])
    for some, ending in ((named, "; 2 named sources of demonstrations"), ([""], "0 evaluation problems")):
        task = Task([Problem("1+1", "2")], [Demonstration("1+1", "2", source=name) for name in some], [])
        assert describe_data(task, shipped_tokenizer(), [1], [])["data"].endswith(ending)


def test_a_source_is_the_field_of_a_row_or_else_one_of_several_files(tmp_path):
    row = dict(question="1+1?", solution="\\boxed{2}")
    one = tmp_path / "one.jsonl"
    two = tmp_path / "two.jsonl"
    write_lines(one, [row, row | {"source": " web "}, row | {"source": 3}])
    write_lines(two, [row])

    def sources(files):
        return [d.source for d in read_demonstrations(files, "sft_data", [])]

    assert sources(str(one)) == ["", "web", "3"]
    assert sources(f"{one},{two}") == [str(one), "web", "3", str(two)]
