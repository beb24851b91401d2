#!/usr/bin/env python3
"""The terms of csrc/strip_attention/series_cpu.h: e^(u k) ~ sum_j phi_j(u) psi_j(k), |u| <= reach, |k| <= 1.

    python scripts/low_rank_exponential.py

The first are Taylor's. Of what is left, projected on the powers from there to two beyond the terms of u and of k, the
largest singular vectors are the rest, mixed so that phi_j is u^j and one power more. They are those of the values and,
by a weight, of the derivatives together: those of the values alone err three times as much in the derivatives, of which
the gradients are made. Prints the coefficients and the largest errors of each series.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import factorial

import numpy as np


@dataclass(frozen=True)
class Series:
    terms: int
    taylor: int
    reach: float

    @property
    def powers(self) -> int:
        return self.terms + 2


SERIES = (Series(terms=8, taylor=2, reach=1.05), Series(terms=10, taylor=4, reach=1.8))
SLOPE_WEIGHT = 0.1  # of about this weight the largest error of a slope is least


def taylor_sum(y: np.ndarray, terms: int) -> np.ndarray:
    return sum((y**j / factorial(j) for j in range(terms)), np.zeros_like(y))


def find(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [power, term] of phi and of psi."""
    terms, taylor, powers, reach = series.terms, series.taylor, series.powers, series.reach
    x = np.cos((np.arange(80) + 0.5) * np.pi / 80)
    exponents = np.arange(taylor, powers)
    value, slope = x[:, None] ** exponents, exponents * x[:, None] ** (exponents - 1)
    basis, triangle = np.linalg.qr(np.vstack((value, SLOPE_WEIGHT * slope)))
    # The function and its derivatives on the grid [u, k], u = reach x: less the Taylor terms, which with all of the
    # others are a series in y = reach x k.
    y = reach * np.outer(x, x)
    rest, by_y, by_y_twice = (np.exp(y) - taylor_sum(y, taylor - i) for i in range(3))
    by_u, by_k = reach * x * by_y, reach * x[:, None] * by_y
    both = reach * by_y + reach * y * by_y_twice
    rest = np.block([[rest, SLOPE_WEIGHT * by_k], [SLOPE_WEIGHT * by_u, SLOPE_WEIGHT**2 * both]])
    left, size, right = np.linalg.svd(basis.T @ rest @ basis)
    kept = terms - taylor
    phi, psi = np.eye(powers, terms), np.diag([1.0 / factorial(j) for j in range(powers)])[:, :terms]
    of_u = np.linalg.solve(triangle, left[:, :kept] * size[:kept])
    of_u /= reach ** np.arange(taylor, powers)[:, None]
    phi[taylor:, taylor:] = of_u @ np.linalg.inv(of_u[:kept])
    psi[taylor:, taylor:] = np.linalg.solve(triangle, right[:kept].T) @ of_u[:kept].T
    return phi, psi


def errors(series: Series, phi: np.ndarray, psi: np.ndarray) -> tuple[float, float, float]:
    """Of the function, and of its derivatives by u and by k."""
    powers = np.arange(series.powers)

    def value_and_slope(x: np.ndarray, terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slope = powers * np.where(powers > 0, x[:, None] ** np.maximum(powers - 1, 0), 0.0)
        return (x[:, None] ** powers) @ terms, slope @ terms

    u, k = np.linspace(-series.reach, series.reach, 401), np.linspace(-1, 1, 401)
    (of_u, slope_u), (of_k, slope_k) = value_and_slope(u, phi), value_and_slope(k, psi)
    true = np.exp(np.outer(u, k))
    function, by_u, by_k = (
        of_u @ of_k.T - true,
        slope_u @ of_k.T - k * true,
        of_u @ slope_k.T - u[:, None] * true,
    )
    return abs(function).max(), abs(by_u).max(), abs(by_k).max()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    for series in SERIES:
        print(series)
        phi, psi = find(series)
        print("kBeyond", *(f"{phi[series.terms + j % 2, j]:.9g}" for j in range(series.terms)))
        for j in range(series.taylor, series.terms):
            # From the first power of j's parity that Taylor's terms leave.
            print("kShape", *(f"{c:.9g}" for c in psi[series.taylor + (j - series.taylor) % 2 :: 2, j]))
        print("errors {:.1e} {:.1e} {:.1e}".format(*errors(series, phi, psi)))


if __name__ == "__main__":
    main()
