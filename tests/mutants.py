"""Breaks one line of the project at a time and shows which test fails.

    python tests/mutants.py [FILE.py ...]

Each mutant is a wrong line that trains without an error. A mutant that survives shows a missing test.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {  # start of a path -> tests that concern it; they run first to last until one fails
    "grpo.py": ["test_grpo.py"],
    "logprob.py": ["test_logprob.py", "test_sampler.py"],
    "lora.py": ["test_lora.py", "test_sampler.py"],
    "sampler.py": ["test_sampler.py", "test_kernels.py"],
    "ops/head.py": ["test_logprob.py", "test_kernels.py"],
    "ops/packed.py": ["test_logprob.py", "test_sampler.py"],
    "ops/sample.py": ["test_sampler.py", "test_kernels.py"],
    "ops/": ["test_sampler.py", "test_kernels.py"],
    "infra/model.py": ["test_logprob.py"],
    "infra/memory.py": ["test_memory.py"],
    "infra/": ["test_parallel.py", "test_run.py"],
    "bridge.py": ["test_update.py", "test_loop.py"],
    "rollout.py": ["test_loop.py", "test_update.py"],
    "grading/scores.py": ["test_evaluate.py"],
    "grading/": ["test_rewards.py"],
    "rewards.py": ["test_rewards.py", "test_data.py"],
    "evaluate.py": ["test_evaluate.py"],
}

MUTANTS = [  # file, line as it is, line as it should not be
    ("grpo.py", "centred = rewards - rewards.mean(-1, keepdim=True)", "centred = rewards - rewards.mean()"),
    ("grpo.py", "rewards.std(-1, keepdim=True) + STD_EPS", "rewards.std(-1, keepdim=True, unbiased=False) + STD_EPS"),
    ("grpo.py", "torch.minimum(unclipped, clipped)", "clipped"),
    ("grpo.py", "1.0 / (n * lengths.clamp(min=1).float())", "1.0 / lengths.sum().expand(n)"),
    ("grpo.py", "torch.where(weight != 0, logp - old_logp, 0.0)", "(logp - old_logp)"),
    ("grpo.py", "d.exp() - d - 1", "d.exp() + d - 1"),
    ("grpo.py", "ratio.detach().clamp(max=cap) * advantage * logp", "ratio.clamp(max=cap) * advantage * logp"),
    ("ops/head.py", "z = logits / temperature  # [C, V]", "z = logits"),
    ("ops/head.py", "logp = logits / temperature - lse[:, None]", "logp = logits - lse[:, None]"),
    ("ops/head.py", "- g_entropy[:, None] * p * (logp + entropy[:, None])", "- 0.0"),
    ("ops/head.py", "d.scatter_add_(1, targets[:, None], g_logp[:, None])", "pass"),
    ("ops/head.py", "return (d / temperature).to(dtype)", "return d.to(dtype)"),
    ("ops/head.py", "entropy = lse - ((z - lse[:, None]).exp() * z).sum(-1)", "entropy = lse - (z.softmax(-1) * logits).sum(-1)"),
    ("ops/head.py", "larger = tl.maximum(m, tl.max(z, 0))\n        e = tl.where", "larger = tl.max(z, 0)\n        e = tl.where"),
    ("ops/head.py", "d_weight.addmm_(d_logits.float().T, hidden.float())", "d_weight.copy_(d_logits.float().T @ hidden.float())"),
    ("logprob.py", "head.project(h, W), y, temperature) for", "head.project(h, W), y, 1.0) for"),
    ("ops/head.py", "return (target.sum(1) - lse).clamp(max=0.0), lse - (total_z * shrink)", "return (target.sum(1) - lse).clamp(max=0.0), lse - (total_z)"),
    ("logprob.py", "predicts = [i >= len(p) - 1", "predicts = [i >= len(p)"),
    ("logprob.py", "rows or [IDLE], dtype", "rows, dtype"),
    ("logprob.py", "else (logp[:0], entropy[:0])", "else (logp[:0].detach(), entropy[:0].detach())"),
    ("logprob.py", "return token_logprobs(hidden, weight, targets, temperature)", "return token_logprobs(hidden, weight, targets)"),
    ("logprob.py", "if not torch.is_grad_enabled() and", "if"),
    ("logprob.py", "dtype=torch.float32) if ctx.needs_input_grad[1] else None", "dtype=torch.float32)"),
    ("logprob.py", "g_l, g_e, ctx.temperature, h.dtype", "g_l, g_l, ctx.temperature, h.dtype"),
    ("ops/head.py", "s = s * shrink + tl.sum(e, 0)", "s = s + tl.sum(e, 0)"),
    ("ops/head.py", "sz = sz * shrink + tl.sum(e * z, 0)", "sz = sz * shrink + tl.sum(e, 0)"),
    ("ops/head.py", "row = tl.program_id(0).to(tl.int64)  # row", "row = tl.program_id(0)  # row"),
    ("ops/head.py", "((column == y).to(tl.float32) - p)", "(-p)"),
    ("ops/head.py", "z = tl.where((word < V)[None, :], z * inverse_temperature, -1e30)", "z = z * inverse_temperature"),
    ("ops/head.py", "height = tl.minimum(token_tiles - band * GROUP, GROUP)", "height = GROUP"),
    ("ops/head.py", "cell = token.to(tl.int64) * word_tiles + word_tile", "cell = token.to(tl.int64) + word_tile"),
    ("ops/head.py", "return (target.sum(1) - lse).clamp(max=0.0)", "return target.sum(1) - m[:, 0]"),
    ("ops/decoder.py", "scale=a.scaling", "scale=1.0"),
    ("ops/decoder.py", "self._arrange(copied.to(device))", "self._arrange(copied.to(device, dtype))"),
    ("ops/decoder.py", "to(device, dtype, copy=True)", "to(device, dtype)"),
    ("ops/decoder.py", "self._compare_with_transformers(2e-5, first)", "pass"),
    ("ops/decoder.py", "p.data = part", "pass"),
    ("ops/decoder.py", "x += linear.bias", "pass"),
    ("ops/decoder.py", "sin[..., : self.head_dim // 2] *= -1", "pass"),
    ("ops/decode.py", "kv.view(-1, d)[cells] = qkv[:, heads:]", "kv.view(-1, d)[cells[:1]] = qkv[:1, heads:]"),
    ("ops/decode.py", "x1, x2 = x1 * c - x2 * s, x2 * c + x1 * s", "x1, x2 = x1 * c - x2 * s, x2 * c - x1 * s"),
    ("ops/decode.py", "(head >= HEADS).to(tl.int32) * D", "0 * D"),
    ("ops/decode.py", "gate * tl.sigmoid(gate) * up", "tl.sigmoid(gate) * up"),
    ("ops/decode.py", "share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK", "share = length // SPLITS"),
    ("ops/decode.py", "cached = sequence * slot_stride + kv_head * D", "cached = sequence * slot_stride"),
    ("ops/decode.py", "sv = sv * shrink[:, None]", "sv = sv"),
    ("ops/decode.py", "tl.where(empty, -1e30, m + tl.log", "tl.where(empty, 0.0, m + tl.log"),
    ("ops/decode.py", "weight = weight / tl.sum(weight, 0)", "weight = weight"),
    ("ops/packed.py", "(x[0].transpose(0, 1).to(value.dtype) for", "(x[0].transpose(0, 1) for"),
    ("ops/packed.py", "inputs_embeds=embedded.to(dtype or embedded.dtype)", "inputs_embeds=embedded"),
    ("infra/model.py", "layer.training = i < count", "layer.training = True"),
    ("ops/packed.py", "is_causal=True", "is_causal=False"),
    ("ops/packed.py", "sliding_window < max_seqlen)", "sliding_window < 0)"),
    ("ops/packed.py", "torch.arange(int(lengths.sum())) - (ends - lengths).repeat_interleave(lengths)", "torch.arange(int(lengths.sum()))"),
    ("lora.py", "self.lora_B, self.lora_A, alpha=self.scale)", "self.lora_B, self.lora_A)"),
    ("lora.py", "torch.zeros(linear.out_features, rank", "torch.ones(linear.out_features, rank"),
    ("lora.py", "A, B = w[f\"{name}.lora_A.weight\"], w[f\"{name}.lora_B.weight\"]", "A, B = (nn.Parameter(w[f\"{name}.lora_{x}.weight\"].data) for x in \"AB\")"),
    ("lora.py", "target[name].copy_(full_tensor(parameter))", "pass"),
    ("lora.py", "return scale * math.sqrt", "return math.sqrt"),
    ("lora.py", 'target[f"{name}.weight"].copy_(module.merged_weight())', 'target[f"{name}.weight"].add_(0)'),
    ("sampler.py", "default_rng(key)", "default_rng(key[1:])"),
    ("sampler.py", "x[hole] = x[last]", "pass"),
    ("sampler.py", "kv[:, :, hole] = kv[:, :, last]", "pass"),
    ("sampler.py", "num_generated += active", "num_generated += 1"),
    ("sampler.py", "self.sample_index[remaining:n], self.num_generated[remaining:n] = len(self.u) - 1, self.u.shape[1] - 1", "pass"),
    ("sampler.py", "active *= ~(self.is_stop[sampled] | (num_generated >= K))", "active *= ~self.is_stop[sampled]"),
    ("ops/sample.py", "outside = likelier.sum(-1, keepdim=True) >= top_p", "outside = likelier.sum(-1, keepdim=True) > 1.0"),
    ("ops/sample.py", "- (cdf.gather(1, token) - mass)) / mass)", "- cdf.gather(1, token)) / mass)"),
    ("ops/sample.py", "s = s * tl.exp(m - larger)", "s = s"),
    ("ops/sample.py", "(before + block > mark) | last", "last"),
    ("ops/sample.py", "total, ceiling, undecided = likelier, threshold, True", "total, ceiling, undecided = s, threshold, True"),
    ("ops/sample.py", "token = tl.where(largest > m, start + where, token)", "token = tl.where(largest > m, where, token)"),
    ("sampler.py", "first = n + G * torch.arange(len(admitted), device", "first = n + torch.arange(len(admitted), device"),
    ("sampler.py", "position += active", "position += 1"),
    ("sampler.py", "if not b.logp_sum.isfinite():", "if False:"),
    ("sampler.py", "tokens[-1] in self.stop else", "len(tokens) < ids.shape[1] - 1 else"),
    ("sampler.py", "remaining -= 1", "pass"),
    ("sampler.py", "group[:, :, :, 1:] = group[:, :, :, :1]", "pass"),
    ("ops/sample.py", "right=True", "right=False"),
    ("rewards.py", "if not boxes or unfinished > boxes[-1][1]:", "if not boxes:"),
    ("rewards.py", "(text if text.strip() else thought)", "response"),
    ("rewards.py", " in boxes if text[a:b].strip()]", " in boxes]"),
    ("rewards.py", "extracted[:MAX_ANSWER], reason", "extracted, reason"),
    ("rewards.py", "compare(extracted, answer, tolerance or 0.0, unit or \"\")", "compare(extracted, answer)"),
    ("rewards.py", "if not is_gold(answer):", "if False:"),
    ("rewards.py", "lines[-1]", "lines[0]"),
    ("rewards.py", "if not callable(function):", "if False:"),
    ("rewards.py", " and math.isfinite(value)", ""),
    ("grading/answers.py", "unmatched.pop(index)", "pass"),
    ("grading/answers.py", "\"unevaluated\" in answer.value.flags - gold.value.flags", "False"),
    ("grading/answers.py", "if len(units) == 2 and", "if False and"),
    ("grading/answers.py", "return answer == gold if answer.isalpha() and gold.isalpha() else None", "return None"),
    ("grading/answers.py", "or first is None or abs(first) >= 1:", "or abs(first) >= 1:"),
    ("grading/answers.py", "or first is None or abs(first) >= 1:", "or True:"),
    ("grading/answers.py", "lower[signs[0]] + upper[signs[1]]", "\"()\""),
    ("grading/answers.py", "return False, \"bad_gold\"", "return True, \"equal\""),
    ("grading/answers.py", "tolerance, canonical_unit(normalise(unit)))", "tolerance)"),
    ("grading/answers.py", "return zeros and crossed", "return crossed"),
    ("grading/answers.py", "gold_value, tolerance, canonical", "gold_value, 0.0, canonical"),
    ("grading/expression.py", "return a.exact == b.exact", "return close(a.points[0], b.points[0])"),
    ("grading/expression.py", "all(close(r, ratios[0]) for r in ratios)", "True"),
    ("grading/expression.py", "if self.depth > MAX_DEPTH:", "if False:"),
    ("grading/expression.py", "if self.work > self.budget:", "if False:"),
    ("grading/expression.py", "if bits > MAX_BITS:", "if False:"),
    ("grading/expression.py", "indices += NEGATIVE if", "indices += () if"),
    ("grading/expression.py", "INTEGER if \"rounded\" in a.flags & b.flags else", "INTEGER if False else"),
    ("grading/expression.py", "return self.apply(operator.neg, self.raised(self.apply(abs, a), inverse))", "return self.raised(a, inverse)"),
    ("grading/expression.py", "(argument[\"letter\"] or value in \"fghFGHIPVQuvy\")", "argument[\"letter\"]"),
    ("grading/notation.py", "if not 0 < numerator < denominator:", "if False:"),
    ("grading/scores.py", "np.clip(s - c - i, 0, None) / (s - i)", "(s - c + 0 * i) / s"),
    ("grading/scores.py", "sorted(problems)]", "problems]"),
    ("grading/scores.py", "np.abs(null / len(differences)) >= abs(observed)", "null / len(differences) >= observed"),
    ("grading/scores.py", "if header[\"data\"] != first_header[\"data\"]:", "if False:"),
    ("evaluate.py", "share = slice(parallel.rank(), None, parallel.world_size())", "share = slice(None)"),
    ("evaluate.py", "zlib.crc32(group.encode()), i) for i in ids]", "0, n) for n, i in enumerate(ids)]"),
    ("infra/parallel.py", "all_reduce(t, async_op=True) for t in tensors", "all_reduce(t, async_op=True) for t in [*tensors][:1]"),
    ("infra/parallel.py", "[range(share.stop, share.stop)] * (max(all_gather([len(ranges)])) - len(ranges))", "[]"),
    ("infra/parallel.py", "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)"),
    ("infra/parallel.py", "and not isinstance(p.grad, DTensor)", "and True"),
    ("infra/parallel.py", "dist.PrefixStore(f\"attempt {attempt}\", store)", "store"),
    ("infra/parallel.py", "return attempt > 1 or any(all_gather([restarted]))", "return restarted"),
    ("infra/checkpoint.py", "if name in ALLOWED.get(module, ()):", "if True:"),
    ("infra/checkpoint.py", "if int((path / \"checksum\").read_text()) != _checksum(path):", "if False:"),
    ("infra/checkpoint.py", "if (broken := archive.testzip()) is not None:", "if (broken := None) is not None:"),
    ("infra/checkpoint.py", "self.thread_count = 1  # the thread count", "pass  # the thread count"),
    ("infra/memory.py", "8 * size + 4 * tensors", "8 * size"),
    ("infra/memory.py", 'kept["reference"] = 4 *', 'kept["reference"] = 2 *'),
    ("infra/memory.py", "[method.sft, method.rl, method.shadow].count(True)", "1"),
    ("infra/memory.py", "adapted = [out + into for", "adapted = [max(out, into) for"),
    ("infra/memory.py", "m.layers * 2 * slots *", "m.layers * slots *"),
    ("infra/memory.py", "(b * m.q if padded else 0)", "0"),
    ("infra/memory.py", "+ b * 4 * m.mlp", "+ b * 3 * m.mlp"),
    ("infra/memory.py", "2 * (4 + 2) + 5 * 2) * m.hidden", "2 * (4 + 2) + 2 * 2) * m.hidden"),
    ("infra/memory.py", "2 * b * R * H + cast + d_weight + logits", "2 * b * R * H + cast + logits"),
    ("infra/memory.py", "m.layers, 4\n", "m.layers, 2\n"),
    ("infra/memory.py", "tokens / slots + s.max_new_tokens - response", "tokens / slots"),
    ("bridge.py", "return [(1 - s.lam, s.lam)]", "return [(s.lam, 1 - s.lam)]"),
    ("bridge.py", "sharded else copy.deepcopy", "sharded else share_storage_copy"),
    ("bridge.py", "p.grad.mul_(lam)", "p.grad.mul_(1.0)"),
    ("bridge.py", "sft_pass(m.policy, demonstrations, mu, s)", "sft_pass(m.policy, demonstrations, 1.0, s)"),
    ("bridge.py", "sft_pass(m.policy, demon", "sft_pass(m.shadow or m.policy, demon"),
    ("bridge.py", "p.grad = sft + lam * (rl - rl_hat)", "p.grad = sft + lam * (rl + rl_hat)"),
    ("bridge.py", "p.grad = sft + lam * (rl - rl_hat)", "p.grad = sft + rl - rl_hat"),
    ("bridge.py", "g_rl_hat = take_gradients(m.w)", "take_gradients(m.w)"),
    ("bridge.py", "        p.grad = None\n", "        pass\n"),
    ("bridge.py", "tokens_hat = rl_pass(m.shadow,", "tokens_hat = rl_pass(m.policy,"),
    ("bridge.py", "rl_pass(m.shadow, rollouts_hat, m.reference", "rl_pass(m.shadow, rollouts_hat, None"),
    ("bridge.py", "s.shadow_ratio_cap if shared else None", "None"),
    ("bridge.py", 'rollouts.old_logp = tokens["logp"]', "pass"),
    ("bridge.py", "loss = -logp.sum() / count", "loss = -logp.mean()"),
    ("bridge.py", "logp, entropy = response_logprobs(model, rows, s.temperature, dtype)", "logp, entropy = response_logprobs(model, rows, 1.0, dtype)"),
    ("bridge.py", "response_logprobs(reference, rows, s.temperature, dtype)[0]", "response_logprobs(reference, rows, 2.0, dtype)[0]"),
    ("bridge.py", '"w": (w, s.beta)', '"w": (w, s.alpha)'),
    ("bridge.py", "clip_grads_with_norm_(parameters, s.grad_clip, norm)", "clip_grads_with_norm_(parameters, 1e9, norm)"),
    ("bridge.py", "optimizer.state.clear()", "pass"),
    ("bridge.py", "in plan * s.updates_per_rollout:", "in plan:"),
    ("bridge.py", "env.sampler.refresh(model)", "env.sampler.refresh(run.m.policy)"),
    ("rollout.py", "advantage=advantage.flatten()", "advantage=advantage.T.flatten()"),
    ("rollout.py", "env.sampler.refresh(shadow)", "env.sampler.refresh(policy)"),
    ("rollout.py", "key=lambda group: not group.has_signal", "key=lambda group: group.has_signal"),
    ("rollout.py", 'c.finish_reason == "stop" or not s.overlong_mask', 'c.finish_reason == "stop" or s.overlong_mask'),
    ("rollout.py", "reward_hat = (weight * reward).mean()", "reward_hat = reward.mean()"),
    ("rollout.py", "key=lambda group: group.draw)", "key=lambda group: 0)"),
    ("rollout.py", "keys = [(s.seed, step, draw) for draw, _ in draws]", "keys = [(s.seed, draw) for draw, _ in draws]"),
    ("bridge.py", "    parallel.all_reduce(gradients)\n", "    pass\n"),
    ("bridge.py", "    parallel.all_reduce([nll])\n", "    pass\n"),
    ("infra/run.py", "max(parallel.all_gather([self.requested or 0]))", "self.requested or 0"),
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
            concerned = next(names for start, names in TESTS.items() if file.startswith(start))
            if re.search(r"parallel\.|stop\.", line):  # only tests with several ranks fail
                concerned = TESTS["infra/"]
            tests = [f"tests/{name}" for name in concerned]
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "--tb=no", "-p", "no:cacheprovider", *tests]
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
