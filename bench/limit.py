"""How far the phases of a step of bridge.py are from what a CPU's cores can do, beside peers that take turns.

    python bench/limit.py --model FOLDER [--dtype float32] [--out FILE.jsonl] [--quick] [flags of bridge.py]
    python bench/limit.py --model FOLDER --llama-bench PROGRAM --gguf FILE ... [flags of bridge.py]

On one thread (or OMP_NUM_THREADS), with the preset smollm2 (--quick: smoke): 8 prompts x 8 samples of at most 48 tokens
(--prompts-per-step, --group-size, --max-new-tokens). A reward is the parity of a response's bytes, so nearly every
group has a gradient. No optimizer steps, so every turn has the same work.

phases
    sample    of a step: the policy's weights go to the sampler, groups are sampled and graded. Tokens: sampled ones
    decode    as many different prompts as a step has samples, with one sample each, which never ends
    rl, shadow, sft    forward and backward pass over the step's rows. Tokens: those that the layers are fed

implementations
    ours
    matmuls   the products of ours alone: the same shapes, dtype and weights in the same order, into memory that is used
              again. Matrices with the same input are one, as in the decoder. Its ms are the floor.
    transformers    decode: generate. rl, sft: one right-padded batch for each micro-batch, sdpa, the mean of the cross
              entropy over response tokens, logits from the first response on. It has no shadow.
    llama.cpp    llama-batched-bench on random prompts of the mean length, its own time without loading. It feeds random
              tokens and samples none, and decodes one step more than ours, whose prompts give the first token.

columns
    GFLOP     what has to be done: 2 per weight of a layer and token fed to it, and of the head and response token; 4
              for each query, key and channel of attention; three times as much with a backward pass. Rows without a
              gradient, tokens that sequences share and logits computed again count as not done.
    % of floor      the floor over the measured time. The head's logits are fp32 in every dtype, in the floor, too. The
              products are torch's: faster ones, as llama.cpp's in fp32, exceed 100.
    % of copy       the rate at which the weights (once per decoding step) and the keys and values must be read, over
              the rate of a long copy
    x ours    this one's time over ours
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from measure import DEVICE, GPU, Table, attempt, ceilings, parser, sizes_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import bridge
from infra import parallel
from infra.model import repository_of
from infra.run import RunFolder, Timer
from ops.decoder import Decoder
from ops.packed import Row, pack
from rollout import Group, sample_groups, sample_rollouts
from settings import Settings, parse

# ---------------------------------------------------------------------------------------------------------------------
# What has to be done


class Work(NamedTuple):
    """One forward pass, or a forward and a backward pass."""

    tokens: int  # fed to the layers
    responses: int  # rows of the head
    pairs: int  # of a query and a key that it attends to
    keys: int = 0  # in the cache, which are read or written
    passes: int = 1  # products with a matrix; 3 with a backward pass


@contextmanager
def recorded(decoder: Decoder) -> Iterator[list[Work]]:
    """Collects the work of every prefill and every decoding step."""
    works = []
    prefill = decoder.prefill
    decode = decoder.decode

    def recorded_prefill(cache, prompts: list[list[int]], *rest):
        works.append(work_of(prompts, len(prompts)))
        return prefill(cache, prompts, *rest)

    def recorded_decode(cache, ids: Tensor, position: Tensor, *rest):
        keys = int((position + 1).sum())  # a token attends to itself, too
        works.append(Work(len(ids), len(ids), keys, keys))
        return decode(cache, ids, position, *rest)

    decoder.prefill = recorded_prefill
    decoder.decode = recorded_decode
    yield works
    del decoder.prefill, decoder.decode  # the class has them, too


def work_of(sequences: list[list[int]], responses: int, passes: int = 1) -> Work:
    """The work of whole sequences with causal attention; tokens that they share are fed once."""
    positions = pack(sequences, DEVICE).positions
    pairs = int((positions + 1).sum())
    return Work(positions.numel(), responses, pairs, sum(map(len, sequences)), passes)


def work_of_pass(rows: list[Row], s: Settings, trained: list[int] | None, scored: list[int]) -> list[Work]:
    """The work of each micro-batch of the rows that a pass runs with a gradient (None: all) and without one."""
    works = []
    for chosen, passes in ((trained, 3), (scored, 1)):
        for batch, _ in parallel.batches(rows, s, chosen):
            fed = [prompt + response[:-1] for prompt, response in batch]
            # A response token of the tree is a pair of a hidden state and the token that it predicts.
            node = pack([prompt + response for prompt, response in batch], DEVICE).node
            is_response = [x for prompt, response in batch for x in [False] * len(prompt) + [True] * len(response)]
            responses = len(node[torch.tensor(is_response)].unique())
            works.append(work_of(fed, responses, passes))
    return works


def matrices(model: nn.Module) -> list[Tensor]:
    """The layers' matrices [out, in] in the order of a forward pass; those with the same input are one."""
    found = []
    for layer in model.model.layers:
        a = layer.self_attn
        mlp = layer.mlp
        for linears in ((a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)):
            found.append(torch.cat([linear.weight.detach() for linear in linears]))
    return found


def flops_and_bytes(model: nn.Module, works: list[Work]) -> tuple[int, int]:
    """(FLOPs, bytes of weights, keys and values in the model's dtype), each weight read once for a Work."""
    c = model.config
    body = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    head = model.get_output_embeddings().weight.numel()
    channels = c.num_hidden_layers * sizes_of(model)[1]  # of one head, all layers
    operations = 0
    numbers = 0
    for work in works:
        attention = 2 * channels * c.num_attention_heads * work.pairs  # queries by keys, then by values
        operations += 2 * work.passes * (body * work.tokens + head * work.responses + attention)
        numbers += body + head + 2 * channels * c.num_key_value_heads * work.keys
    return operations, numbers * model.dtype.itemsize


# ---------------------------------------------------------------------------------------------------------------------
# The floor and the peers


def matmuls(model: nn.Module, works: list[Work]) -> Callable[[], None]:
    """A function that computes the products of `works` and nothing else."""
    body = matrices(model)
    head = model.get_output_embeddings().weight.detach()
    fp32_head = head.float()
    tokens = max(work.tokens for work in works)
    responses = max(work.responses for work in works)
    widest = max(max(w.shape) for w in body)
    largest = max(tokens * widest, responses * len(head), *(w.numel() for w in [*body, head]))
    given = {dtype: torch.randn(largest).to(dtype) for dtype in {model.dtype, torch.float32}}
    results = {dtype: torch.empty_like(numbers) for dtype, numbers in given.items()}

    def take(memory: dict[torch.dtype, Tensor], w: Tensor, *shape: int) -> Tensor:
        return memory[w.dtype][: shape[0] * shape[1]].view(shape)

    def forward(n: int, w: Tensor) -> None:
        torch.mm(take(given, w, n, w.shape[1]), w.T, out=take(results, w, n, w.shape[0]))

    def backward(n: int, w: Tensor) -> None:
        gradient = take(given, w, n, w.shape[0])
        torch.mm(gradient, w, out=take(results, w, n, w.shape[1]))
        torch.mm(gradient.T, take(given, w, n, w.shape[1]), out=take(results, w, *w.shape))

    def run() -> None:
        for work in works:
            for w in body:
                forward(work.tokens, w)
            forward(work.responses, fp32_head)
            if work.passes == 3:
                backward(work.responses, head)
                for w in reversed(body):
                    backward(work.tokens, w)

    return run


def padded(rows: list[list[int]], side: str, value: int = 0) -> Tensor:  # [rows, longest]
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)


def transformers_pass(model: nn.Module, batches: list[list[Row]], dtype: torch.dtype) -> None:
    for rows in batches:
        ids = padded([prompt + response for prompt, response in rows], "right")
        mask = padded([[1] * len(prompt + response) for prompt, response in rows], "right")
        labels = padded([[-100] * len(prompt) + response for prompt, response in rows], "right", -100)  # -100: no label
        keep = ids.shape[1] - min(len(prompt) for prompt, _ in rows) + 1
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            options = dict(attention_mask=mask, labels=labels[:, -keep:], logits_to_keep=keep, use_cache=False)
            loss = model(ids, **options).loss
        loss.backward()


def transformers_generate(model: nn.Module, prompts: list[list[int]], tokens: int) -> None:
    ids = padded(prompts, "left")
    mask = padded([[1] * len(prompt) for prompt in prompts], "left")
    limits = dict(max_new_tokens=tokens, eos_token_id=model.config.vocab_size, pad_token_id=0)  # it never ends
    model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **limits)


def llama(program: Path, file: Path, prompts: list[list[int]], tokens: int) -> float:
    """Milliseconds of llama-batched-bench for as many prompts of their mean length."""
    count = len(prompts)
    length = round(sum(map(len, prompts)) / count)
    threads = torch.get_num_threads()
    numbers = f"-c {count * (length + tokens)} -npp {length} -ntg {tokens} -npl {count} -t {threads} -tb {threads}"
    command = [program, "-m", file, *numbers.split(), "--output-format", "jsonl"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (row,) = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    return 1e3 * row["t"]


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def in_turn(functions: dict[str, Callable], turns: int) -> dict[str, list[float]]:
    """Milliseconds of each one's calls, sorted, without the first of all; a function may return its own."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(1 + turns):
        for name, function in functions.items():
            start = time.perf_counter()
            own = function()
            ms = 1e3 * (time.perf_counter() - start)
            times[name].append(own if isinstance(own, float) else ms)
    return {name: sorted(calls[1:]) for name, calls in times.items()}


def phase_rows(
    table: Table,
    phase: str,
    run: bridge.Run,
    works: list[Work],
    tokens: int,
    functions: dict[str, Callable],
    turns: int,
) -> None:
    """A row for each implementation."""
    model = run.env.sampler.model
    times = in_turn(functions | {"matmuls": matmuls(model, works)}, turns)
    floor = median(times["matmuls"])
    for name, calls in times.items():
        ms = median(calls)
        done = works
        if name == "matmuls":
            done = [work._replace(pairs=0, keys=0) for work in works]
        operations, read = flops_and_bytes(model, done)
        copied = None
        if phase in ("sample", "decode"):
            copied = 100 * read / ms / 1e6 / ceilings()["copy_gbps"]
        table.add({"phase": phase, "implementation": name, "dtype": run.s.dtype, "turns": turns, "tokens": tokens,
                   "GFLOP": operations / 1e9, "ms": ms, "ms p20": calls[turns // 5], "ms p80": calls[-1 - turns // 5],
                   "GFLOP/s": operations / ms / 1e6, "floor ms": floor, "% of floor": 100 * floor / ms,
                   "tokens/s": 1e3 * tokens / ms, "% of copy": copied,
                   "x ours": ms / median(times["ours"])})  # fmt: skip


def training_rows(table: Table, run: bridge.Run, turns: int) -> None:
    s = run.s
    m = run.m
    peer = AutoModelForCausalLM.from_pretrained(repository_of(s.model)[0], dtype=torch.float32)
    rollouts, rollouts_hat = sample_rollouts(run.env, run.prompt_order, m.policy, m.shadow, 1, Timer(1))

    def pass_rows(phase: str, ours: Callable, rows: list[Row], trained: list[int] | None, scored: list[int]) -> None:
        works = work_of_pass(rows, s, trained, scored)
        functions = {"ours": ours}
        if phase != "shadow":
            batches = [batch for batch, _ in parallel.batches(rows, s, trained)]
            functions["transformers"] = partial(transformers_pass, peer, batches, getattr(torch, s.dtype))
        phase_rows(table, phase, run, works, sum(work.tokens for work in works), functions, turns)

    for phase, model, r in (("rl", m.policy, rollouts), ("shadow", m.shadow, rollouts_hat)):
        if model is not None:
            ours = partial(bridge.rl_pass, model, r, r.old_logp, m.reference, s)
            pass_rows(phase, ours, r.rows, *r.rows_to_run(has_kl=s.kl_coef > 0))
    demonstrations, _ = run.demonstrations_of_update(rollouts)
    ours = partial(bridge.sft_pass, m.policy, demonstrations, 1 - s.lam, s)
    pass_rows("sft", ours, demonstrations, None, [])


def sampling_rows(table: Table, run: bridge.Run, turns: int, program: Path | None, files: list[Path]) -> None:
    s = run.s
    env = run.env
    sampler = env.sampler
    draws = run.prompt_order.take(s.prompts_per_step)

    def sample() -> list[Group]:
        sampler.refresh(run.m.policy)
        return sample_groups(env, draws, 1)

    with recorded(sampler.decoder) as works:
        groups = sample()
    tokens = sum(len(completion.ids) for group in groups for completion in group.completions)
    phase_rows(table, "sample", run, works, tokens, {"ours": sample}, turns)

    count = s.prompts_per_step * s.group_size
    prompts = [env.encode(problem.question) for problem in env.task.problems[:count]]
    keys = [(s.seed, i) for i in range(len(prompts))]
    sampler.is_stop.zero_()
    ours = partial(sampler.generate, prompts, keys, 1, s.max_new_tokens, 1.0)
    with recorded(sampler.decoder) as works:
        tokens = sum(len(completion.ids) for (completion,) in ours())
    peer = AutoModelForCausalLM.from_pretrained(repository_of(s.model)[0], dtype=sampler.model.dtype)
    functions = {"ours": ours, "transformers": partial(transformers_generate, peer, prompts, s.max_new_tokens)}
    for file in files:
        measure = partial(llama, program, file, prompts, s.max_new_tokens)
        if attempt(f"llama.cpp, {file}", measure):
            functions[f"llama.cpp, {file.stem}"] = measure
    if not files:
        print("omitted: llama.cpp: no --gguf names a file for it")
    phase_rows(table, "decode", run, works, tokens, functions, turns)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--llama-bench", type=Path, help="the program llama-batched-bench")
    options.add_argument("--gguf", type=Path, nargs="*", default=[], help="files of the same model for it")
    args, flags = options.parse_known_args()
    if GPU:
        sys.exit("limit.py measures a CPU: hide the GPU with CUDA_VISIBLE_DEVICES=")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    ceilings()
    run = bridge.set_up(parse(["--preset", "smoke" if args.quick else "smollm2", *flags])[0], RunFolder(Path()))
    run.env.reward = lambda response, problem: float(sum(response.encode()) % 2)
    table = Table("limit", args.out)
    turns = 1 if args.quick else 9
    training_rows(table, run, turns)
    sampling_rows(table, run, turns, args.llama_bench, args.gguf)


if __name__ == "__main__":
    main()
