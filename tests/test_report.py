"""A look inside a run: what a step keeps of its tokens, the compressed logs, the page that shows them, and figures."""

import html.parser
import json
import math
import shutil
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import pytest
import torch
from conftest import lines
from test_run import run, text_model
from test_update import fresh, make_rollouts, move_shadow, repetitive_rollouts, rows, settings
from transformers import AutoTokenizer

import bridge
import grpo
import plot
from infra import report
from infra.files import DataError, append_line, cut_back, read_log
from infra.tokens import pieces
from logprob import response_logprobs

HOSTILE = (
    "</script><script>document.title='ran'</script><img src=x onerror=document.title='ran'>\u2028\u2029\x1b[2J\u202e\0"
)


class Letters:
    """A tokenizer of one letter per token."""

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


def record_of(s, m, rollouts, keep, rollouts_hat=None, demonstrations=()):
    """What an update leaves in tokens.jsonl.gz."""
    rollouts_hat = rollouts_hat or rollouts
    for r in (rollouts, rollouts_hat):
        facts = dict(question="q", answer="a", response="", finish_reason="stop", right=None)
        r.records = [facts | {"reward": reward} for reward in r.reward.flatten().tolist()]
    timer = lambda phase: nullcontext()  # noqa: E731
    weights = bridge.updates(s, 0)[0]
    update = bridge.bilevel_gradients(m, rollouts, rollouts_hat, list(demonstrations), *weights, s, timer)
    logged = {}
    folder = SimpleNamespace(keep=keep, log_tokens=lambda step, record: logged.update(record))
    folder.log_metrics = folder.log_samples = folder.watch_signal = lambda *_: None
    run = SimpleNamespace(s=s, m=m, folder=folder, skipped=0, env=SimpleNamespace(tokenizer=Letters()))
    update.stats["sampled_tokens"] = 1
    bridge.log_step(run, 1, [update], rollouts, rollouts_hat, SimpleNamespace(seconds={"sample": 1.0}))
    return logged


def column(record, name, count):
    """One number of all kept tokens; a row has one number instead of a list if all are equal."""
    kept = [row for group in record["groups"] for row in group["rows"]]
    values = [row[name] if isinstance(row[name], list) else [row[name]] * len(row["pieces"]) for row in kept]
    assert sum(map(len, values)) == count
    return torch.tensor([math.nan if x is None else x for v in values for x in v], dtype=torch.float64)


def weights(record, count):
    """weight of every kept token in the loss; the record has multiples of an average token's."""
    return column(record, "weight", count) / count


@pytest.mark.parametrize("changes", [dict(), dict(kl_coef=0.1), dict(shadow_ratio_cap=0.0)])
@pytest.mark.parametrize("make", [make_rollouts, repetitive_rollouts])
def test_the_weight_of_a_token_in_the_gain_is_autograds_coefficient_of_its_log_probs(changes, make):
    s = settings(**changes)
    m = fresh(s, w_trained=True)
    move_shadow(m, by=0.3)
    rollouts = make(m.policy)
    record = record_of(s, m, rollouts, "all")
    A, weight, T = rollouts.advantage, rollouts.weight, len(rollouts.weight)
    cap = s.shadow_ratio_cap or None
    with torch.no_grad():
        logp, logp_hat = (response_logprobs(x, rollouts.rows)[0] for x in (m.policy, m.shadow))
        ref = response_logprobs(m.reference, rollouts.rows)[0] if s.kl_coef else None
    leaves = [x.clone().requires_grad_() for x in (logp, logp_hat)]
    losses = [grpo.grpo_loss(x, logp, A, weight, s.clip_of_method, cap, ref, s.kl_coef)[0] for x in leaves]
    (gain := losses[1] - losses[0]).backward()  # J(θ,w) − J(θ̂,w)
    assert gain.requires_grad
    of_policy, of_shadow = leaves[0].grad.double(), -leaves[1].grad.double()
    kept, slope, difference = weights(record, T), column(record, "slope", T), column(record, "gain", T)
    torch.testing.assert_close(kept * slope, of_policy, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(kept * (slope - difference), of_shadow, rtol=6e-3, atol=1e-6)
    torch.testing.assert_close(kept * difference, of_policy - of_shadow, rtol=6e-3, atol=1e-6)
    if cap and not s.kl_coef:
        rho = (logp_hat - logp).exp().clamp(max=cap).double()
        torch.testing.assert_close(kept * difference, weight * A * (1 - rho), rtol=6e-3, atol=1e-6)
        assert (rho == cap).any() and (difference != 0).any()  # noqa: PT018


def test_numbers_of_rows_that_no_pass_runs_are_null_and_their_log_probs_the_sampler_s():
    s = settings()
    m = fresh(s)
    rollouts = repetitive_rollouts(m.policy)  # the second group has no reward, the third has all the reward
    rollouts.sampler_logp = rollouts.sampler_logp - 1
    record = record_of(s, m, rollouts, "all")
    T, *starts = len(rollouts.weight), *(rollouts.offsets[i] for i in (4, 8))
    for name, missing in dict(entropy=True, logp_hat=True, ratio_hat=True, slope=False, gain=False).items():
        values = column(record, name, T)
        assert values[starts[0] : starts[1]].isnan().all() == missing
        assert not values[: starts[0]].isnan().any()
        assert not values[starts[1] :].isnan().any(), "rewarded rows are scored for the cooperative gain"
        if not missing:
            assert (values[starts[0] :] == 0).all(), "without an advantage there is no gradient"
    logp, ours = column(record, "logp", T), rollouts.sampler_logp.double()
    torch.testing.assert_close(logp[starts[0] : starts[1]], ours[starts[0] : starts[1]], rtol=1e-3, atol=0)
    torch.testing.assert_close(logp[: starts[0]], ours[: starts[0]] + 1, rtol=1e-3, atol=1e-4)


def test_own_rollouts_of_the_shadow_are_kept_beside_the_policy_s():
    s = settings(shadow_rollouts="own")
    m = fresh(s)
    move_shadow(m)
    rollouts, own = make_rollouts(m.policy), make_rollouts(m.shadow, seed=5)
    record = record_of(s, m, rollouts, "first", own)
    policy, shadow = record["groups"]
    assert (policy["of"], shadow["of"]) == ("policy", "shadow")
    assert {"logp", "slope"} <= policy["rows"][0].keys() and "gain" not in policy["rows"][0]  # noqa: PT018
    assert {"logp_hat", "gain"} <= shadow["rows"][0].keys() and "slope" not in shadow["rows"][0]  # noqa: PT018
    row = next(row for row in shadow["rows"] if row["A"])
    assert row["gain"] == pytest.approx(-row["A"], rel=1e-2), "the shadow's tokens count with minus their weight"


def test_a_number_that_differs_between_the_tokens_of_a_row_is_kept_for_each():
    s = settings(method="rl")
    m = fresh(s)
    rollouts = make_rollouts(m.policy)
    T = len(rollouts.weight)
    rollouts.advantage = torch.linspace(-1, 1, T)
    rollouts.weight = torch.linspace(1, 2, T) / T
    record = record_of(s, m, rollouts, "all")
    torch.testing.assert_close(column(record, "A", T), rollouts.advantage.double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights(record, T), rollouts.weight.double(), rtol=1e-3, atol=0)


def test_the_group_that_is_kept_is_the_first_with_unequal_rewards():
    s = settings()
    m = fresh(s)
    rollouts = repetitive_rollouts(m.policy)
    rollouts.rows = [rollouts.rows[i] for i in (4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11)]
    lengths = torch.tensor([len(r) for _, r in rollouts.rows])
    rollouts.reward, rollouts.weight = rollouts.reward[[1, 0, 2]], grpo.token_weights(lengths, "grpo", 16)
    rollouts.advantage = grpo.group_advantages(rollouts.reward).flatten().repeat_interleave(lengths)
    (group,) = record_of(s, m, rollouts, "first")["groups"]
    assert group == record_of(s, m, rollouts, "all")["groups"][1]
    assert [row["reward"] for row in group["rows"]] == [1, 0, 1, 0]
    A = grpo.group_advantages(rollouts.reward)[1].tolist()
    assert [row["A"] for row in group["rows"]] == pytest.approx(A, abs=1e-4)


def test_demonstrations_have_the_mean_nll_that_is_logged():
    s = settings()
    m = fresh(s)
    rollouts, demonstrations = make_rollouts(m.policy), rows(12, seed=9)
    kept = record_of(s, m, rollouts, "all", None, demonstrations)["demonstrations"]
    assert ["".join(d["pieces"]) for d in kept] == [Letters().decode(response) for _, response in demonstrations]
    nll = [x for d in kept for x in (d["nll"] if isinstance(d["nll"], list) else [d["nll"]] * len(d["pieces"]))]
    expected = bridge.sft_pass(m.policy, demonstrations, 1.0, s).mean().item()
    assert sum(nll) / len(nll) == pytest.approx(expected, rel=1e-3)
    first = record_of(s, m, rollouts, "first", None, demonstrations)
    assert (len(first["groups"]), len(first["demonstrations"])) == (1, 8)
    assert json.loads(json.dumps(first, allow_nan=False)) == first


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    """A tokenizer of bytes, but for a few words."""
    folder = tmp_path_factory.mktemp("text")
    text_model(folder, ["2+3=5 boxed"])
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["2+3=5", "naïve 🦙🦙 café\n", "日本語", "\\boxed{½}"])
def test_pieces_join_to_the_completion_and_a_broken_character_belongs_to_its_last_token(text, text_tokenizer):
    tokenizer = text_tokenizer
    ids = tokenizer.encode(text)
    for end in range(1, len(ids) + 1):
        found = pieces(tokenizer, ids[:end])
        assert len(found) == end
        assert "".join(found) == tokenizer.decode(ids[:end])
        assert all("\ufffd" not in piece for piece in found[: end - 3])
    assert "\ufffd" not in "".join(found)
    assert ("" in found) == (not text.isascii())


@pytest.mark.parametrize("broken", range(1, 14))
def test_text_behind_broken_bytes_appears_after_at_most_four_tokens(broken, text_tokenizer):
    begins_none = text_tokenizer.encode("日")[1:2]  # a byte that begins no character
    ids = text_tokenizer.encode("½") + begins_none * broken + text_tokenizer.encode("ok")
    found = pieces(text_tokenizer, ids)
    assert "".join(found) == text_tokenizer.decode(ids)
    assert all(any(found[start : start + 4]) for start in range(len(ids) - 3))
    assert found[-1] == "k"


def test_pieces_keep_the_spaces_that_a_tokenizer_drops_at_the_start_of_a_text():
    class Words:
        def decode(self, ids):
            return " ".join(f"w{i}" for i in ids)

    assert pieces(Words(), [1, 2, 3]) == ["w1", " w2", " w3"]


def test_a_compressed_log_survives_a_cut_at_every_byte(tmp_path):
    log = tmp_path / "log.jsonl.gz"
    records = [{"step": step, "text": "é" * step} for step in (1, 2, 3)]
    ends = []
    for record in records:
        append_line(log, record)
        ends.append(log.stat().st_size)
    whole = log.read_bytes()
    for size in range(len(whole) + 1):
        log.write_bytes(whole[:size])
        found = read_log(log)
        complete = sum(end <= size for end in ends)
        assert found == records[: len(found)]
        assert len(found) - complete in (0, 1)  # the text of a member can be whole without the member's checksum
        cut_back(log, 2)
        append_line(log, {"step": 9})
        assert read_log(log) == [*found[:2], {"step": 9}]
    log.write_bytes(whole[: ends[0]] + b"garbage" + whole[ends[0] :])
    with pytest.raises(DataError, match=r"log\.jsonl\.gz: damaged"):
        read_log(log)


def test_a_resumed_run_keeps_each_step_once_and_keep_rollouts_chooses_the_groups(tmp_path):
    flags = ["--prompts-per-step", "3", "--group-size", "4", "--save-every", "1", "--eval-problems", "1"]
    run(tmp_path, *flags, "--keep-rollouts", "none", steps=1)
    assert not (tmp_path / "tokens.jsonl.gz").exists()
    for name in ("tokens", "answers"):
        append_line(tmp_path / f"{name}.jsonl.gz", {"step": 2})  # as if killed before the checkpoint of step 2
    run(tmp_path, *flags, "--resume", "--keep-rollouts", "all", steps=2)
    kept = read_log(tmp_path / "tokens.jsonl.gz")
    assert [(r["step"], len(r["groups"]), len(r["demonstrations"])) for r in kept] == [(2, 3, 8)]
    assert [len(g["rows"]) for g in kept[0]["groups"]] == [4, 4, 4]
    samples = [r["response"] for r in lines(tmp_path / "samples.jsonl") if r["step"] == 2]
    joined = ["".join(row["pieces"]) for row in kept[0]["groups"][0]["rows"]]
    assert [text.removesuffix("<eos>") for text in joined] == samples
    evaluated = [(r["step"], r["model"]) for r in read_log(tmp_path / "answers.jsonl.gz")]
    assert evaluated == [(step, model) for step in (0, 1, 2) for model in ("policy", "shadow")]
    for evals, answers in zip(
        lines(tmp_path / "evals.jsonl"), read_log(tmp_path / "answers.jsonl.gz")[::2], strict=True
    ):
        assert sum(answers["correct"]) / len(answers["correct"]) == pytest.approx(evals["policy"]["average"])


def page_of(folder):
    """(the data inside a run's page, its tags) as a browser parses them."""
    found, tags = [], []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

        def handle_data(self, text):
            if tags and tags[-1][1].get("id") == "data":
                found.append(text)

    Parser().feed(report.write(folder).read_text(encoding="ascii", errors="replace"))
    return json.loads("".join(found)), tags


def hostile_run(folder):
    """A folder whose texts all try to leave their place in the page."""
    row = dict(reward=1.0, A=0.5, finish="stop", weight=1.0, pieces=["a", HOSTILE, "b"], logp=[-1, -2.0, None],
               logp_hat=-1.5, ratio_hat=[1.0, 3.0, None], entropy=0.2, slope=0.5, gain=[0.1, -0.2, 0])  # fmt: skip
    group = dict(of="policy", question=HOSTILE, answer=HOSTILE, prompt=HOSTILE, rows=[row, row | {"reward": 0.0}])
    demonstration = dict(prompt=HOSTILE, pieces=[HOSTILE, "x"], nll=[0.1, 2.0])
    (folder / "config.json").write_text('{"settings": {"method": "bridge"}}')
    for step in (1, 2, 3):
        append_line(folder / "metrics.jsonl", {"step": step, "reward": 0.5, "seconds": {}})
        append_line(folder / "tokens.jsonl.gz", dict(step=step, groups=[group], demonstrations=[demonstration]))
    for step, right in ((0, [True, False]), (3, [False, True])):
        append_line(folder / "evals.jsonl", {"step": step, "policy": {"all": 0.5, "average": 0.5}})
        columns = {name: [HOSTILE] * 2 for name in ("group", "question", "answer", "response", "extracted")}
        columns |= dict(correct=right, finish_reason=["stop", "length"])
        append_line(folder / "answers.jsonl.gz", {"step": step, "model": "policy"} | columns)
    return folder


def test_texts_of_a_run_stay_data_in_its_page(tmp_path):
    data, tags = page_of(hostile_run(tmp_path))
    assert [tag for tag, _ in tags].count("script") == 2
    assert "img" not in [tag for tag, _ in tags]
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'"), "the page loads nothing"
    piece = data["rollouts"][0]["groups"][0]["rows"][0]["pieces"][1]
    assert piece.startswith("</script><script>")
    assert data["answers"][0]["question"][0] == piece == HOSTILE
    source = (tmp_path / "report.html").read_text()
    assert "http://" not in source.replace("http://www.w3.org/2000/svg", "") and "innerHTML" not in source  # noqa: PT018


def test_a_large_run_is_thinned_evenly_and_the_page_says_so(tmp_path, monkeypatch):
    numbers = [round(-0.001 * i, 3) for i in range(100)]
    row = dict(reward=1.0, A=0.5, finish="stop", weight=1.0, pieces=["abc"] * 100, logp=numbers, entropy=numbers)
    group = dict(of="policy", question="q", answer="a", prompt="p", rows=[row] * 8)
    texts = {name: list("abcd") for name in ("group", "question", "answer", "response", "extracted")}
    texts |= dict(correct=[True, False, True, False], finish_reason=["stop"] * 4)
    (tmp_path / "config.json").write_text('{"settings": {}}')
    for step in range(1, 41):
        append_line(tmp_path / "metrics.jsonl", {"step": step, "seconds": {}})
        append_line(tmp_path / "tokens.jsonl.gz", dict(step=step, groups=[group], demonstrations=[]))
    for step in (0, 5, 10):
        append_line(tmp_path / "answers.jsonl.gz", dict(step=step, model="policy") | texts)
    data, _ = page_of(tmp_path)
    assert (len(data["rollouts"]), len(data["answers"][0]["question"]), data["notes"]) == (40, 4, [])
    whole = report.size(data["rollouts"])
    monkeypatch.setattr(report, "TOKENS", int(0.3 * whole))
    monkeypatch.setattr(report, "ANSWERS", int(0.6 * report.size(data["answers"])))
    monkeypatch.setattr(report, "POINTS", 15)
    data, _ = page_of(tmp_path)
    assert report.size(data["rollouts"]) <= report.TOKENS
    for name, every in (("rollouts", 4), ("metrics", 3)):
        steps = [record["step"] for record in data[name]]
        assert steps[-1] == 40
        assert {later - earlier for earlier, later in pairwise(steps)} == {every}
    assert [(e["step"], e["question"], e["correct"]) for e in data["answers"]] == [
        (step, ["a", "c"], [True, True]) for step in (0, 5, 10)
    ]
    assert data["notes"] == [
        "The page shows every 4. of the 40 steps with kept rollouts, to stay small.",
        "Answers are shown for every 2. evaluation problem, to keep this page small.",
    ]


def test_the_flag_html_writes_the_page_of_each_run(tmp_path, capsys, monkeypatch):
    hostile_run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path), "--html"])
    plot.main()
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"


@pytest.mark.parametrize("flags", [("--method", "bridge"), ("--method", "sft"), ("--method", "luffy")])
def test_a_finished_run_has_a_page_with_its_steps_and_answers(flags, finished_run):
    folder = finished_run(*flags, "--steps", "2")
    assert (folder / "report.html").stat().st_size < 200_000
    data, _ = page_of(folder)
    assert [step["step"] for step in data["rollouts"]] == [1, 2]
    assert [record["step"] for record in data["metrics"]] == [1, 2]
    assert {e["step"] for e in data["answers"]} == {0, 2}
    if flags[1] == "luffy":
        expert = data["rollouts"][0]["groups"][0]["rows"][-1]
        assert expert["finish"] == "demonstration"
    assert bool(data["rollouts"][0]["groups"]) == (flags[1] != "sft")


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium is installed: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


def opened(browser, folder):
    """(the page of a run, the errors of its console)."""
    errors, page = [], browser.new_page(viewport={"width": 1600, "height": 900})
    page.on("console", lambda message: message.type in ("error", "warning") and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(report.write(folder).as_uri())
    return page, errors


def test_chromium_shows_the_page_moves_the_slider_and_runs_no_text_of_the_model(tmp_path, chromium):
    page, errors = opened(chromium, hostile_run(tmp_path))
    assert page.text_content("#step") == "step 3 of 3"
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#step") == "step 2 of 3"
    page.fill("#slider", "0")
    assert page.text_content("#step") == "step 1 of 3"
    assert page.title() == f"{tmp_path.name}: a look inside", "no text of the model has run"
    assert page.locator("#rollouts i").count() == 6
    assert page.locator("#rollouts i.absent").count() == 0, "the weight in the gain is known everywhere"
    page.click("text=ratio ρ̂")
    assert page.locator("#rollouts i.absent").count() == 2
    page.hover("#rollouts i >> nth=1")
    assert "ratio ρ̂ 3" in page.text_content("#detail")
    assert "\\u{1b}[2J\\u{202e}" in page.text_content("#rollouts"), "control characters are escapes"
    for kind in ("became right", "became wrong"):
        page.click(f"text={kind} (1)")
        assert page.locator("#answers tr").count() == 2
    assert errors == []


def test_chromium_marks_what_is_right_by_its_statement_and_shows_rewards_of_any_scale(tmp_path, chromium):
    hostile_run(tmp_path)
    numbers = dict(finish="stop", logp=-1.0, entropy=0.2, slope=0.5)
    marks = {"r1": (True, 9.0, "✓ reward 9"), "r2": (False, 0.1, "✗ reward 0.1"), "r3": (None, 3.0, "reward 3")}
    rows = []
    for text, (right, reward, _) in marks.items():
        row = dict(reward=reward, right=right, pieces=[text, "a"], A=[0.5, -0.5], weight=[1.0, 2.0])
        rows.append(row | numbers)
    group = dict(of="policy", question="q", answer="a", prompt="p", rows=rows)
    (tmp_path / "tokens.jsonl.gz").unlink()
    append_line(tmp_path / "tokens.jsonl.gz", {"step": 1, "groups": [group], "demonstrations": []})
    (tmp_path / "metrics.jsonl").unlink()
    for step, reward in ((1, -4.0), (2, 9.0)):
        append_line(tmp_path / "metrics.jsonl", {"step": step, "reward": reward, "seconds": {}})
    page, errors = opened(chromium, tmp_path)
    heads = page.locator("#rollouts .row > div:first-child span")
    assert heads.all_text_contents() == [mark for _, _, mark in marks.values()]
    assert [head.get_attribute("class") for head in heads.all()] == ["right", "wrong", None]
    assert "A by token" in page.text_content("#rollouts")
    page.hover("#rollouts i >> nth=1")
    assert "RL weight +1" in page.text_content("#detail"), "the weight of the second token"
    curve = page.locator("#curves figure", has_text="reward of the rollouts").locator("path").last
    ys = [float(point.split(" ")[1]) for point in curve.get_attribute("d")[1:].split("L")]
    assert all(0 <= y <= 170 for y in ys)
    assert errors == []


@pytest.mark.parametrize("method", ["bridge", "sft", "luffy"])
def test_chromium_shows_runs_of_all_kinds_without_an_error(method, finished_run, chromium, tmp_path):
    shutil.copytree(finished_run("--method", method, "--steps", "2"), tmp_path / "run")
    page, errors = opened(chromium, tmp_path / "run")
    assert page.locator("#curves svg").count() >= 3
    assert page.locator("#answers tr").count() > 10
    for k in range(7):
        page.keyboard.press(str(k + 1))
    assert errors == []


def fake_run(folder, rewards=(0.5,), evals=()):
    """A run folder with the logs that figures are drawn of."""
    folder.mkdir(parents=True)
    for step, reward in enumerate(rewards, 1):
        record = {"step": step, "reward": reward, "response_tokens": 5.0, "seconds": {"sample": 1.0, "rl": 0.5}}
        append_line(folder / "metrics.jsonl", record)
    for policy in evals:
        append_line(folder / "evals.jsonl", {"step": 1, "policy": policy | {"average": 0.5}})
    return folder


def drawn(monkeypatch, *runs):
    """The axes of plot.py's figure by title."""
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *a, **k: figures.append(self))
    plot.draw(list(runs), Path("unused.png"))
    return {ax.get_title(): ax for ax in figures[0].axes}


@pytest.mark.parametrize(
    "rewards", [[(3.0, 10.0)], [(-1.0, 1.0)], [(-5.0, -4.0)], [(0.2, 0.4), (6.0, 8.0)], [(-2.0, -2.0)], [(0.25, 0.75)]]
)
def test_the_figure_shows_rewards_of_any_scale(tmp_path, monkeypatch, rewards):
    runs = [fake_run(tmp_path / str(i), values) for i, values in enumerate(rewards)]
    low, high = drawn(monkeypatch, *runs)["reward of the rollouts"].get_ylim()
    values = [reward for of_run in rewards for reward in of_run]
    assert low < min(values)
    assert max(values) < high
    if min(values) >= 0 and max(values) <= 1:
        assert (low, high) == (0, 1), "runs with rewards in [0, 1] have one scale"


def test_runs_with_equal_last_names_have_their_paths_as_labels(tmp_path, monkeypatch):
    runs = [fake_run(tmp_path / name) for name in ("a/run", "b/run", "c/other")]
    axes = drawn(monkeypatch, *runs)
    names = [str(runs[0]), str(runs[1]), "other"]
    assert [text.get_text() for text in axes["response length, tokens"].get_legend().get_texts()] == names
    seconds = axes["seconds per step, by phase"]
    assert [text.get_text() for text in seconds.get_yticklabels()] == names
    assert len({bar.get_y() for bar in seconds.patches}) == 3, "each run has a row of its own"


@pytest.mark.parametrize(
    ("first", "second"),
    [(("n=3", "n=4", "n=5"), ("all",)), (("level 1", "level 2"), ("level 2", "level 3")), (("a", "b"), ("b", "a")),
     (("a",), ())],
)  # fmt: skip
def test_the_bars_of_a_group_stand_above_its_name_whatever_groups_other_runs_have(tmp_path, monkeypatch, first, second):
    value = {group: 0.1 * i for i, group in enumerate(dict.fromkeys((*first, *second)), 1)}
    of_runs = [{group: value[group] for group in groups} for groups in (first, second)]
    runs = [fake_run(tmp_path / str(i), evals=[of_run] if of_run else []) for i, of_run in enumerate(of_runs)]
    ax = drawn(monkeypatch, *runs)["accuracy by group, last evaluation"]
    names = [text.get_text() for text in ax.get_xticklabels()]
    assert names == list(value)
    assert len(ax.patches) == len(first) + len(second)
    for bar in ax.patches:
        nearest = round(bar.get_x() + bar.get_width() / 2 - 0.2)
        assert bar.get_height() == pytest.approx(value[names[nearest]])
