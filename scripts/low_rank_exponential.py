#!/usr/bin/env python3
"""The terms of csrc/strip_attention/series_cpu.h: e^(u k) ~ sum_j phi_j(u) psi_j(k), |u| <= reach, |k| <= 1.

    python scripts/low_rank_exponential.py

The first are Taylor's. Of what is left, projected on the powers from there to two beyond the terms of u and of k, the
largest singular vectors are the rest, mixed so that phi_j is u^j and one power more. Prints the coefficients and the
largest errors of each series.
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


SERIES = (Series(terms=8, taylor=2, reach=0.95), Series(terms=10, taylor=4, reach=1.6))


def find(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [power, term] of phi and of psi."""
    terms, taylor, powers, reach = series.terms, series.taylor, series.powers, series.reach
    x = np.cos((np.arange(80) + 0.5) * np.pi / 80)
    basis, triangle = np.linalg.qr(x[:, None] ** np.arange(taylor, powers))
    rest = np.exp(reach * np.outer(x, x))
    for j in range(taylor):
        rest -= np.outer((reach * x) ** j, x**j) / factorial(j)
    left, size, right = np.linalg.svd(basis.T @ rest @ basis)
    kept = terms - taylor
    phi, psi = np.eye(powers, terms), np.diag([1.0 / factorial(j) for j in range(powers)])[:, :terms]
    of_u = np.linalg.solve(triangle, left[:, :kept] * size[:kept])
    of_u /= reach ** np.arange(taylor, powers)[:, None]
    phi[taylor:, taylor:] = of_u @ np.linalg.inv(of_u[:kept])
    psi[taylor:, taylor:] = np.linalg.solve(triangle, right[:kept].T) @ of_u[:kept].T
    return phi, psi


def errors(series: Series, phi: np.ndarray, psi: np.ndarray) -> tuple[float, float]:
    """Of the function, and of its derivative by u."""
    powers = np.arange(series.powers)
    u, k = np.linspace(-series.reach, series.reach, 401), np.linspace(-1, 1, 401)
    of_k = (k[:, None] ** powers) @ psi
    slope = powers * np.where(powers > 0, u[:, None] ** np.maximum(powers - 1, 0), 0.0)
    true = np.exp(np.outer(u, k))
    function, derivative = (u[:, None] ** powers) @ phi @ of_k.T - true, slope @ phi @ of_k.T - k * true
    return abs(function).max(), abs(derivative).max()


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
        print("errors {:.1e} {:.1e}".format(*errors(series, phi, psi)))


if __name__ == "__main__":
    main()
