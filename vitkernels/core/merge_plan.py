"""Which tokens become one: what the matching returns, and what merging and unmerging read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vitkernels.core.checks import check_dtype, check_tensor, fail


@dataclass(eq=False)
class MergePlan:
    """A partition of each image's t tokens into t' = t - r groups, one for every token of the merged sequence.

    The plan is constant: no gradient passes through it. All tensors are int32, contiguous, on one device. `from_rows`
    makes one of another matching; indices that were put together by hand and are no such partition are an error of
    the CPU kernels only: GPU kernels read where they say.

    Attributes:
        rows: [batch, t], the merged sequence's row that a token goes to.
        starts: [batch, t' + 1]; row g is made of the tokens ``members[starts[g] : starts[g + 1]]``.
        members: [batch, t], the tokens of each row in rising order, row after row.
        src: [batch, r], the tokens that merge into another, the most similar pair first; None for a plan that was
            not made by `bipartite_match`.
        dst: [batch, r], the token that each of them merges into, or None.
        class_token, distill_token: what the matching was told.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    members: torch.Tensor
    src: torch.Tensor | None = None
    dst: torch.Tensor | None = None
    class_token: bool = False
    distill_token: bool = False

    @property
    def tokens(self) -> int:
        """t, the length of the sequence before."""
        return self.rows.shape[1]

    @property
    def merged_tokens(self) -> int:
        """t', the length of the sequence after."""
        return self.starts.shape[1] - 1

    @property
    def r(self) -> int:
        """How many tokens the sequence gets shorter by; a plan with r = 0 leaves it as it is."""
        return self.tokens - self.merged_tokens

    @property
    def unm(self) -> torch.Tensor:
        """[batch, ceil(t / 2) - r]: the even tokens that stay alone, in the order of their rows."""
        if self.src is None:
            raise ValueError("only a plan made by bipartite_match tells sources from destinations")
        count = (self.tokens + 1) // 2 - self.r
        rows = torch.arange(count, device=self.rows.device)
        if self.r == 0:
            rows = 2 * rows
        elif self.distill_token:
            rows = rows + (rows > 0)
        return self.members.gather(1, self.starts[:, rows].long())

    def to(self, device: torch.device | str) -> MergePlan:
        """The plan on another device."""
        moved = {
            name: value.to(device)
            for name in ("rows", "starts", "members", "src", "dst")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | str, *told: bool) -> MergePlan:
        """The plan that merges nothing."""
        ends = torch.arange(tokens + 1, dtype=torch.int32, device=device).repeat(batch, 1)
        rows, nobody = ends[:, :-1].contiguous(), ends.new_empty((batch, 0))
        return cls(rows, ends, rows.clone(), nobody, nobody.clone(), *told)

    @classmethod
    def from_rows(cls, rows: torch.Tensor, merged_tokens: int) -> MergePlan:
        """A plan of another matching: every k-th token, random or cell-wise destinations, and the like.

        Args:
            rows: [batch, t], an integer tensor: the row, below merged_tokens, that each token goes to.
            merged_tokens: t'. Each row needs a token at least; looking for that waits for the device.

        Raises:
            TypeError: rows is not an integer tensor.
            ValueError: a row without a token, or out of range. RuntimeError in compiled graphs.
        """
        check_tensor("rows", rows, (None, None), "[batch, tokens]")
        if rows.dtype.is_floating_point or rows.dtype.is_complex or rows.dtype is torch.bool:
            fail("rows", "an integer dtype", rows, "Cast it with rows.int().", TypeError)
        if type(merged_tokens) is not int or merged_tokens < 1:
            fail("merged_tokens", "a positive int", merged_tokens)
        plan = cls(*groups(rows, merged_tokens))
        filled = plan.starts[:, 1:] > plan.starts[:, :-1]
        if torch.compiler.is_compiling():
            within = (plan.starts[:, 0] == 0) & (plan.starts[:, -1] == rows.shape[1])
            torch._assert_async(
                within.all() & filled.all(),
                "argument `rows`: expected rows below merged_tokens, each with a token.",
            )
        elif rows.numel():
            if int(rows.min()) < 0 or int(rows.max()) >= merged_tokens:
                fail("rows", f"rows from 0 to {merged_tokens - 1}", rows)
            if not bool(filled.all()):
                fail("rows", f"at least one token in each of the {merged_tokens} rows", rows)
        return plan


def groups(rows: torch.Tensor, merged_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, starts, members) of a plan, from the row of every token."""
    ordered, members = torch.sort(rows, dim=1, stable=True)
    ends = torch.arange(merged_tokens + 1, dtype=rows.dtype, device=rows.device)
    starts = torch.searchsorted(ordered, ends.expand(rows.shape[0], -1).contiguous())
    return rows.int().contiguous(), starts.int(), members.int()


def check_plan(plan: Any) -> None:
    if not isinstance(plan, MergePlan):
        fail("plan", "a MergePlan", plan, "ops.bipartite_match(metric, r) makes one.", TypeError)
    for name, value, layout in (
        ("plan.rows", plan.rows, "[batch, tokens]"),
        ("plan.starts", plan.starts, "[batch, merged tokens + 1]"),
    ):
        if not isinstance(value, torch.Tensor) or value.ndim != 2:  # the plan's r needs their second sizes
            check_tensor(name, value, (None, None), layout)


def check_groups(rows: torch.Tensor, starts: torch.Tensor, members: torch.Tensor) -> None:
    """Checks the shapes and dtypes of a plan made by hand; what the indices say only CPU kernels look at."""
    check_tensor("plan.starts", starts, (rows.shape[0], None), "[batch, merged tokens + 1]")
    if not 1 <= starts.shape[1] <= rows.shape[1] + 1:
        fail("plan.starts", f"[batch, merged tokens + 1] of at most {rows.shape[1]} merged tokens", starts)
    check_tensor("plan.members", members, tuple(rows.shape), "[batch, tokens]")
    for name, value in (("plan.rows", rows), ("plan.starts", starts), ("plan.members", members)):
        check_dtype(name, value, (torch.int32,), "MergePlan.from_rows(rows, merged_tokens) makes a plan.")
