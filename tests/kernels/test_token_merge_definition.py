"""What matching, merging and unmerging are: the published steps, the identities, the corners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import plain_token_merge as plain
import pytest
import torch
from guarded import Guarded

import vitkernels
from vitkernels import MergePlan, ops
from vitkernels.core.operator import REGISTRY

MODES = ("wavg", "sum", "mean", "amax")
PROTECTED = [(False, False), (True, False), (False, True), (True, True)]
each_protection = pytest.mark.parametrize(("class_token", "distill_token"), PROTECTED)
has_cpu = "cpu" in REGISTRY["bipartite_match"].backends and "cpu" in REGISTRY["token_merge"].backends
each_backend = pytest.mark.parametrize("backend", ["reference", *(["cpu"] if has_cpu else [])])


def plan_of(rows: list[list[int]], merged_tokens: int) -> MergePlan:
    return MergePlan.from_rows(torch.tensor(rows), merged_tokens)


@each_backend
def test_worked_values(backend: str) -> None:
    """Tokens 0 and 2 point along 1's direction exactly and nearly, 4 along 3's; 5 is nobody's."""
    metric = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [1.0, 0.5], [0.0, 1.0], [0.1, 1.0], [-1.0, -1.0]]])
    plan = ops.bipartite_match(metric, 2, backend=backend)
    assert plan.src.tolist() == [[0, 4]]
    assert plan.dst.tolist() == [[1, 3]]
    assert plan.unm.tolist() == [[2]]
    assert plan.rows.tolist() == [[1, 1, 0, 2, 2, 3]]
    assert plan.starts.tolist() == [[0, 1, 3, 5, 6]]
    assert plan.members.tolist() == [[2, 0, 1, 3, 4, 5]]
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]])
    size = torch.tensor([[1.0, 3.0, 2.0, 1.0, 1.0, 5.0]])
    want = {"wavg": [3, 7 / 4, 4.5, 6], "sum": [3, 3, 9, 6], "mean": [3, 1.5, 4.5, 6], "amax": [3, 2, 5, 6]}
    for mode, values in want.items():
        y, sizes = ops.token_merge(x, plan, size=size, mode=mode, backend=backend)
        torch.testing.assert_close(y.flatten(), torch.tensor(values, dtype=torch.float32))
        assert sizes.tolist() == [[2, 4, 2, 5]]
    back = ops.token_unmerge(y, plan, backend=backend)
    assert back.flatten().tolist() == [2, 2, 3, 5, 5, 6]


@each_backend
@each_protection
@pytest.mark.parametrize(("tokens", "r"), [(2, 1), (3, 1), (4, 1), (5, 9), (8, 3), (9, 4), (23, 6), (24, 99)])
def test_the_published_steps(
    tokens: int, r: int, class_token: bool, distill_token: bool, backend: str
) -> None:
    metric, x = torch.randn(3, tokens, 5), torch.randn(3, tokens, 4, dtype=torch.float64)
    size = torch.rand(3, tokens, dtype=torch.float64) + 0.5
    protection = {"class_token": class_token, "distill_token": distill_token}
    plan = ops.bipartite_match(metric, r, **protection, backend=backend)
    if plan.r == 0:
        assert (tokens - class_token - distill_token) // 2 == 0 or (distill_token and tokens == 3)
        return
    for image in range(3):
        wanted = plain.match(metric[image], r, **protection)
        got = (plan.unm[image].tolist(), plan.src[image].tolist(), plan.dst[image].tolist())
        assert got == wanted
        for mode in MODES:
            y, sizes = ops.token_merge(x, plan, size=size, mode=mode, backend=backend)
            want, total = plain.merge(x[image], size[image], wanted, tokens, mode, distill_token)
            torch.testing.assert_close(y[image], want)
            torch.testing.assert_close(sizes[image], total)


@each_backend
@each_protection
def test_a_plan_partitions_the_tokens(class_token: bool, distill_token: bool, backend: str) -> None:
    told = {"class_token": class_token, "distill_token": distill_token}
    plan = ops.bipartite_match(torch.randn(4, 37, 6), 9, **told, backend=backend)
    assert (plan.tokens, plan.merged_tokens, plan.r) == (37, 28, 9)
    for name in ("rows", "starts", "members", "src", "dst"):
        assert getattr(plan, name).dtype is torch.int32
        assert getattr(plan, name).is_contiguous()
    for image in range(4):
        starts, members = plan.starts[image].tolist(), plan.members[image].tolist()
        assert sorted(members) == list(range(37))
        assert (starts[0], starts[-1]) == (0, 37)
        for g in range(28):
            group = members[starts[g] : starts[g + 1]]
            assert group
            assert group == sorted(group)
            assert all(plan.rows[image, token] == g for token in group)
        if class_token:
            assert plan.rows[image, 0] == 0
            assert members[0] == 0
            assert starts[1] == 1
        if distill_token:
            assert plan.rows[image, 1] == 1
            assert starts[2] - starts[1] == 1
    again = MergePlan.from_rows(plan.rows, 28)
    assert all(torch.equal(getattr(again, n), getattr(plan, n)) for n in ("rows", "starts", "members"))


@each_backend
@pytest.mark.parametrize("class_token", [False, True])
def test_ties_go_to_the_lower_token(class_token: bool, backend: str) -> None:
    plan = ops.bipartite_match(torch.ones(2, 12, 3), 3, class_token=class_token, backend=backend)
    first = 2 * class_token
    assert plan.src.tolist() == [[first, first + 2, first + 4]] * 2
    assert plan.dst.tolist() == [[1, 1, 1]] * 2  # one destination receives every source
    assert plan.unm.tolist() == [[0, 8, 10] if class_token else [6, 8, 10]] * 2


@each_backend
def test_a_token_of_zeros_and_numbers_that_are_none(backend: str) -> None:
    metric = torch.randn(3, 21, 4)
    clean = ops.bipartite_match(metric, 6, class_token=True, backend=backend)
    metric[1, [3, 8]] = 0
    metric[2, 4] = float("nan")
    plan = ops.bipartite_match(metric, 6, class_token=True, backend=backend)
    assert torch.equal(plan.rows[0], clean.rows[0])
    assert 4 not in plan.src[2]
    most = ops.bipartite_match(metric, 99, class_token=True, backend=backend)
    assert most.r == 10
    assert (most.rows[:, 0] == 0).all(), "the class token outranks even what is not a number"
    y, _ = ops.token_merge(metric, plan, backend=backend)
    assert y[:2].isfinite().all()
    assert y[2].isnan().any(1).sum() == 1


@each_backend
@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_merge_is_the_identity(mode: str, backend: str) -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float16)
    for r, told in ((0, {}), (-3, {}), (5, {"class_token": True})):
        tokens = x[:, :2] if told else x
        plan = ops.bipartite_match(tokens, r, **told, backend=backend)
        y, size = ops.token_merge(tokens, plan, mode=mode, backend=backend)
        assert plan.r == 0
        assert torch.equal(y, tokens)
        assert torch.equal(size, torch.ones(tokens.shape[:2]))
        assert torch.equal(ops.token_unmerge(y, plan, backend=backend), tokens)
        assert plan.unm.tolist() == [list(range(0, tokens.shape[1], 2))] * 2
        assert plan.members.tolist() == [list(range(tokens.shape[1]))] * 2


@each_backend
def test_mass_is_conserved_through_layers(backend: str) -> None:
    x = start = torch.randn(2, 41, 5, dtype=torch.float64)
    size = constant = None
    source = torch.arange(41).repeat(2, 1)
    for _ in range(4):
        plan = ops.bipartite_match(x, 6, class_token=True, backend=backend)
        constant = torch.full_like(x, 3.0)
        kept, _ = ops.token_merge(constant, plan, size=size, backend=backend)
        torch.testing.assert_close(kept, torch.full_like(kept, 3.0))
        x, size = ops.token_merge(x, plan, size=size, backend=backend)
        source = plan.rows.gather(1, source).long()
        assert size.dtype is torch.float64
        assert (size.sum(1) == 41).all()
        torch.testing.assert_close((size.unsqueeze(2) * x).sum(1), start.sum(1))
    # the tokens that stand behind a row are as many as its size says, and their mean is the row
    members = torch.zeros(2, x.shape[1], 41, dtype=torch.float64)
    members.scatter_(1, source.unsqueeze(1), 1)
    assert torch.equal(members.sum(2), size)
    torch.testing.assert_close(members @ start / size.unsqueeze(2), x)


@each_backend
def test_gradients(backend: str) -> None:
    rows = [[2, 0, 1, 2, 3, 2, 1], [0, 0, 0, 1, 3, 2, 3]]
    plan = plan_of(rows, 4)
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    size = torch.randint(1, 198, (2, 7)).double()
    grad_y = torch.randn(2, 4, 3, dtype=torch.float64)
    index = plan.rows.long()
    spread = grad_y.gather(1, index.unsqueeze(2).expand(2, 7, 3))
    counts = (plan.starts.diff(dim=1)).double()

    def gradient(mode: str) -> torch.Tensor:
        y, sizes = ops.token_merge(x, plan, size=size, mode=mode, backend=backend)
        assert not sizes.requires_grad
        return torch.autograd.grad(y, x, grad_y)[0]

    sizes = torch.zeros(2, 4, dtype=torch.float64).scatter_add(1, index, size)
    torch.testing.assert_close(gradient("wavg"), (size / sizes.gather(1, index)).unsqueeze(2) * spread)
    torch.testing.assert_close(gradient("sum"), spread)
    torch.testing.assert_close(gradient("mean"), spread / counts.gather(1, index).unsqueeze(2))
    y = grad_y.clone().requires_grad_()
    back = ops.token_unmerge(y, plan, backend=backend)
    assert torch.equal(back, spread)
    (grad,) = torch.autograd.grad(back, y, x.detach())
    torch.testing.assert_close(grad, ops.token_merge(x, plan, mode="sum", backend=backend)[0].detach())


@each_backend
def test_equal_maxima_share_the_gradient(backend: str) -> None:
    x = torch.tensor([[[1.0], [4.0], [4.0], [2.0], [4.0]]], requires_grad=True)
    y, _ = ops.token_merge(x, plan_of([[0, 0, 0, 1, 0]], 2), mode="amax", backend=backend)
    assert y.flatten().tolist() == [4, 2]
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad.flatten(), torch.tensor([0, 1 / 3, 1 / 3, 1, 1 / 3]))


@each_backend
def test_infinite_maxima_share_the_gradient_too(backend: str) -> None:
    inf = float("inf")
    x = torch.tensor([[[1.0], [inf], [-inf], [-inf]]], requires_grad=True)
    y, _ = ops.token_merge(x, plan_of([[0, 0, 1, 1]], 2), mode="amax", backend=backend)
    assert y.flatten().tolist() == [inf, -inf]
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.flatten().tolist() == [0, 1, 0.5, 0.5]


@each_backend
def test_half_precision_is_summed_in_float32(backend: str) -> None:
    # 2049 cannot be counted to in float16. So many channels that some go through the registers by whole vectors.
    x = torch.full((1, 4000, 129), 1.0, dtype=torch.float16)
    plan = plan_of([[0] * 4000], 1)
    assert (ops.token_merge(x, plan, mode="sum", backend=backend)[0] == 4000).all()
    size = torch.full((1, 4000), 1.0)
    y, sizes = ops.token_merge(x, plan, size=size, backend=backend)
    assert (y == 1).all()
    assert (sizes.item(), sizes.dtype) == (4000, torch.float32)


def test_autocast_changes_no_plan() -> None:
    metric = torch.randn(2, 197, 64)
    want = ops.bipartite_match(metric, 16, class_token=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.bipartite_match(metric, 16, class_token=True)
    assert torch.equal(got.rows, want.rows)
    assert torch.equal(got.src, want.src)


SCHEDULES = [
    (197, [16] * 12, [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),
    (197, [13] * 12, [184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41]),
    (577, [45] * 12, [532, 487, 442, 397, 352, 307, 262, 217, 172, 127, 82, 42]),
]


@pytest.mark.parametrize(("tokens", "rs", "lengths"), SCHEDULES)
def test_lengths_of_the_published_models(tokens: int, rs: list[int], lengths: list[int]) -> None:
    x, got = torch.randn(1, tokens, 4), []
    for r in rs:
        x, _ = ops.token_merge(x, ops.bipartite_match(x, r, class_token=True))
        got.append(x.shape[1])
    assert got == lengths


@each_backend
def test_empty_batch(backend: str) -> None:
    plan = ops.bipartite_match(torch.zeros(0, 9, 4), 2, backend=backend)
    x = torch.zeros(0, 9, 5, requires_grad=True)
    y, size = ops.token_merge(x, plan, backend=backend)
    assert (y.shape, size.shape, plan.unm.shape) == ((0, 7, 5), (0, 7), (0, 3))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_compiles_as_one_graph() -> None:
    def layer(x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        plan = ops.bipartite_match(x, 3, class_token=True)
        y, size = ops.token_merge(x, plan, size=size)
        return y, size, ops.token_unmerge(y, plan)

    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for batch in (6, 2):
        x, size = torch.randn(batch, 17, 5, requires_grad=True), torch.ones(batch, 17)
        for got, want in zip(compiled(x, size), layer(x, size), strict=True):
            assert torch.equal(got, want)


BAD_MATCHES = [
    ({"metric": "text"}, TypeError, "argument `metric`: expected a tensor"),
    ({"metric": torch.zeros(2, 3)}, ValueError, "argument `metric`: expected shape"),
    ({"metric": torch.zeros(2, 3, 4).int()}, TypeError, "argument `metric`: expected dtype"),
    ({"metric": torch.zeros(2, 0, 4)}, ValueError, "argument `metric`: expected at least one token"),
    ({"metric": torch.zeros(2, 3, 0)}, ValueError, "argument `metric`: expected at least one token and one"),
    ({"r": 2.0}, TypeError, "argument `r`: expected an int"),
    ({"class_token": 1}, TypeError, "argument `class_token`: expected True or False"),
    ({"distill_token": None}, TypeError, "argument `distill_token`: expected True or False"),
    ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD_MATCHES)
def test_bad_matches(change: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        ops.bipartite_match(**{"metric": torch.randn(2, 9, 4), "r": 2, **change})
    assert message in str(error.value)
    assert "got " in str(error.value)


def test_plans_from_elsewhere() -> None:
    plan = plan_of([[1, 0, 1]], 2)
    assert (plan.src, plan.members.tolist()) == (None, [[1, 0, 2]])
    with pytest.raises(ValueError, match="tells sources from destinations"):
        _ = plan.unm
    assert MergePlan.from_rows(torch.zeros(0, 4, dtype=torch.int32), 2).starts.shape == (0, 3)
    for rows, merged, kind, message in (
        ([0, 1], 2, ValueError, "argument `rows`: expected shape"),
        ([[0, 2]], 2, ValueError, "expected rows from 0 to 1"),
        ([[0, 0]], 2, ValueError, "expected at least one token in each of the 2 rows"),
        ([[0.0, 1.0]], 2, TypeError, "expected an integer dtype"),
        ([[0, 1]], 0, ValueError, "argument `merged_tokens`: expected a positive int"),
    ):
        with pytest.raises(kind, match=message):
            plan_of(rows, merged)


def test_supported_backends_answers() -> None:
    reasons = vitkernels.supported_backends("bipartite_match", torch.randn(1, 9, 4), 2)
    assert reasons["reference"] == []
    assert vitkernels.supported_backends("bipartite_match", torch.randn(1, 9, 4), 0) == reasons


def _edits() -> dict[str, Callable[[MergePlan], MergePlan]]:
    pairs = MergePlan.from_rows(torch.tensor([[0, 0, 1, 2, 3, 3, 4, 4]] * 2), 5)
    doubled = torch.tensor([[0, 0, 2, 3, 4, 4, 6, 6]] * 2, dtype=torch.int32)
    fewer = MergePlan.from_rows(pairs.rows.clamp(max=3), 4)
    last, longer = pairs.rows.clone(), pairs.starts.clone()
    last[1, 6:], longer[1, 4] = 3, 9
    return {
        "members beyond the end": lambda p: replace(p, members=torch.full_like(p.members, 10**8)),
        "members below 0": lambda p: replace(p, members=p.members - 1),
        "one token twice": lambda p: replace(p, members=torch.zeros_like(p.members)),
        "starts beyond the end": lambda p: replace(p, starts=p.starts * 10**8),
        "falling starts": lambda p: replace(p, starts=p.starts.flip(1).contiguous()),
        "an empty row": lambda p: replace(p, starts=torch.cat([p.starts[:, :1], p.starts[:, :-1]], 1)),
        "a first token in no row": lambda p: replace(pairs, starts=pairs.starts.clamp(min=1)),
        "a last token in no row": lambda p: replace(pairs, starts=pairs.starts.clamp(max=7)),
        "one token for the other of its row": lambda p: replace(pairs, members=doubled),
        "a last row of none": lambda p: replace(
            fewer, starts=torch.cat([fewer.starts, fewer.starts[:, -1:]], 1)
        ),
        "a row of the last image beyond the end": lambda p: replace(pairs, rows=last, starts=longer),
        "other rows": lambda p: replace(p, rows=p.rows.roll(1, 1)),
        "rows beyond the end": lambda p: replace(p, rows=p.rows + 10**8),
    }


@pytest.mark.skipif(not has_cpu, reason="the compiled extension is missing")
@pytest.mark.parametrize("edit", _edits())
def test_a_plan_that_is_no_partition_reads_nothing(edit: str) -> None:
    x = torch.randn(2, 8, 4)
    plan, guarded = _edits()[edit](ops.bipartite_match(x, 3)), Guarded(walls=True)
    rows, starts, members = (
        guarded(tuple(t.shape), t.dtype).copy_(t) for t in (plan.rows, plan.starts, plan.members)
    )
    plan = MergePlan(rows, starts, members)
    for call in (lambda: ops.token_merge(x, plan), lambda: ops.token_unmerge(x[:, :5], plan)):
        with pytest.raises(
            ValueError, match="argument `plan`: expected rows, starts and members of one partition"
        ):
            call()


def test_compiled_rows_out_of_range_are_an_error() -> None:
    def unmerge(rows: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ops.token_unmerge(y, MergePlan.from_rows(rows, 4))

    compiled, rows, y = (
        torch.compile(unmerge, backend="aot_eager", fullgraph=True),
        [0, 0, 1, 1, 2, 2, 3],
        torch.randn(1, 4, 4),
    )
    good = torch.tensor([[*rows, 3]])
    assert torch.equal(compiled(good, y), unmerge(good, y))
    for last in (4, -1, 400_000_000):
        with pytest.raises(RuntimeError, match="argument `rows`"):
            compiled(torch.tensor([[*rows, last]]), y)
