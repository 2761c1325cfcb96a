"""sampler.py against transformers' generate, its own definition without a cache, and the trainer's log-probs."""

import itertools

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import lora
from logprob import response_logprobs
from ops import sample
from ops.decoder import share_storage_copy
from ops.packed import ModelError
from ops.sample import sample_tokens
from ops.slots import uniforms
from sampler import Sampler, generate_naive

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 3], [12, 30, 2, 2]]
KEYS = [(0, 7, i) for i in range(len(PROMPTS))]
STOP = [0]


def test_greedy_equals_transformers_generate(any_model):
    ours = Sampler(any_model, STOP).generate(PROMPTS, KEYS, 1, 16, temperature=0)
    any_model.set_attn_implementation("sdpa")
    for prompt, (completion,) in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = any_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=0, pad_token_id=0
        )
        assert theirs[0, len(prompt) :].tolist() == completion.ids


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_cached_sampling_equals_the_naive_definition_for_any_number_of_slots(temperature):
    sampler = Sampler(tiny_model(), STOP)
    samples = [(prompt, (*key, i)) for prompt, key in zip(PROMPTS, KEYS, strict=True) for i in range(2)]
    expected = [generate_naive(sampler, prompt, key, 16, temperature) for prompt, key in samples]
    for sampler.slots in (2, 3, 100):
        groups = sampler.generate(PROMPTS, KEYS, 2, 16, temperature)
        for completion, naive in zip(itertools.chain(*groups), expected, strict=True):
            assert completion.ids == naive.ids
            assert completion.finish_reason == naive.finish_reason
            assert completion.logps == pytest.approx(naive.logps, abs=1e-4)
    reasons = {naive.finish_reason for naive in expected}
    assert temperature == 0 or reasons == {"stop", "length"}, "the case must have both ways to end"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_the_sampler_equal_the_trainers_at_the_sampling_temperature(any_model, temperature):
    groups = Sampler(any_model, STOP).generate(PROMPTS, KEYS, 3, 12, temperature)
    rows = [(prompt, c.ids) for prompt, group in zip(PROMPTS, groups, strict=True) for c in group]
    logp, _ = response_logprobs(any_model, rows, temperature)
    sampled = torch.tensor([lp for group in groups for c in group for lp in c.logps])
    torch.testing.assert_close(sampled, logp, rtol=1e-4, atol=1e-4)


def test_a_sample_depends_on_its_key_and_not_on_its_neighbours():
    sampler = Sampler(tiny_model(), STOP)
    together = sampler.generate(PROMPTS, KEYS, 2, 16, 1.0)
    (alone,) = sampler.generate(PROMPTS[2:3], KEYS[2:3], 2, 16, 1.0)
    assert [c.ids for c in alone] == [c.ids for c in together[2]]
    backwards = sampler.generate(PROMPTS[::-1], KEYS[::-1], 2, 16, 1.0)[::-1]
    assert [[c.ids for c in g] for g in backwards] == [[c.ids for c in g] for g in together]
    other_step = sampler.generate(PROMPTS, [(0, 8, i) for i in range(len(PROMPTS))], 2, 16, 1.0)
    assert [[c.ids for c in g] for g in other_step] != [[c.ids for c in g] for g in together]
    other_seed = sampler.generate(PROMPTS, [(1, 7, i) for i in range(len(PROMPTS))], 2, 16, 1.0)
    assert [[c.ids for c in g] for g in other_seed] != [[c.ids for c in g] for g in together]


def test_samples_of_a_group_differ_from_one_another():
    group = Sampler(tiny_model(), STOP).generate([[1, 2]], [(0,)], 8, 8, 1.0)[0]
    assert len({tuple(c.ids) for c in group}) > 4


def test_finished_completions_end_with_the_stop_token_and_truncated_ones_have_none():
    groups = Sampler(tiny_model(), STOP).generate(PROMPTS, KEYS, 8, 12, 1.0)
    for completion in (c for group in groups for c in group):
        assert len(completion.ids) == len(completion.logps)
        if completion.finish_reason == "stop":
            assert completion.ids[-1] == 0
        else:
            assert len(completion.ids) == 12
        assert 0 not in completion.ids[:-1]


def test_a_stop_token_in_the_last_place_finishes_the_completion():
    sampler = Sampler(tiny_model(), STOP)
    finished = next(c for (c,) in sampler.generate(PROMPTS, KEYS, 1, 16, 1.0) if c.finish_reason == "stop")
    shortest = sampler.generate(PROMPTS, KEYS, 1, len(finished.ids), 1.0)
    assert finished in [c for (c,) in shortest], "the limit is the completion's own length"


def test_a_single_token_is_enough():
    groups = Sampler(tiny_model(), STOP).generate(PROMPTS, KEYS, 2, 1, 1.0)
    assert all(len(c.ids) == 1 for g in groups for c in g)


def test_sampled_frequencies_follow_the_distribution():
    """χ² of 20,000 draws is below the 99.9 % point of its degrees of freedom; no token of probability 0 is drawn."""
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    logits[3] = float("-inf")
    n, temperature = 20_000, 0.8
    u = torch.from_numpy(uniforms((1, 2, 3), n))
    tokens, logp = sample_tokens(logits.expand(n, -1), u, temperature)
    p = (logits / temperature).softmax(-1)
    observed, expected = tokens.bincount(minlength=12), n * p
    assert observed[3] == 0
    possible = p > 0
    assert ((observed - expected)[possible] ** 2 / expected[possible]).sum() < 31.3
    torch.testing.assert_close(logp, p[tokens].log())


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (0.999, 5), (1.0, 5)])
def test_top_p_samples_the_smallest_set_that_reaches_it_in_proportion(top_p, kept):
    p = torch.tensor([0.05, 0.5, 0.1, 0.3, 0.05, 0.0])  # two tokens of 0.05: a tie with the last token stays
    n = 20_000
    u = torch.from_numpy(uniforms((4, 5, 6), n))
    tokens, logp = sample_tokens(p.log().expand(n, -1), u, 1.0, top_p)
    observed = tokens.bincount(minlength=6)
    nucleus = p >= p.sort(descending=True).values[kept - 1]
    nucleus &= p > 0
    assert int(nucleus.sum()) == kept
    assert observed[~nucleus].sum() == 0
    expected = n * p[nucleus] / p[nucleus].sum()
    assert ((observed[nucleus] - expected) ** 2 / expected).sum() < 18.5  # 99.9 % point of 4 degrees of freedom
    torch.testing.assert_close(logp, p[tokens].log(), msg="log-probs refer to the whole distribution")


def test_temperature_zero_draws_the_largest_logit():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    tokens, logp = sample_tokens(logits, torch.tensor([0.0, 0.99], dtype=torch.float64), 0)
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(-1), msg="its log-prob is the one at temperature 1")


def test_extreme_uniforms_pick_the_ends_of_the_vocabulary():
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, -1)
    tokens, _ = sample_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [1, 2]


def test_tokens_whose_probability_is_lost_in_an_fp32_sum_are_drawn_from_their_place():
    logits = torch.tensor([0.0] + [-18.0] * 8)  # probabilities of 2⁻²⁶ after one near 1
    p = logits.softmax(-1).double()
    middles = (p.cumsum(-1) - p / 2) / p.sum()
    tokens, _ = sample_tokens(logits.expand(9, -1), middles, 1.0)
    assert tokens.tolist() == list(range(9))


def test_tokens_drawn_a_few_rows_at_a_time_are_those_drawn_at_once(monkeypatch):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 11, generator=g)
    u = torch.rand(7, generator=g, dtype=torch.float64)
    for top_p in (1.0, 0.7):
        at_once = sample_tokens(logits, u, 0.7, top_p)
        monkeypatch.setattr(sample, "CACHED", 2 * 11)
        torch.testing.assert_close(sample_tokens(logits, u, 0.7, top_p), at_once, rtol=0, atol=0)
        monkeypatch.undo()


def test_refresh_copies_theta_plus_the_adapter():
    policy, sampler = tiny_model(seed=1), Sampler(tiny_model(), STOP)
    w = lora.create(policy, ["q_proj", "down_proj"], 4, 0)
    for p in w.values():
        p.data = torch.randn_like(p) * 0.3
    lora.attach(policy, w, 2.0)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    sampler.refresh(policy)
    rows = [(p, c.ids) for p, (c,) in zip(PROMPTS, sampler.generate(PROMPTS, KEYS, 1, 8, 1.0), strict=True)]
    sampled = [lp for (c,) in sampler.generate(PROMPTS, KEYS, 1, 8, 1.0) for lp in c.logps]
    torch.testing.assert_close(torch.tensor(sampled), response_logprobs(policy, rows)[0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())


def tokens_fed(sampler, monkeypatch):
    """A list that grows by the number of tokens of each forward pass."""
    fed, forward = [], sampler.decoder.forward
    monkeypatch.setattr(
        sampler.decoder, "forward", lambda cache, ids, *rest: fed.append(len(ids)) or forward(cache, ids, *rest)
    )
    return fed


def test_each_prompt_runs_once_for_all_its_samples(monkeypatch):
    sampler = Sampler(tiny_model(), STOP)
    fed = tokens_fed(sampler, monkeypatch)
    sampler.generate(PROMPTS, KEYS, 8, 2, 1.0)
    assert fed[0] == sum(map(len, PROMPTS))
    assert fed[1] <= 8 * len(PROMPTS)


def test_prompts_that_begin_alike_are_fed_once_and_get_the_samples_that_they_get_alone(any_model, monkeypatch):
    prompts = [[3, 1, 2], [4], [3, 1, 2, 5], [3, 1], [3, 1, 2], [3, 6]]
    keys = [(0, 7, i) for i in range(len(prompts))]
    sampler = Sampler(any_model, STOP)
    alone = [sampler.generate([prompt], [key], 2, 8, 1.0)[0] for prompt, key in zip(prompts, keys, strict=True)]
    fed = tokens_fed(sampler, monkeypatch)
    together = sampler.generate(prompts, keys, 2, 8, 1.0)
    assert fed[0] == 6, "3 1 2 5 of the first, 4, and 6 of the last"
    assert [[c.ids for c in group] for group in together] == [[c.ids for c in group] for group in alone]


@pytest.mark.parametrize("slots", [8, 100])
def test_samples_of_a_group_with_equal_tokens_so_far_are_decoded_once(monkeypatch, slots):
    sampler = Sampler(tiny_model(), STOP, slots=slots)
    fed = tokens_fed(sampler, monkeypatch)
    groups = sampler.generate(PROMPTS, KEYS, 8, 12, 0.25)
    prefixes = [{tuple(c.ids[:n]) for c in group for n in range(1, len(c.ids))} for group in groups]
    assert sum(fed) == sum(map(len, PROMPTS)) + sum(map(len, prefixes))
    assert sum(map(len, prefixes)) < 0.9 * sum(len(c.ids) - 1 for group in groups for c in group), "the case must share"


def test_waiting_prompts_take_the_slots_of_finished_samples(monkeypatch):
    sampler = Sampler(tiny_model(), STOP, slots=4)
    fed = tokens_fed(sampler, monkeypatch)
    groups = sampler.generate(PROMPTS * 4, [(i,) for i in range(20)], 1, 16, 1.0)
    decoded = sum(len(c.ids) - 1 for g in groups for c in g)
    assert sum(fed) == decoded + 4 * sum(map(len, PROMPTS)), "no sample is decoded after its end"


@pytest.mark.parametrize(("slots", "group_size"), [(4, 1), (7, 2), (5, 3)])
def test_a_waiting_prompt_enters_as_soon_as_its_group_fits(monkeypatch, slots, group_size):
    sampler, steps = Sampler(tiny_model(), STOP, slots=slots), []
    decode = sampler.decoder.decode
    monkeypatch.setattr(sampler.decoder, "decode", lambda *a: steps.append(None) or decode(*a))
    groups = sampler.generate(PROMPTS * 4, [(i,) for i in range(20)], group_size, 16, 1.0)
    left, expected, active = [[len(c.ids) - 1 for c in group] for group in groups], 0, []  # tokens to decode
    while left or active:
        if left and len(active) + group_size <= slots:
            active += left.pop(0)
        else:
            expected += 1
            active = [tokens - 1 for tokens in active]
        active = [tokens for tokens in active if tokens > 0]
    assert len(steps) == expected


def test_prompts_that_cannot_fit_are_refused_with_their_number():
    sampler = Sampler(tiny_model(), STOP)
    with pytest.raises(ValueError, match=r"prompt 1 has 120 tokens.*lower max_new_tokens"):
        sampler.generate([[1], [1] * 120], [(0,), (1,)], 1, 16, 1.0)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        sampler.generate([[]], [(0,)], 1, 16, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_reported(bad, temperature):
    model = tiny_model()
    model.model.norm.weight.data.fill_(1.0)
    sampler = Sampler(model, STOP)
    sampler.model.model.norm.weight.fill_(bad)
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler.generate(PROMPTS, KEYS, 1, 4, temperature)


def test_biases_of_all_linears_are_added():
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    sampler = Sampler(model, STOP)
    for prompt, key, (completion,) in zip(PROMPTS, KEYS, sampler.generate(PROMPTS, KEYS, 1, 8, 1.0), strict=True):
        assert generate_naive(sampler, prompt, (*key, 0), 8, 1.0).ids == completion.ids


@pytest.mark.parametrize("tied", [True, False])
def test_a_share_storage_copy_allocates_no_parameters_and_the_samplers_copy_allocates_its_own(tied):
    model = tiny_model(tied=tied)
    other = share_storage_copy(model)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p is not q, name
        assert p.data_ptr() == q.data_ptr(), name
    assert (other.get_input_embeddings().weight is other.get_output_embeddings().weight) == tied
    copied = dict(Sampler(model, [0]).model.named_parameters())
    assert all(p.data_ptr() != copied[name].data_ptr() for name, p in model.named_parameters())


def test_a_bf16_sampler_rotates_by_fp32_frequencies():
    """bf16 frequencies have a relative error of 2⁻⁹: at position 1,000 an angle would be wrong by a radian or more."""
    exact, rounded = (Sampler(tiny_model(), STOP, dtype=dtype).decoder for dtype in (torch.float32, torch.bfloat16))
    assert rounded.lm_head.dtype == torch.bfloat16
    assert torch.equal(rounded.new_cache(1, 100).cos, exact.new_cache(1, 100).cos)


def test_weights_with_the_same_input_stay_one_matrix_when_refreshed():
    policy, decoder = tiny_model(seed=1), Sampler(tiny_model(), STOP).decoder
    before = decoder.layers[0].qkv.clone()
    lora.merge_into(decoder.model, policy)
    attention = policy.model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(decoder.layers[0].qkv, torch.cat(parts))
    assert not torch.equal(decoder.layers[0].qkv, before)


@pytest.mark.parametrize(("family", "options", "why"), [
    ("granite", dict(residual_multiplier=0.5), "differ from transformers' by"),
    ("granite", dict(logits_scaling=3.0), "differ from transformers' by"),
    ("phi3", dict(pad_token_id=0), "is not built like Llama, Qwen2 or Qwen3"),
    ("gemma", {}, "is not built like Llama, Qwen2 or Qwen3"),
    ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "rope type 'dynamic'"),
    ("llama", dict(hidden_act="gelu"), "differ from transformers' by"),
    ("smollm3", dict(pad_token_id=0), "differ from transformers' by"),  # its fourth layer has no rotation
    ("smollm3", dict(pad_token_id=0, no_rope_layers=[1, 1, 0, 1]), "differ from transformers' by"),
    ("helium", dict(head_dim=8, pad_token_id=0), "differ from transformers' by"),
    ("granite", dict(residual_multiplier=1.001), "differ from transformers' by"),
    ("granite", dict(embedding_multiplier=0.999), "differ from transformers' by"),
    ("granite", dict(logits_scaling=1.001), "differ from transformers' by"),
    ("ministral3", dict(head_dim=8, pad_token_id=0, max_position_embeddings=2**18), "differ"),  # scaled from 16,384 on
    ("cohere", dict(pad_token_id=0), "is not built like"),
    ("olmo2", dict(pad_token_id=0), "is not built like"),
    ("gemma2", dict(pad_token_id=0), "final_logit_softcapping is 30"),
    ("llama", dict(clip_qkv=8.0), "clip_qkv is 8"),
    ("llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4, partial_rotary_factor=0.5)),
     "is not built like"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_the_decoder_would_compute_wrongly_is_refused_in_every_dtype(family, options, why, dtype):
    with pytest.raises(ModelError, match=why):
        Sampler(near_llama(family, **options), STOP, dtype=dtype)


def near_llama(family, **options):
    """A tiny model with the weights of its initialisation: of these the logits hardly depend on attention."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | options)).eval()


@pytest.mark.parametrize(("family", "options"), [
    ("smollm3", dict(pad_token_id=0, no_rope_layers=[1, 1, 1, 1])), ("granite", {}), ("mistral", {}),
    ("granite", dict(attention_multiplier=0.3)), ("llama", dict(head_dim=16, attention_bias=True)),
    ("qwen2", dict(pad_token_id=36)),
    ("llama", dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16,
                                        rope_theta=1e4))),
    ("llama", dict(rope_parameters=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                        original_max_position_embeddings=32, rope_theta=1e4))),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_another_name_that_computes_the_same_is_accepted(family, options, dtype):
    model = near_llama(family, **options)
    before = {name: p.clone() for name, p in model.named_parameters()}
    sampler = Sampler(model, STOP, dtype=dtype)
    sampled = dict(sampler.model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.equal(sampled[name], p.to(dtype))


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_window_is_refused_only_where_a_sequence_is_longer(family):
    window = dict(use_sliding_window=True, max_window_layers=2) if family == "qwen2" else {}
    sampler = Sampler(near_llama(family, sliding_window=30, **window), STOP)
    sampler.generate([[1, 2, 3]], [(0,)], 1, 27, 1.0)
    with pytest.raises(ModelError, match="a window of 30 tokens for sequences of 31"):
        sampler.generate([[1, 2, 3]], [(0,)], 1, 28, 1.0)


def test_attention_with_a_window_shorter_than_the_cache_is_refused_before_sampling():
    sampler = Sampler(tiny_model(), STOP)
    sampler.model.model.layers[1].self_attn.sliding_window = 10
    with pytest.raises(ModelError, match="a window of 10 tokens"):
        sampler.generate(PROMPTS, KEYS, 1, 16, 1.0)
