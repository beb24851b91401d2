"""The information-bottleneck loss of learnable token merging, in time and memory of batch x clusters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitkernels.core.checks import check_device, check_tensor, fail


class InformationBottleneckLoss(nn.Module):
    """How far features tell their images apart beyond what their classes need; an upper bound to be minimised.

    Features f and images x belong softly to clusters, of which each has K::

        phi(i, a) = softmax_a(-beta |f_i / |f_i| - c_a|^2)       phi_in(i, b) likewise, from flattened images
        loss      = mean_i [ sum_ab phi(i, a) phi_in(i, b) log phi_in(i, b) - sum_a phi(i, a) log Q[a, y_i] ]

    Since phi sums to 1, the first term is sum_b phi_in log phi_in whatever the features are: it has no gradient, and
    is computed only if images are given. Since features and centroids are of length 1, the distances are one product
    of matrices. Nothing of batch x K x K exists. Value and gradient are those of the published definition; all of it
    is computed in float32 (float64 for float64), under autocast too, where the official code is not.

    Q is the mean membership of each class, made once an epoch: call `accumulate` with the batches, then `update`,
    which sums over all processes. A class without a sample gets the same probability in each cluster, which leaves
    its samples without a gradient; probabilities below float32's smallest number count as that. The official code's
    treatment of both is not known. That images are scaled to length 1, as features are, is our reading.

    Args:
        feature_dim: width of the features.
        num_clusters: K.
        num_classes: number of classes.
        beta: how hard the membership is.

    Paper: Efficient Visual Transformer by Learnable Token Merging (Wang and Yang, TPAMI 2025).

    Example:
        >>> loss = InformationBottleneckLoss(384, num_clusters=10, num_classes=5)
        >>> loss.set_centroids(torch.randn(10, 384))  # of a k-means over the features of an epoch
        >>> features, targets = torch.randn(8, 384), torch.randint(5, (8,))
        >>> loss.accumulate(features, targets)
        >>> loss.update()
        >>> loss(features, targets).shape
        torch.Size([])
    """

    centroids: torch.Tensor
    log_q: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor
    input_centroids: torch.Tensor | None

    def __init__(
        self, feature_dim: int, num_clusters: int = 1000, num_classes: int = 1000, beta: float = 1.0
    ) -> None:
        super().__init__()
        for name, value in (
            ("feature_dim", feature_dim),
            ("num_clusters", num_clusters),
            ("num_classes", num_classes),
        ):
            if type(value) is not int or value < 1:
                fail(name, "a positive int", value)
        self.beta = float(beta)
        centroids = torch.zeros(num_clusters, feature_dim)
        centroids[:, 0] = 1.0  # of length 1, and all the same: no gradient before the first set_centroids
        self.register_buffer("centroids", centroids)
        even = -torch.tensor(float(num_clusters)).log()
        self.register_buffer("log_q", even.repeat(num_clusters, num_classes))
        self.register_buffer("sums", torch.zeros(num_clusters, num_classes), persistent=False)
        self.register_buffer("counts", torch.zeros(num_classes), persistent=False)
        self.register_buffer("input_centroids", None, persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> InformationBottleneckLoss:
        totals = self.sums, self.counts
        super()._apply(*args, **kwargs)
        if self.counts.dtype in (torch.float16, torch.bfloat16):  # in which counts stop at 2048, or 256
            self.sums, self.counts = (total.to(self.counts.device) for total in totals)
        return self

    @torch.no_grad()
    def set_centroids(self, centroids: torch.Tensor, input_centroids: torch.Tensor | None = None) -> None:
        """Takes the centroids [K, feature_dim], and those of flattened images [K', pixels]; scales them to length 1."""
        check_tensor("centroids", centroids, tuple(self.centroids.shape), "[clusters, features]")
        self.centroids.copy_(F.normalize(centroids.to(self.centroids), dim=1))
        if input_centroids is not None:
            check_tensor("input_centroids", input_centroids, (None, None), "[clusters, pixels]")
            self.input_centroids = F.normalize(input_centroids.to(self.centroids), dim=1)

    def log_membership(self, features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        """log phi, [batch, K]."""
        with torch.autocast(features.device.type, enabled=False):
            wide = features.to(torch.promote_types(features.dtype, torch.float32))
            unit = F.normalize(wide, dim=1)
            # |f - c|^2 = 2 - 2 <f, c>, and the 2 is the same for all clusters
            logits = 2 * self.beta * F.linear(unit, centroids.to(unit.dtype))
            return logits.log_softmax(1)

    @torch.no_grad()
    def accumulate(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds a batch of the epoch to what `update` makes Q of."""
        self._check(features, targets)
        phi = self.log_membership(features, self.centroids).exp()
        self.sums.index_add_(1, targets, phi.mT.to(self.sums.dtype))
        self.counts.index_add_(0, targets, torch.ones_like(targets, dtype=self.counts.dtype))

    @torch.no_grad()
    def update(self) -> None:
        """Makes Q of all batches since the last time, of all processes of `torch.distributed`."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
            torch.distributed.all_reduce(self.counts)
        q = torch.where(self.counts > 0, self.sums / self.counts.clamp_min(1), 1 / len(self.centroids))
        self.log_q.copy_(q.clamp_min(torch.finfo(torch.float32).tiny).log())
        self.sums.zero_()
        self.counts.zero_()

    def forward(
        self, features: torch.Tensor, targets: torch.Tensor, images: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            features: [batch, feature_dim].
            targets: [batch], int64 classes.
            images: [batch, ...], what the model saw, to have the published value; the gradient needs none.

        Raises:
            TypeError: targets of another dtype, or an argument that is no tensor.
            ValueError: wrong shapes; images before `set_centroids` was given input_centroids.
        """
        self._check(features, targets)
        phi = self.log_membership(features, self.centroids).exp()
        loss = -(phi * self.log_q.to(phi.dtype)[:, targets].mT).sum(1).mean()
        if images is not None:
            if self.input_centroids is None:
                fix = "Call set_centroids(centroids, input_centroids) first."
                fail("images", "None without centroids of images", images, fix)
            assert self.input_centroids is not None
            pixels = images.flatten(1) if isinstance(images, torch.Tensor) and images.ndim > 2 else images
            wanted = (features.shape[0], self.input_centroids.shape[1])
            check_tensor("images", pixels, wanted, "[batch, pixels], flattened,")
            with torch.no_grad():
                log_phi = self.log_membership(pixels, self.input_centroids)
                constant = (log_phi.exp() * log_phi).sum(1).mean()
            loss = loss + constant
        return loss

    def _check(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        check_tensor("features", features, (None, self.centroids.shape[1]), "[batch, features]")
        check_tensor("targets", targets, (features.shape[0],), "[batch]")
        if targets.dtype is not torch.int64:
            fail("targets", "classes in int64", targets, "Cast them with targets.long().", TypeError)
        check_device("targets", targets, features.device, "features")
        check_device("features", features, self.centroids.device, "centroids")

    def extra_repr(self) -> str:
        clusters, width = self.centroids.shape
        return f"{width}, num_clusters={clusters}, num_classes={len(self.counts)}, beta={self.beta}"
