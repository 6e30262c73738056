"""The Frechet distance between two sets of features taken for Gaussians (D. C. Dowson and B. V. Landau, 1982).

d^2 = |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)); FID and FVD are this d^2, of unbiased covariances.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh, eigvalsh


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows of features, enough for their mean and covariance; those of two sets are those of both together.

    Attributes:
        count: rows. total: their sum, float64 [D]. products: upper half of the sum of their outer products, float64 [D (D + 1) / 2].
    """

    count: int
    total: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of features [N, D]."""
        rows = np.asarray(features, np.float64)
        return cls(len(rows), rows.sum(0), (rows.T @ rows)[np.triu_indices(rows.shape[1])])

    @classmethod
    def together(cls, parts: Iterable["Moments"]) -> "Moments":
        """Of all rows of several, at least one."""
        first, *others = parts
        count, total, products = first.count, first.total.copy(), first.products.copy()
        for part in others:
            count += part.count
            total += part.total
            products += part.products
        return cls(count, total, products)

    @property
    def mean(self) -> np.ndarray:
        """[D]."""
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, [D, D]; two rows at least."""
        size = len(self.total)
        products = np.zeros((size, size))
        products[np.triu_indices(size)] = self.products
        products += np.triu(products, 1).T
        return (products - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """d^2 of two sets; NaN if one has fewer than two rows, of which there is no covariance."""
    if min(one.count, other.count) < 2:
        return float("nan")
    first, second, apart = one.covariance, other.covariance, one.mean - other.mean
    # (C1 C2)^(1/2) has the trace of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric: exact also where both are singular.
    values, vectors = eigh(first)
    root = vectors * np.sqrt(values.clip(min=0))
    shared = np.sqrt(eigvalsh(root.T @ second @ root).clip(min=0)).sum()
    return max(0.0, float(apart @ apart + np.trace(first) + np.trace(second) - 2 * shared))
