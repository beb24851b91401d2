#!/usr/bin/env python3
"""The ten terms of csrc/strip_attention/series_cpu.h: e^(u k) ~ sum_j phi_j(u) psi_j(k), |u| <= 1.6, |k| <= 1.

    python scripts/low_rank_exponential.py

The first four are Taylor's. Of what is left, projected on the powers 4 to 11 of u and of k, the six largest singular
vectors are the rest, mixed so that phi_j is u^j and one power more. Prints the coefficients and the largest errors.
"""

from __future__ import annotations

from math import factorial

import numpy as np

TERMS, TAYLOR, POWERS, REACH = 10, 4, 12, 1.6


def find() -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [power, term] of phi and of psi."""
    x = np.cos((np.arange(80) + 0.5) * np.pi / 80)
    basis, triangle = np.linalg.qr(x[:, None] ** np.arange(TAYLOR, POWERS))
    rest = np.exp(REACH * np.outer(x, x))
    for j in range(TAYLOR):
        rest -= np.outer((REACH * x) ** j, x**j) / factorial(j)
    left, size, right = np.linalg.svd(basis.T @ rest @ basis)
    kept = TERMS - TAYLOR
    phi, psi = np.eye(POWERS, TERMS), np.diag([1.0 / factorial(j) for j in range(POWERS)])[:, :TERMS]
    of_u = np.linalg.solve(triangle, left[:, :kept] * size[:kept])
    of_u /= REACH ** np.arange(TAYLOR, POWERS)[:, None]
    phi[TAYLOR:, TAYLOR:] = of_u @ np.linalg.inv(of_u[:kept])
    psi[TAYLOR:, TAYLOR:] = np.linalg.solve(triangle, right[:kept].T) @ of_u[:kept].T
    return phi, psi


def errors(phi: np.ndarray, psi: np.ndarray) -> tuple[float, float]:
    """Of the function, and of its derivative by u."""
    u, k, powers = np.linspace(-REACH, REACH, 401), np.linspace(-1, 1, 401), np.arange(POWERS)
    of_k = (k[:, None] ** powers) @ psi
    slope = powers * np.where(powers > 0, u[:, None] ** np.maximum(powers - 1, 0), 0.0)
    true = np.exp(np.outer(u, k))
    function, derivative = (u[:, None] ** powers) @ phi @ of_k.T - true, slope @ phi @ of_k.T - k * true
    return abs(function).max(), abs(derivative).max()


if __name__ == "__main__":
    phi, psi = find()
    print("kBeyond", *(f"{phi[TERMS + j % 2, j]:.9g}" for j in range(TERMS)))
    for j in range(TAYLOR, TERMS):
        print("kShape", *(f"{c:.9g}" for c in psi[TAYLOR + j % 2 :: 2, j]))
    print("errors {:.1e} {:.1e}".format(*errors(phi, psi)))
