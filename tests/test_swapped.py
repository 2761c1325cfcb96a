"""bench/swapped.py: what filters choose, and the weights that a run of `weighed` measures."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import lines, rows, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import swapped
import variants
from measure import ROOT
from swapped import SWAPPED

import bridge
from rewards import is_correct
from settings import PRESETS, Settings

ANNOTATORS = f"{ROOT}/bench/variants.py:sources"
OF_WEIGHED = ("omega", "frozen")
CASES = [("chains", "omega"), ("chains", "useful"), ("chains", "likely")]
CASES += [(ANNOTATORS, kind) for kind in SWAPPED if kind != "accepted"]  # which counts right answers, too


@pytest.fixture
def restored(monkeypatch):
    """What a kind of run replaces is put back at the end."""
    for name in ("sft_pass", "evaluate_policies", "clip_and_step"):
        monkeypatch.setattr(bridge, name, getattr(bridge, name))
    monkeypatch.setattr(bridge.plot, "draw", lambda *_: None)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("task", "kind"), CASES)
def test_a_run_measures_the_weights_of_useful_and_useless_demonstrations(task, kind, tmp_path):
    SWAPPED[kind]()
    method = "weighed" if kind in OF_WEIGHED else "mix"
    flags = ["--preset", "smoke", "--task", task, "--method", method, "--steps", "3", "--eval-problems", "2"]
    bridge.main([*flags, "--eval-every", "3", "--out", str(tmp_path / "run")])
    first, *others = lines(tmp_path / "run" / "probe.jsonl")
    weights = first["weight useful"], first["weight useless"]
    if kind in OF_WEIGHED:
        assert weights == (1, 1)
        (last,) = others
        assert last["weight useful"] + last["weight useless"] < 2
    elif kind == "useful":
        assert (*weights, others) == (1, 0, [])
    else:
        assert others == []
        assert 0 < sum(weights) < 2


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("kind", "moves"), [("omega", True), ("frozen", False)])
def test_a_frozen_shadow_stays_at_the_base_model_while_theta_moves(kind, moves, tmp_path):
    SWAPPED[kind]()
    seen = {"theta": [], "theta_hat": []}

    def remember(run, step):
        for name, values in seen.items():
            values.append(torch.cat([p.detach().flatten() for p in run.m.parameters[name]]))

    swapped.probe(remember)
    flags = ["--preset", "smoke", "--method", "weighed", "--steps", "2", "--eval-problems", "2"]
    bridge.main([*flags, "--out", str(tmp_path / "run")])
    moved = {name: not torch.equal(values[0], values[-1]) for name, values in seen.items()}
    assert moved == {"theta": True, "theta_hat": moves}


def test_a_filter_leaves_out_what_it_refuses(restored, monkeypatch):
    demonstrations = rows(6)
    model = tiny_model()

    def gradient(chosen):
        model.zero_grad()
        bridge.sft_pass(model, chosen, 0.5, Settings())
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradient(demonstrations[::2])
    measured = []
    monkeypatch.setattr(swapped, "probe", measured.append)
    monkeypatch.setattr(swapped, "mean_weights", lambda run, weights: weights)
    swapped.keep_only(lambda run: [True, False] * 3)
    (at_evaluation,) = measured
    assert at_evaluation(SimpleNamespace(demonstrations=demonstrations), 0) == [1, 0] * 3
    torch.testing.assert_close(gradient(demonstrations), expected)


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
