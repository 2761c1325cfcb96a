"""Breaks one line of the method at a time and shows which tests notice.

    python tests/mutants.py [FILE.py ...]

Each mutant is a wrong line that trains without an error. One that no test kills would be a hole in the tests.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RANKS = ["test_parallel.py", "test_run.py"]  # slow: only for what they are about
FAST = ["test_grpo.py", "test_logprob.py", "test_kernels.py", "test_lora.py", "test_update.py", "test_sampler.py", "test_rewards.py",
        "test_loop.py", "test_evaluate.py", "test_plan.py"]  # fmt: skip

MUTANTS = [  # file, line as it is, line as it should not be
    ("grpo.py", "centred = rewards - rewards.mean(-1, keepdim=True)", "centred = rewards - rewards.mean()"),
    ("grpo.py", "rewards.std(-1, keepdim=True) + STD_EPS", "rewards.std(-1, keepdim=True, unbiased=False) + STD_EPS"),
    ("grpo.py", "torch.minimum(unclipped, clipped)", "clipped"),
    ("grpo.py", "1.0 / (n * lengths.clamp(min=1).float())", "1.0 / lengths.sum().expand(n)"),
    ("grpo.py", "torch.where(weight != 0, logp - old_logp, 0.0)", "(logp - old_logp)"),
    ("grpo.py", "d.exp() - d - 1", "d.exp() + d - 1"),
    ("grpo.py", "ratio.detach().clamp(max=cap) * advantage * logp", "ratio.clamp(max=cap) * advantage * logp"),
    ("logprob.py", "z = logits / temperature  # [C, V]", "z = logits"),
    ("logprob.py", "logp = logits / temperature - lse[:, None]", "logp = logits - lse[:, None]"),
    ("logprob.py", "- g_entropy[:, None] * p * (logp + entropy[:, None])", "- 0.0"),
    ("logprob.py", "d.scatter_add_(1, targets[:, None], g_logp[:, None])", "pass"),
    ("logprob.py", "return (d / temperature).to(dtype)", "return d.to(dtype)"),
    ("logprob.py", "return d_hidden.mul_(grad),", "return d_hidden,"),
    ("logprob.py", "tokens = slice(start, min(start + chunk, len(hidden)))", "tokens = slice(0, min(chunk, len(hidden)))"),
    ("logprob.py", "s = s * shrink + tl.sum(e, 0)", "s = s + tl.sum(e, 0)"),
    ("logprob.py", "sz = sz * shrink + tl.sum(e * z, 0)", "sz = sz * shrink + tl.sum(e, 0)"),
    ("logprob.py", "row = tl.program_id(0).to(tl.int64)  # row", "row = tl.program_id(0)  # row"),
    ("logprob.py", "((column == y).to(tl.float32) - p)", "(-p)"),
    ("logprob.py", "z = tl.where((word < V)[None, :], z * inverse_temperature, -1e30)", "z = z * inverse_temperature"),
    ("logprob.py", "height = tl.minimum(token_tiles - band * GROUP, GROUP)", "height = GROUP"),
    ("logprob.py", "cell = token.to(tl.int64) * word_tiles + word_tile", "cell = token.to(tl.int64) + word_tile"),
    ("logprob.py", "return (target.sum(1) - lse).clamp(max=0.0)", "return target.sum(1) - m[:, 0]"),
    ("decoder.py", "scale=a.scaling", "scale=1.0"),
    ("decoder.py", "self.model.to(device).set_attn", "self.model.to(device, dtype).set_attn"),
    ("decoder.py", "to(device, dtype, copy=True)", "to(device, dtype)"),
    ("decoder.py", "self._compare_with_transformers()", "pass"),
    ("decoder.py", "p.data = part", "pass"),
    ("decoder.py", "x += linear.bias", "pass"),
    ("decoder.py", "sin[..., : self.head_dim // 2] *= -1", "pass"),
    ("decoder.py", "kv.view(-1, d)[cells] = qkv[:, heads:]", "kv.view(-1, d)[cells[:1]] = qkv[:1, heads:]"),
    ("decoder.py", "x1, x2 = x1 * c - x2 * s, x2 * c + x1 * s", "x1, x2 = x1 * c - x2 * s, x2 * c - x1 * s"),
    ("decoder.py", "(head >= HEADS).to(tl.int32) * D", "0 * D"),
    ("decoder.py", "gate * tl.sigmoid(gate) * up", "tl.sigmoid(gate) * up"),
    ("decoder.py", "share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK", "share = length // SPLITS"),
    ("decoder.py", "cached = sequence * slot_stride + kv_head * D", "cached = sequence * slot_stride"),
    ("decoder.py", "sv = sv * shrink[:, None]", "sv = sv"),
    ("decoder.py", "tl.where(empty, -1e30, m + tl.log", "tl.where(empty, 0.0, m + tl.log"),
    ("decoder.py", "weight = weight / tl.sum(weight, 0)", "weight = weight"),
    ("model.py", "(x[0].transpose(0, 1).to(value.dtype) for", "(x[0].transpose(0, 1) for"),
    ("model.py", "inputs_embeds=embedded.to(dtype or embedded.dtype)", "inputs_embeds=embedded"),
    ("model.py", "layer.training = i < count", "layer.training = True"),
    ("model.py", "predicts = [i >= len(p) - 1", "predicts = [i >= len(p)"),
    ("model.py", "torch.arange(int(lengths.sum())) - start", "torch.arange(int(lengths.sum()))"),
    ("lora.py", "return ctx.sign * grad, None", "return grad, None"),
    ("lora.py", "B, A, alpha=self.scale)", "B, A)"),
    ("lora.py", "torch.zeros(linear.out_features, rank", "torch.ones(linear.out_features, rank"),
    ("lora.py", 'target[f"{name}.weight"].copy_(module.merged_weight())', 'target[f"{name}.weight"].add_(0)'),
    ("bridge.py", "sign=-1.0)  # the minus of eq. (8)", "sign=1.0)"),
    ("bridge.py", "else copy.deepcopy  # slices", "else twin  # slices"),
    ("bridge.py", "p.grad.mul_(rl)", "p.grad.mul_(1.0)"),
    ("bridge.py", "m.policy, demonstrations, sft, s)", "m.policy, demonstrations, 1.0, s)"),
    ("bridge.py", "sft_backward(m.policy, demon", "sft_backward(m.shadow or m.policy, demon"),
    ("bridge.py", "[*m.parameters[\"theta\"], *m.w.values()]", "m.parameters[\"theta\"]"),
    ("bridge.py", "solo = rl_backward(m.shadow,", "solo = rl_backward(m.policy,"),
    ("bridge.py", "lambda logp, *_: -logp.sum() / count", "lambda logp, *_: -logp.mean()"),
    ("bridge.py", "slice(first + tokens.start, first + tokens.stop)", "tokens"),
    ("bridge.py", "s.divide_by_std).flatten()", "s.divide_by_std).T.flatten()"),
    ("bridge.py", "run.sampler.refresh(m.shadow)", "run.sampler.refresh(m.policy)"),
    ("bridge.py", "m.resync()", "pass"),
    ("bridge.py", "m.reset_optimizers()", "pass"),
    ("bridge.py", "in plan * s.updates_per_rollout:", "in plan:"),
    ("bridge.py", "key=is_live, reverse=True", "key=is_live"),
    ("bridge.py", 'c.finish_reason == "stop" or not s.overlong_mask', 'c.finish_reason == "stop" or s.overlong_mask'),
    ("bridge.py", "rl_backward(m.shadow, rollouts_hat, m.reference", "rl_backward(m.shadow, rollouts_hat, None"),
    ("bridge.py", "partial(token_loss, at[batch.start], ref), s.temperature", "partial(token_loss, at[batch.start], ref), 1.0"),
    ("bridge.py", "response_scores(reference, rows, s.temperature, dtype)", "response_scores(reference, rows, 2.0, dtype)"),
    ("bridge.py", "reward_hat = (weight * reward).mean()", "reward_hat = reward.mean()"),
    ("bridge.py", "run.sampler.refresh(model)", "run.sampler.refresh(run.m.policy)"),
    ("sampler.py", "default_rng(key)", "default_rng(key[1:])"),
    ("sampler.py", "x[hole] = x[last]", "pass"),
    ("sampler.py", "cache.kv[:, :, hole] = cache.kv[:, :, last]", "pass"),
    ("sampler.py", "made += going", "made += 1"),
    ("sampler.py", "b.owner[m:n], b.made[m:n] = N, K", "pass"),
    ("sampler.py", "going *= ~(self.is_stop[chosen] | (made >= K))", "going *= ~self.is_stop[chosen]"),
    ("sampler.py", "outside = likelier.sum(-1, keepdim=True) >= top_p", "outside = likelier.sum(-1, keepdim=True) > 1.0"),
    ("sampler.py", "- (cdf.gather(1, token) - mass)) / mass)", "- cdf.gather(1, token)) / mass)"),
    ("sampler.py", "s = s * tl.exp(m - larger)", "s = s"),
    ("sampler.py", "(before + block > mark) | last", "last"),
    ("sampler.py", "total, ceiling, undecided = likelier, threshold, True", "total, ceiling, undecided = s, threshold, True"),
    ("sampler.py", "token = tl.where(largest > m, start + where, token)", "token = tl.where(largest > m, where, token)"),
    ("sampler.py", "group[:, :, :, 1:] = group[:, :, :, :1]", "pass"),
    ("sampler.py", "right=True", "right=False"),
    ("rewards.py", "if not boxes or unfinished > boxes[-1][1]:", "if not boxes:"),
    ("rewards.py", "(text if text.strip() else thought)", "response"),
    ("rewards.py", "boxes = [b for b in boxes if b[0]]", "pass"),
    ("answers.py", "left.pop(found)", "pass"),
    ("answers.py", "\"task\" in a.value.flags - g.value.flags", "False"),
    ("answers.py", "if len(units) == 2 and", "if False and"),
    ("answers.py", "return a == g if a.isalpha() and g.isalpha() else None", "return None"),
    ("expression.py", "return a.exact == b.exact", "return close(a.points[0], b.points[0])"),
    ("expression.py", "all(close(r, ratios[0]) for r in ratios)", "True"),
    ("expression.py", "if self.depth > MAX_DEPTH:", "if False:"),
    ("expression.py", "if self.work > self.budget:", "if False:"),
    ("expression.py", "if bits > MAX_BITS:", "if False:"),
    ("notation.py", "if 0 < above < below else match[0]", "if True else match[0]"),
    ("scores.py", "np.clip(s - c - i, 0, None) / (s - i)", "(s - c) / s"),
    ("scores.py", "sorted(problems)]", "problems]"),
    ("scores.py", "np.abs(null / len(differences)) >= abs(observed)", "null / len(differences) >= observed"),
    ("evaluate.py", "mine = todo[start : start + size][rank::world]", "mine = todo[start : start + size]"),
    ("evaluate.py", "zlib.crc32(group.encode()), i) for i in mine]", "0, n) for n, i in enumerate(mine)]"),
    ("parallel.py", "all_reduce(t, async_op=True) for t in tensors", "all_reduce(t, async_op=True) for t in [*tensors][:1]"),
    ("parallel.py", "[range(0)] * (most - len(batches))", "[]"),
    ("parallel.py", "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)"),
    ("parallel.py", "and not isinstance(p.grad, DTensor)", "and True"),
    ("parallel.py", "dist.PrefixStore(f\"attempt {attempt}\", store)", "store"),
    ("parallel.py", "return attempt > 1 or any(gather([restarted]))", "return restarted"),
    ("checkpoint.py", "if name in ALLOWED.get(module, ()):", "if True:"),
    ("checkpoint.py", "if int((path / \"checksum\").read_text()) != _checksum(path):", "if False:"),
    ("checkpoint.py", "if (broken := archive.testzip()) is not None:", "if (broken := None) is not None:"),
    ("checkpoint.py", "self.thread_count = 1  # there", "pass  # there"),
    ("bridge.py", "sorted(parallel.gather(mine), key=lambda pair: pair[0])", "parallel.gather(mine)"),
    ("bridge.py", "                parallel.add(gain)\n", "                pass\n"),
    ("bridge.py", "    parallel.add([total])\n", "    pass\n"),
    ("bridge.py", "max(parallel.gather([stop.requested or 0]))", "stop.requested or 0"),
    ("plan.py", "= 8 * m.parameters / share + 4 * m.tensors", "= 8 * m.parameters / share"),
    ("plan.py", 'out["reference"] = 4 *', 'out["reference"] = 2 *'),
    ("plan.py", "return s.lora_rank * sum(map(sum, sizes))", "return s.lora_rank * sum(map(max, sizes))"),
    ("plan.py", "m.layers * 2 * slots *", "m.layers * slots *"),
    ("plan.py", "+ q * padded)", "+ 0 * padded)"),
    ("plan.py", "+ b * 4 * m.mlp", "+ b * 3 * m.mlp"),
    ("plan.py", "(2 * (4 + 2) + 5 * 2) * m.hidden", "(2 * (4 + 2) + 2 * 2) * m.hidden"),
    ("plan.py", "samples * mean / slots + s.max_new_tokens - mean", "samples * mean / slots"),
]  # fmt: skip


def main() -> None:
    survivors, mutants = 0, [m for m in MUTANTS if m[0] in (sys.argv[1:] or m)]
    for file, line, broken in mutants:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "project"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "bench", "__pycache__"))
            source = (copy / file).read_text()
            assert source.count(line) == 1, f"{file}: this line must occur once: {line}"
            (copy / file).write_text(source.replace(line, broken))
            slow = file in ("parallel.py", "checkpoint.py") or "parallel.add" in line or "stop." in line
            tests = [f"tests/{name}" for name in (RANKS if slow else FAST)]
            command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *tests]
            finished = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        killer = re.search(r"FAILED \S+::(\w+)", finished.stdout)
        survived = finished.returncode == 0
        survivors += survived
        verdict = "SURVIVED" if survived else f"killed by {killer[1]}" if killer else "killed by a crash of the tests"
        print(f"{file}: {line.splitlines()[0]}\n    -> {broken.splitlines()[0]}\n    {verdict}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
