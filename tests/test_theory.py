"""docs/theory.md: what the algebra says of the cooperative gain, in fp64.

A bandit has one prompt and K actions. Its policy is the softmax of K merged logits M = θ + s·B·A, so j(M) = J(θ, w).
"""

import copy

import pytest
import torch
from conftest import tiny_model
from test_update import fresh, gradients, make_rollouts, move_shadow, settings

import lora

S = 2.0  # the scale s of w
LAM = 0.3


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Bandit:
    """J_RL with a KL term, so that its maximum exists, and J_SFT of demonstrations drawn from q."""

    TAU = 0.5  # weight of KL(π ‖ uniform)

    def __init__(self, actions=5, seed=0):
        self.r = rand(actions, seed=seed)
        self.q = rand(actions, seed=seed + 1).softmax(0)

    def rl(self, M):
        logp = M.flatten().log_softmax(0)
        return (logp.exp() * (self.r - self.TAU * logp)).sum()

    def sft(self, M):
        return (self.q * M.flatten().log_softmax(0)).sum()

    def best(self):
        """Merged logits of the RL optimum, in closed form: π ∝ exp(r/τ)."""
        return self.r / self.TAU

    def mixture(self, M):
        return (1 - LAM) * self.sft(M) + LAM * self.rl(M)


def adapter(actions, seed):
    """w = (B, A) of rank 2 for a row of logits, all of it away from 0."""
    return [rand(actions, 2, seed=seed), rand(2, 1, seed=seed + 1)]


def delta(w):
    B, A = w
    return (S * B @ A).flatten()


def gradient(f, *leaves):
    leaves = [x.detach().requires_grad_() for x in leaves]
    return torch.autograd.grad(f(*leaves), leaves)


def maximised(f, x):
    """A stationary point of f, which is its maximum where f is concave in the policy."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -f(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    x = x.detach()
    # The line search ends where f changes by less than its rounding, which differs between processors.
    for _ in range(3):
        (g,) = gradient(f, x)
        x = x - torch.linalg.pinv(torch.autograd.functional.hessian(f, x)) @ g  # Newton
    return x


def test_fact_1_theta_can_undo_any_w():
    plain = tiny_model().double()
    adapted = copy.deepcopy(plain)
    w = lora.create(adapted, ["q_proj", "o_proj", "up_proj"], 4, seed=0)
    for i, p in enumerate(w.values()):
        p.data = 0.3 * rand(*p.shape, seed=i)
    paths = lora.attach(adapted, w, S)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    for model in (plain, adapted):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        assert (adapted(ids).logits - plain(ids).logits).abs().max() > 0.1
        for path in paths:
            layer = adapted.get_submodule(path)
            layer.base.weight -= S * layer.lora_B @ layer.lora_A  # θ' = M − s·B·A
        torch.testing.assert_close(adapted(ids).logits, plain(ids).logits, rtol=0, atol=1e-12)


def test_fact_1_the_best_reward_over_theta_is_the_same_for_every_w():
    bandit = Bandit()
    values = []
    for seed in (1, 5, 9):
        w = adapter(5, seed)
        theta = maximised(lambda x, w=w: bandit.rl(x + delta(w)), torch.zeros(5, dtype=torch.float64))
        values.append(bandit.rl(theta + delta(w)).item())
    assert values == pytest.approx([bandit.rl(bandit.best()).item()] * 3, abs=1e-12)


def test_fact_2_where_the_shadow_has_nothing_to_learn_w_has_mix_lora_s_gradient_bit_for_bit():
    s = settings(shadow_rollouts="own")
    m = fresh(s, w_trained=True)
    move_shadow(m)
    own = make_rollouts(m.shadow, seed=5)
    own.reward = torch.ones_like(own.reward)  # every answer of θ̂ is right
    own.advantage = torch.zeros_like(own.advantage)
    rollouts = make_rollouts(m.policy)
    of_bridge, _ = gradients(m, s, rollouts=copy.deepcopy(rollouts), rollouts_hat=own)
    simpler = settings(method="mix_lora")
    of_mix_lora, _ = gradients(fresh(simpler, w_trained=True), simpler, rollouts=copy.deepcopy(rollouts))
    assert any(g.any() for g in of_bridge["w"])
    assert all(torch.equal(a, b) for a, b in zip(of_bridge["w"], of_mix_lora["w"], strict=True))


def test_fact_2_danskin_s_term_is_zero_at_the_optimum_and_not_elsewhere():
    bandit = Bandit()
    w = adapter(5, seed=3)
    for theta_hat, is_optimal in ((bandit.best() - delta(w), True), (rand(5, seed=7), False)):
        g = gradient(lambda B, A, theta_hat=theta_hat: bandit.rl(theta_hat + delta((B, A))), *w)
        assert (max(x.abs().max() for x in g) < 1e-14) == is_optimal


def ascend(bandit, theta, w, shadow, rate=0.2, steps=4000):
    """θ and w ascend eq. (7); shadow(w) is θ̂, or None for mix_lora. Returns the policy."""
    for _ in range(steps):
        g_theta, *g_w = gradient(lambda x, B, A: bandit.mixture(x + delta((B, A))), theta, *w)
        if shadow is not None:
            theta_hat = shadow(w)
            g_hat = gradient(lambda B, A, x=theta_hat: bandit.rl(x + delta((B, A))), *w)
            g_w = [g - LAM * hat for g, hat in zip(g_w, g_hat, strict=True)]
        theta = theta + rate * g_theta
        w = [p + rate * g for p, g in zip(w, g_w, strict=True)]
    return (theta + delta(w)).softmax(0)


def test_fact_3_with_an_exact_shadow_bridge_is_mix_lora_and_ends_where_mix_does():
    bandit = Bandit()
    start = rand(5, seed=2)
    few = dict(steps=50)
    exact = lambda w: bandit.best() - delta(w)  # noqa: E731
    ours = ascend(bandit, start, adapter(5, seed=3), exact, **few)
    mix_lora = ascend(bandit, start, adapter(5, seed=3), None, **few)
    torch.testing.assert_close(ours, mix_lora, rtol=0, atol=1e-12)  # after every step, so after 50
    final = ascend(bandit, start, adapter(5, seed=3), exact)
    mix = maximised(bandit.mixture, torch.zeros(5, dtype=torch.float64)).softmax(0)  # no w
    torch.testing.assert_close(final, mix, rtol=0, atol=1e-9)


def maximisers(seed, lam=0.5):
    """(v and J_RL at the maximiser of eq. (7), v and J_RL at that of the mixture), on a grid.

    Three actions with the logits (θ, w, 0): θ may move the first one only, so it cannot undo w.
    """
    grid = torch.linspace(-4, 4, 81, dtype=torch.float64)
    theta, w = torch.meshgrid(grid, grid, indexing="ij")
    logp = torch.stack([theta, w, torch.zeros_like(w)], -1).log_softmax(-1)  # [θ, w, action]
    r = rand(3, seed=seed)
    sft = logp @ rand(3, seed=seed + 1000).softmax(0)
    rl = logp.exp() @ r
    v = rl.amax(0)  # [w]
    mixture = (1 - lam) * sft + lam * rl
    found = []
    for objective in (mixture - lam * v, mixture):
        place = objective.argmax().item()
        found += [v[place % 81].item(), rl.flatten()[place].item()]
    return found


def test_fact_5_where_theta_cannot_undo_w_the_gain_only_lowers_the_best_reward_of_rl():
    lower, reached = 0, set()
    for seed in range(60):
        v_bridge, rl_bridge, v_mix, rl_mix = maximisers(seed)
        assert v_bridge <= v_mix
        assert rl_bridge <= v_bridge
        lower += v_bridge < v_mix
        reached.add((rl_bridge > rl_mix) - (rl_bridge < rl_mix))
    assert lower > 10
    assert reached >= {-1, 1}, "the reward that is reached can be lower or higher"


def test_fact_6_the_rest_points_of_mixing_are_rest_points_of_bridge():
    bandit = Bandit()
    M = maximised(bandit.mixture, torch.zeros(5, dtype=torch.float64))
    for seed in (1, 4):
        w = adapter(5, seed)
        theta, theta_hat = M - delta(w), bandit.best() - delta(w)
        (g_theta,) = gradient(lambda x, w=w: bandit.mixture(x + delta(w)), theta)  # eq. (8)
        (g_hat,) = gradient(lambda x, w=w: bandit.rl(x + delta(w)), theta_hat)  # eq. (10)
        of_mixture = gradient(lambda B, A, x=theta: bandit.mixture(x + delta((B, A))), *w)
        of_shadow = gradient(lambda B, A, x=theta_hat: bandit.rl(x + delta((B, A))), *w)
        g_w = [a - LAM * b for a, b in zip(of_mixture, of_shadow, strict=True)]  # eq. (11)
        assert max(g.abs().max().item() for g in (g_theta, g_hat, *g_w)) < 1e-8


def speed(rho, theta, theta_hat, w, bandit):
    """dŴ/dt of the merged shadow by the chain rule, and by fact 7; α = 1, β = ρ. P·R̂ and R̂ too."""
    B, A = w
    (R_hat,) = gradient(bandit.rl, theta_hat + delta(w))
    (S_grad,) = gradient(bandit.sft, theta + delta(w))
    (R,) = gradient(bandit.rl, theta + delta(w))
    objective = lambda B, A: bandit.mixture(theta + delta((B, A))) - LAM * bandit.rl(theta_hat + delta((B, A)))  # noqa: E731
    dB, dA = gradient(objective, B, A)
    chain_rule = R_hat + rho * S * (dB @ A + B @ dA).flatten()

    def P(Z):
        return S**2 * (B @ B.T @ Z[:, None] + Z[:, None] @ A.T @ A).flatten()

    formula = R_hat - LAM * rho * P(R_hat) + rho * P((1 - LAM) * S_grad + LAM * R)
    return chain_rule, formula, P(R_hat), R_hat


def test_fact_7_w_s_descent_can_beat_the_shadow_s_own_ascent():
    bandit = Bandit()
    w = adapter(5, seed=3)
    theta = maximised(bandit.mixture, torch.zeros(5, dtype=torch.float64)) - delta(w)  # the policy rests
    for rho, loses in ((0.01, False), (10.0, True)):
        chain_rule, formula, pushed, R_hat = speed(rho, theta, rand(5, seed=8), w, bandit)
        torch.testing.assert_close(chain_rule, formula, rtol=1e-10, atol=1e-12)
        assert pushed @ R_hat >= 0, "P is positive semidefinite"
        assert (R_hat @ chain_rule < 0) == loses, "the change of the shadow's own reward"
