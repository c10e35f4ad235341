"""The experts that the tokens of a step are expected to choose, on average and on the busiest chip.

Every token is taken to choose its X of E experts uniformly and independently of other tokens; a
trained router is somewhat less even. A step ends with its slowest chip, so where experts are split
over chips these are expected maxima over chips, not averages.
"""

import functools
import math

import jax

from mixtral_jax.kernels import Kernels
from mixtral_jax.weight import INT4_DTYPES

# A step reads all experts and sorts no tokens from this expected share on: sorting them takes an
# accelerator some microseconds in each layer, and so does reading a twentieth of the experts.
_NEARLY_ALL = 0.95


def chosen_share(tokens: int, experts: int, chosen: int) -> float:
    """Expected share of E experts that at least one of the tokens chooses: 1 - (1 - X/E)^T."""
    return 1.0 - (1.0 - chosen / experts) ** tokens


def computes_every_expert(
    tokens: int,
    gathered: int,
    experts: int,
    chosen: int,
    weight: jax.Array | jax.ShapeDtypeStruct,
    kernels: Kernels,
) -> bool:
    """Says whether a step takes the dense form: every expert computes every token.

    Args:
        tokens: places for tokens in one group of sequences, of which the share follows, because
            other groups may have none.
        gathered: those whose experts a device computes, of all groups that it serves.
        experts: E, of one layer, on all devices.
        chosen: X, experts that a token chooses.
        weight: one of the matrices [E O I] that the device holds, or its shape.
        kernels: of the device.

    Of 8 experts of which a token chooses 2, 11 tokens choose 0.958 and 10 tokens 0.944. Weights
    that the grouped product reads without any rows are read anyway. int4 weights, which the dense
    form widens in memory, take the grouped product wherever it reads them as they lie.
    """
    if gathered > kernels.max_dense_tokens:
        return False
    shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    reads_all = kernels.expert_reads([0] * shape.shape[0], gathered * chosen, shape) > 0
    is_int4 = weight.dtype in INT4_DTYPES
    return reads_all or (not is_int4 and chosen_share(tokens, experts, chosen) >= _NEARLY_ALL)


@functools.cache
def distinct_experts(tokens: int, experts: int, chosen: int) -> tuple[float, ...]:
    """Probabilities that `tokens` tokens choose 0, 1, ... E different experts; [E + 1].

    A token that chooses X of E experts, when u experts were chosen before it, adds j new ones with
    the hypergeometric probability C(E - u, j) C(u, X - j) / C(E, X).
    """
    probabilities = [1.0] + [0.0] * experts
    for _ in range(tokens):
        if probabilities[experts] > 1 - 1e-12:
            break
        following = [0.0] * (experts + 1)
        for used, probability in enumerate(probabilities):
            for new in range(min(chosen, experts - used) + 1):
                ways = math.comb(experts - used, new) * math.comb(used, chosen - new)
                following[used + new] += probability * ways / math.comb(experts, chosen)
        probabilities = following
    return tuple(probabilities)


@functools.cache
def busiest_experts(tokens: int, experts: int, chosen: int, chips: int, replicas: int) -> float:
    """Expected number of experts that the chip with the most chosen experts reads in one step.

    Args:
        tokens: tokens whose choices one group of chips serves.
        experts: E, of one layer.
        chosen: X, experts that a token chooses.
        chips: chips over which the experts of a group are split evenly.
        replicas: groups of chips with the same experts and other tokens.

    The computation is exact. By symmetry each set of u experts is equally likely, so the share of
    sets with at most m experts on every chip is a coefficient of a polynomial, which
    `_sets_with_at_most` computes, over C(E, u). The expectation of a maximum is the sum over m of
    the probability that it exceeds m.
    """
    held = experts // chips
    probabilities = distinct_experts(tokens, experts, chosen)
    expected = 0.0
    for limit in range(held):
        sets = _sets_with_at_most(limit, held, chips)
        at_most = sum(
            probability * sets[used] / math.comb(experts, used)
            for used, probability in enumerate(probabilities)
            if used < len(sets)
        )
        expected += 1 - at_most**replicas
    return expected


def _sets_with_at_most(limit: int, held: int, chips: int) -> list[int]:
    """Numbers of sets of 0, 1, ... experts of which every chip holds at most `limit`.

    They are the coefficients of (sum over j <= limit of C(held, j) z^j) ** chips.
    """
    factor = [math.comb(held, count) for count in range(limit + 1)]
    product = [1]
    for _ in range(chips):
        longer = [0] * (len(product) + limit)
        for i, a in enumerate(product):
            for j, b in enumerate(factor):
                longer[i + j] += a * b
        product = longer
    return product


def busiest_pairs(tokens: int, experts: int, chosen: int, chips: int, replicas: int) -> float:
    """Expected number of (token, expert) pairs that the chip with the most of them computes.

    The arguments are those of `busiest_experts`. The pairs of a chip are taken as normally
    distributed with the mean and the variance of a sum of hypergeometric draws, and chips as
    independent; the result is never more than every token choosing this chip's experts only.
    """
    held, count = experts // chips, chips * replicas
    share = held / experts
    mean = tokens * chosen * share
    if count == 1 or experts == 1:
        return mean
    variance = mean * (1 - share) * (experts - chosen) / (experts - 1)
    highest = mean + math.sqrt(variance) * _highest_normal(count)
    return min(highest, float(tokens * min(chosen, held)))


@functools.cache
def _highest_normal(count: int) -> float:
    """Expected maximum of `count` independent standard normal numbers, by numeric integration.

    E[max] is the integral of (1 - F(x)^n) over x > 0 minus that of F(x)^n over x < 0.
    """
    step = 1 / 256
    total = 0.0
    for i in range(-8 * 256, 8 * 256):
        x = (i + 0.5) * step
        below = (0.5 * (1 + math.erf(x / math.sqrt(2)))) ** count
        total += step * ((1 - below) if x > 0 else -below)
    return total
