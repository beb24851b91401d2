"""The loss against its published definition, written out with batch x K x K terms in float64."""

from __future__ import annotations

import pytest
import torch

from vitkernels import nn


def published(f, y, c_out, q, beta, x=None, c_in=None):
    f = f / f.norm(dim=1, keepdim=True)
    phi = (-beta * (f[:, None] - c_out).square().sum(2)).softmax(1)
    loss = 0.0
    if x is not None:
        x = x / x.norm(dim=1, keepdim=True)
        phi_in = (-beta * (x[:, None] - c_in).square().sum(2)).softmax(1)
        loss = (phi[:, :, None] * (phi_in * phi_in.log())[:, None]).sum((1, 2))
    return (loss - (phi * q[:, y].T.log()).sum(1)).mean()


def setting(beta: float = 1.0, samples: int = 40):
    loss = nn.InformationBottleneckLoss(6, num_clusters=9, num_classes=4, beta=beta).double()
    f, y = torch.randn(samples, 6).double(), torch.randint(4, (samples,))
    x = torch.randn(samples, 3, 2, 5).double()
    loss.set_centroids(torch.randn(9, 6), torch.randn(7, 30))
    loss.accumulate(f[:11], y[:11])
    loss.accumulate(f[11:], y[11:])
    loss.update()
    return loss, f.requires_grad_(), y, x


@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_value_and_gradient_are_those_published(beta: float) -> None:
    loss, f, y, x = setting(beta)
    c = loss.centroids
    torch.testing.assert_close(c.norm(dim=1), torch.ones(9).double())
    unit = f.detach() / f.detach().norm(dim=1, keepdim=True)
    phi = (-beta * (unit[:, None] - c).square().sum(2)).softmax(1)
    q = torch.stack([phi[y == label].mean(0) for label in range(4)], 1)
    torch.testing.assert_close(loss.log_q.exp(), q)

    want = published(f, y, c, q, beta, x.flatten(1), loss.input_centroids)
    (want_grad,) = torch.autograd.grad(want, f)
    whole, short = loss(f, y, x), loss(f, y)
    torch.testing.assert_close(whole, want)
    torch.testing.assert_close(short, published(f, y, c, q, beta))
    for value in (whole, short):
        (grad,) = torch.autograd.grad(value, f)
        torch.testing.assert_close(grad, want_grad)
        torch.testing.assert_close((grad * f).sum(1), torch.zeros(40).double(), atol=1e-15, rtol=0)


def test_the_gradient_in_closed_form() -> None:
    loss, f, y, _ = setting(3.0)
    (got,) = torch.autograd.grad(loss(f, y), f)
    norm = f.norm(dim=1, keepdim=True)
    unit, c = f / norm, loss.centroids
    phi = (6 * unit @ c.T).softmax(1)
    t = -loss.log_q[:, y].T / len(f)
    d_unit = 6 * (phi * (t - (phi * t).sum(1, keepdim=True))) @ c
    torch.testing.assert_close(got, (d_unit - unit * (unit * d_unit).sum(1, keepdim=True)) / norm)


def test_no_temporary_of_clusters_squared() -> None:
    loss = nn.InformationBottleneckLoss(8, num_clusters=300, num_classes=10)
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(o.numel() for o in (out if isinstance(out, tuple) else (out,)) if hasattr(o, "numel"))
            return out

    with Watch():
        loss(torch.randn(5, 8, requires_grad=True), torch.arange(5), None)
    assert max(seen) <= 300 * 10  # Q itself


def test_classes_never_seen_and_memberships_that_vanish() -> None:
    loss = nn.InformationBottleneckLoss(4, num_clusters=3, num_classes=3, beta=200.0)
    loss.set_centroids(torch.eye(4)[:3])
    f = torch.eye(4)[[0, 0]] + 0.01
    loss.accumulate(f, torch.tensor([1, 1]))
    loss.update()
    assert loss.log_q.isfinite().all()
    torch.testing.assert_close(loss.log_q[:, 0].exp(), torch.full((3,), 1 / 3))
    f = torch.randn(6, 4, requires_grad=True)
    value = loss(f, torch.tensor([0, 0, 0, 1, 1, 1]))
    (grad,) = torch.autograd.grad(value, f)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert grad[:3].abs().max() < 1e-5
    assert loss(torch.zeros(1, 4), torch.tensor([1])).isfinite()
    assert (loss.counts == 0).all()


def test_autocast_and_half_precision_stay_float32() -> None:
    loss, f, y, _ = setting()
    loss = loss.float()
    want = loss(f.float(), y)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(f.float(), y)
    assert torch.equal(got, want)
    assert loss(f.bfloat16(), y).dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_loss_counts_in_float32(dtype: torch.dtype) -> None:
    features, targets = torch.randn(3000, 4), torch.zeros(3000, dtype=torch.int64)
    loss = nn.InformationBottleneckLoss(4, num_clusters=3, num_classes=2).to(dtype)
    for _ in range(2):
        loss.accumulate(features.to(dtype), targets)
    assert loss.counts.tolist() == [6000, 0]
    assert abs(loss.sums[:, 0].sum() - 6000) < 1
    assert loss.centroids.dtype is dtype


def test_state_and_errors() -> None:
    loss, f, y, x = setting()
    assert set(loss.state_dict()) == {"centroids", "log_q"}
    for call, kind, message in (
        (lambda: loss(f[:, :5], y), ValueError, "argument `features`: expected shape"),
        (lambda: loss(f, y[:3]), ValueError, "argument `targets`: expected shape"),
        (lambda: loss(f, y.int()), TypeError, "argument `targets`: expected classes in int64"),
        (lambda: loss.set_centroids(torch.ones(9, 5)), ValueError, "argument `centroids`: expected shape"),
        (lambda: nn.InformationBottleneckLoss(6)(f, y, x), ValueError, "argument `images`: expected None"),
        (lambda: loss(f, y, x[:, 1:]), ValueError, "argument `images`: expected shape"),
        (lambda: loss(f, y, x[1:]), ValueError, "argument `images`: expected shape"),
        (lambda: loss(f, y, "text"), TypeError, "argument `images`: expected a tensor"),
        (lambda: nn.InformationBottleneckLoss(0), ValueError, "argument `feature_dim`: expected a positive"),
    ):
        with pytest.raises(kind, match=message):
            call()
