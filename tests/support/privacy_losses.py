"""What the tests of Monte Carlo accounting share: all sequences of participations, and truths."""

from __future__ import annotations

import itertools

import numpy as np
from scipy import integrate, special, stats

from jax_privacy_kernels.monte_carlo import BallsInBins, CyclicPoisson


def strategy(c, n):
    """C [n, n]."""
    lags = np.subtract.outer(np.arange(n), np.arange(n))
    padded = np.concatenate([np.asarray(c, float), np.zeros(n)])
    return np.where(lags >= 0, padded[np.maximum(lags, 0)], 0.0)


def participations(scheme):
    """Every sequence x that can occur, and its probability, step by step: at most 2^n of them."""
    n = scheme.iterations
    found = {}

    def add(x, probability):
        if probability > 0:
            found[x] = found.get(x, 0.0) + probability

    if isinstance(scheme, BallsInBins):
        for j in range(scheme.cycle_length):
            add(tuple(int(t % scheme.cycle_length == j) for t in range(n)), 1 / scheme.cycle_length)
    elif isinstance(scheme, CyclicPoisson):
        p, cycle = scheme.sampling_prob, scheme.cycle_length
        for j in range(cycle):
            turns = range(j, n, cycle)
            for taken in itertools.product([0, 1], repeat=len(turns)):
                x = np.zeros(n, int)
                x[list(turns)] = taken
                probability = np.prod([p if on else 1 - p for on in taken])
                add(tuple(x.tolist()), probability / cycle)
    else:
        p, b = scheme.sampling_prob, scheme.min_sep

        def walk(t, closed, x, probability):
            if t == n:
                add(x, probability)
            elif closed:
                walk(t + 1, closed - 1, (*x, 0), probability)
            else:
                walk(t + 1, b - 1, (*x, 1), probability * p)
                walk(t + 1, 0, (*x, 0), probability * (1 - p))

        if scheme.warm_start:
            # The stationary law of a chain of b states: open, or closed for 1 to b - 1 steps more.
            chain = np.zeros((b, b))
            chain[0, b - 1] += p
            chain[0, 0] += 1 - p
            for closed in range(1, b):
                chain[closed, closed - 1] = 1
            values, vectors = np.linalg.eig(chain.T)
            law = np.real(vectors[:, np.argmin(np.abs(values - 1))])
            for closed, probability in enumerate(law / law.sum()):
                walk(0, closed, (), probability)
        else:
            walk(0, 0, (), 1.0)
    xs, weights = np.array(list(found), float).reshape(-1, n), np.array(list(found.values()))
    assert np.isclose(weights.sum(), 1)
    return xs, weights


def modes(scheme, c):
    """C x for every x [n, x], and the probabilities [x]."""
    xs, weights = participations(scheme)
    return strategy(c, scheme.iterations) @ xs.T, weights


def loss(scheme, c, y, sigma):
    """log P(y)/Q(y) [samples] for y [n, samples], by all modes."""
    means, weights = modes(scheme, c)
    terms = (means.T @ y - (means**2).sum(axis=0)[:, None] / 2) / sigma**2
    return special.logsumexp(terms, axis=0, b=weights[:, None])


def draw(scheme, c, sigma, positive, count, rng):
    """Losses [count] of P, or of Q with its sign, from the definition."""
    means, weights = modes(scheme, c)
    y = sigma * rng.standard_normal((scheme.iterations, count))
    if positive:
        y += means[:, rng.choice(len(weights), p=weights, size=count)]
    return (1 if positive else -1) * loss(scheme, c, y, sigma)


def excess(losses, epsilon):
    return -np.expm1(np.minimum(epsilon - losses, 0))


def gaussian_delta(epsilon, sigma):
    """Of sensitivity 1, for either sign."""
    a, b = 0.5 / sigma, epsilon * sigma
    return stats.norm.cdf(a - b) - np.exp(epsilon + stats.norm.logcdf(-a - b))


def subsampled_deltas(epsilon, sigma, p):
    """Of one step of Poisson sampling, of both signs, by quadrature."""

    def density(y):
        return stats.norm.pdf(y, 0, sigma)

    def ratio(y):
        return 1 - p + p * np.exp((2 * y - 1) / (2 * sigma**2))

    with_example = lambda y: max(0, ratio(y) - np.exp(epsilon)) * density(y)  # noqa: E731
    without = lambda y: max(0, 1 - np.exp(epsilon) * ratio(y)) * density(y)  # noqa: E731
    # The kinks are where the ratio is e^epsilon and e^-epsilon.
    deltas = []
    for f, level in ((with_example, np.exp(epsilon)), (without, np.exp(-epsilon))):
        bound = (level - 1 + p) / p
        kink = 0.5 + sigma**2 * np.log(bound) if bound > 0 else -30 * sigma
        low, high = (kink, 30 * sigma + 1) if f is with_example else (-30 * sigma, kink)
        points = np.linspace(low, max(high, low), 60)
        pieces = itertools.pairwise(points)
        deltas.append(sum(integrate.quad(f, a, b, epsabs=1e-15)[0] for a, b in pieces))
    return tuple(deltas)
