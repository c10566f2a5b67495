"""Random numbers as functions of their keys: the laws that they must follow, and what must never move them."""

import math

import pytest
import torch
from torch import Tensor

from hfpg.ops import keyed
from hfpg.ops.keyed import GumbelMax, gumbel_max, key, mix, permutation, row_keys, uniforms
from hfpg.ops.logprobs import chosen_logprobs, entropy, sampling_logits


def chi2_is_plausible(counts: Tensor, expected: Tensor) -> bool:
    """Whether Pearson's χ² lies below its 0.9999 quantile (Wilson–Hilferty approximation)."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    k = len(counts) - 1
    return statistic < k * (1 - 2 / (9 * k) + 3.72 * math.sqrt(2 / (9 * k))) ** 3


def draw(logits: Tensor, draws: int, seed: int = 0) -> Tensor:
    """`draws` tokens from one row of logits, with sample ids 0, 1, 2, …"""
    chunks = torch.arange(draws).split(10_000)
    return torch.cat([gumbel_max(logits.expand(len(c), -1), row_keys(seed, "test", c)) for c in chunks])


def unmixed(y: int) -> int:
    """The x with mix(x) = y: every step of the finalizer is a bijection of 64-bit words."""
    word = (1 << 64) - 1

    def unshift(z: int, n: int) -> int:
        x = z
        for _ in range(64 // n):
            x = z ^ (x >> n)
        return x

    z = unshift(y & word, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & word
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & word
    return (unshift(z, 30) - 0x9E3779B97F4A7C15) & word


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def test_the_same_key_gives_the_same_numbers():
    assert key(42, "minibatch", 3, 1) == key(42, "minibatch", 3, 1)
    ids = torch.tensor([5, 9])
    assert torch.equal(uniforms(row_keys(1, "a", ids), 7), uniforms(row_keys(1, "a", ids), 7))
    assert torch.equal(permutation(50, 1, "p", 2), permutation(50, 1, "p", 2))


def test_numbers_are_pinned_across_versions_and_machines():
    """SplitMix64 seeded with 0 and 1234567: the published first outputs; a resumed run needs exactly these."""
    assert [w % (1 << 64) for w in mix(torch.tensor([0, 1234567])).tolist()] == [
        16294208416658607535,
        6457827717110365317,
    ]


def test_seed_purpose_and_counters_all_matter():
    uses = [(1, "a"), (2, "a"), (1, "b"), (1, "a", 0), (1, "a", 1), (1, "a", 0, 0), (1, "a", 0, 1), (1, "a", 1, 0)]
    assert len({key(*use) for use in uses}) == len(uses)
    # counters are separated: 1, 23 is not 12, 3
    assert key(0, "a", 1, 23) != key(0, "a", 12, 3)
    ids = torch.arange(1000)
    keys = torch.cat([row_keys(s, p, ids) for s, p in [(0, "a"), (1, "a"), (0, "b")]])
    assert len(keys.unique()) == 3000


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(row_keys(0, "u", torch.arange(2000)), 50)
    assert u.dtype == torch.float64 and len(u.flatten().unique()) == u.numel()
    assert u.min() > 0 and u.max() < 1
    counts = torch.histc(u.flatten().float(), 64, 0, 1)
    assert chi2_is_plausible(counts, torch.full((64,), u.numel() / 64))
    # between neighbours in a row, and between neighbouring keys (consecutive sample ids)
    for left, right in [(u[:, :-1], u[:, 1:]), (u[:-1], u[1:])]:
        r = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
        assert abs(float(r)) < 4 / math.sqrt(left.numel())


@pytest.mark.parametrize("bits", [0, (1 << 64) - 1])
def test_the_extreme_hashes_stay_inside_the_open_interval(bits: int):
    """u = 1 would be Gumbel noise of +∞, which draws a token outside the support; u = 0 noise of −∞."""
    first = mix(torch.tensor([1])).item() % (1 << 64)
    chosen = torch.tensor([signed(unmixed(bits) ^ first)])
    u = uniforms(chosen, 1).item()
    assert 0 < u < 1


def test_a_permutation_holds_every_number_once_and_differs_by_epoch():
    for n in (1, 2, 7, 500):
        assert sorted(permutation(n, 0, "p", 3).tolist()) == list(range(n))
    epochs = {tuple(permutation(20, 0, "p", e).tolist()) for e in range(30)}
    assert len(epochs) == 30


def test_every_order_of_a_permutation_is_equally_likely():
    orders: dict[tuple[int, ...], int] = {}
    for epoch in range(2400):
        order = tuple(permutation(4, 7, "p", epoch).tolist())
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 24
    assert chi2_is_plausible(torch.tensor([*orders.values()]).float(), torch.full((24,), 100.0))


@pytest.mark.parametrize("vocabulary", [2, 13, 30])
def test_gumbel_max_draws_from_the_softmax(vocabulary: int):
    """V that is no square has a last block with −inf filling; a whole block and single tokens are excluded."""
    g = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(1, vocabulary, generator=g)
    if vocabulary > 2:
        logits[0, 3:9] = -math.inf
    draws = 200_000
    counts = torch.bincount(draw(logits, draws), minlength=vocabulary).float()
    p = logits[0].softmax(0)
    assert len(counts) == vocabulary and not counts[p == 0].any()
    assert chi2_is_plausible(counts[p > 0], draws * p[p > 0])


def test_a_vocabulary_of_one_token_and_a_single_possible_token():
    assert draw(torch.zeros(1, 1), 5).tolist() == [0] * 5
    only = torch.full((1, 10), -math.inf)
    only[0, 9] = -3.0
    assert draw(only, 50).tolist() == [9] * 50


def test_positions_of_the_same_sample_are_independent():
    """Two draws by different purposes (positions) from three tokens: all nine pairs, as often as they should be."""
    logits, ids = torch.zeros(1, 3).expand(20_000, 3), torch.arange(20_000)
    first, second = (gumbel_max(logits, row_keys(0, f"position {t}", ids)) for t in (0, 1))
    counts = torch.bincount(3 * first + second, minlength=9).float()
    assert chi2_is_plausible(counts, torch.full((9,), 20_000 / 9))


def test_a_row_does_not_depend_on_the_other_rows():
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(40, 21, generator=g), torch.arange(40) * 7
    together = gumbel_max(logits, row_keys(3, "s", ids))
    order = torch.randperm(40, generator=g)
    assert torch.equal(gumbel_max(logits[order], row_keys(3, "s", ids[order])), together[order])
    alone = torch.cat([gumbel_max(logits[i : i + 1], row_keys(3, "s", ids[i : i + 1])) for i in range(40)])
    assert torch.equal(alone, together)


def test_a_constant_added_to_the_logits_changes_no_draw():
    logits = torch.linspace(-2, 2, 30)[None]
    assert torch.equal(draw(logits, 5000), draw(logits + 64, 5000))


def test_rounding_differences_in_the_logits_change_no_draw():
    """Half of the vocabulary up by 1e-6, half down. An inverse CDF moves every boundary in between (measured below);
    Gumbel-max changes a token only where two noisy logits tie to that precision."""
    g = torch.Generator().manual_seed(1)
    vocabulary, draws = 400, 100_000
    logits = torch.randn(1, vocabulary, generator=g)
    half = torch.cat([torch.full((vocabulary // 2,), 1e-6), torch.full((vocabulary // 2,), -1e-6)])
    assert torch.equal(draw(logits, draws), draw(logits + half, draws))

    u = uniforms(row_keys(0, "cdf", torch.arange(draws)), 1)[:, 0]
    before, after = (torch.searchsorted(z.double().softmax(-1)[0].cumsum(0), u) for z in (logits, logits + half))
    assert (before != after).sum() > 3


def some_logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Random logits in which every other row has holes of −inf, a whole block among them."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=g)
    holes = torch.rand(rows, vocabulary, generator=g) < 0.5
    holes[:, : vocabulary // 3] = True
    holes[:, -1] = False
    holes[::2] = False
    return logits.masked_fill(holes, -math.inf)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 13, 64, 1000, 8192])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fast_sampler_draws_the_same_tokens(vocabulary: int, temperature: float, dtype: torch.dtype):
    """Token for token those of `gumbel_max`, with the log-probabilities and entropy of the plain formulas."""
    rows = 400 if vocabulary > 1000 else 3000
    raw, keys = some_logits(rows, vocabulary).to(dtype), row_keys(5, "s", torch.arange(rows))
    logits = sampling_logits(raw, temperature)
    drawn = GumbelMax(raw)(raw, keys, temperature)
    assert torch.equal(drawn.tokens, gumbel_max(logits, keys))
    assert logits.gather(1, drawn.tokens[:, None]).isfinite().all()
    exact, atol = sampling_logits(raw.double(), temperature), 5e-6 if dtype == torch.float32 else 1e-12
    assert drawn.logprobs.dtype == drawn.entropy.dtype == dtype
    assert (drawn.logprobs - chosen_logprobs(exact, drawn.tokens)).abs().max() < atol
    assert (drawn.entropy - entropy(exact)).abs().max() < atol


def test_the_fast_sampler_is_greedy_when_asked():
    raw = some_logits(50, 37)
    drawn = GumbelMax(raw)(raw, torch.zeros(50, dtype=torch.long), greedy=True)
    assert torch.equal(drawn.tokens, raw.argmax(1))
    torch.testing.assert_close(drawn.logprobs, chosen_logprobs(raw, drawn.tokens))


def test_the_fast_sampler_is_used_again_in_any_size_and_leaves_the_logits_alone(monkeypatch: pytest.MonkeyPatch):
    """Buffers hold what earlier calls left, and rows go through in chunks: neither moves a token."""
    monkeypatch.setattr(keyed, "CPU_CHUNK", 7 * 49)
    sampler = GumbelMax(some_logits(30, 41))
    assert sampler.rows == 7
    for seed, rows in enumerate((30, 3, 29, 1, 14)):
        raw, keys = some_logits(rows, 41, seed), row_keys(seed, "s", torch.arange(rows))
        before = raw.clone()
        assert torch.equal(sampler(raw, keys).tokens, gumbel_max(raw, keys))
        assert torch.equal(raw, before)


def test_the_fast_sampler_computes_half_precision_in_fp32():
    raw, keys = some_logits(500, 90).bfloat16(), row_keys(1, "s", torch.arange(500))
    drawn = GumbelMax(raw)(raw, keys, 0.9)
    assert drawn.logprobs.dtype == torch.float32
    assert torch.equal(drawn.tokens, gumbel_max(sampling_logits(raw, 0.9), keys))


@pytest.mark.parametrize("vocabulary", [2, 13, 30])
def test_the_fast_sampler_draws_from_the_softmax(vocabulary: int):
    logits, draws = some_logits(2, vocabulary)[1:], 200_000
    chunks = torch.arange(draws).split(10_000)
    sampler = GumbelMax(logits.expand(10_000, -1))
    tokens = torch.cat([sampler(logits.expand(len(c), -1), row_keys(0, "fast", c)).tokens for c in chunks])
    counts, p = torch.bincount(tokens, minlength=vocabulary).float(), logits[0].softmax(0)
    assert not counts[p == 0].any()
    assert (p > 0).sum() == 1 or chi2_is_plausible(counts[p > 0], draws * p[p > 0])
