"""Hands polyline path attention to csrc/polyline_path_attention: the CUDA kernels, or those of the CPU.

What `forward` fills, for every backend, and what `backward` reads (B, H, W, heads as in q; "accumulate" is float32,
float64 for float64 inputs; all contiguous)::

    out      [B, H, W, heads, dv]      v's dtype
    lse      [2, B, heads, H, W]       accumulate; log of the softmax denominators.
                                       whole: of scores + M, of scores + M^T; criss-cross: of the rows, of the columns
    cum      [2, B, heads, H, W]       accumulate; sums of log_decay_w along each row, and of log_decay_h down each
                                       column, up to and with the element's own, the first of a line counting as 0;
                                       rounded once: sum in float64 or compensated, in index order
    partial  [P, B, H, W, heads * dv]  v's dtype; what the backward pass would have to compute again, heads and
                                       channels laid out as in out.
                                       whole: (P1 v), the first of the two unhalved softmax outputs; the other is
                                       2 out - P1 v.   criss-cross: (A_w v, A_h v, A_h (A_w v)); A_w (A_h v) likewise.
                                       The CPU saves none of those, nor that of a small whole map: with all keys
                                       in cache, computing them again takes less. `saved_products` counts them.

The mask, with i, r rows, j, l columns, and by the order of the indices alone (never |.|, never clamped)::

    T_i[j, l]    = Cw[i, max(j, l)] - Cw[i, min(j, l)]        Cw = cum[0], row i
    h_ir[l]      = Ch[max(i, r), l] - Ch[min(i, r), l]        Ch = cum[1], column l
    M[(i, j), (r, l)]   = T_i[j, l] + h_ir[l]       criss-cross: A_w = softmax(q k^T scale + T_i) in row i,
    M^T[(i, j), (r, l)] = T_r[j, l] + h_ir[j]                    A_h = softmax(q k^T scale + h_ir[j]) in column j

`backward` fills grad_q, grad_k, grad_v, grad_log_decay_w, grad_log_decay_h in the dtype and with the strides of the
tensors given (those of `torch.empty_like(input)`); any may be None. With R[p, t] = dT[p, t] + dT[t, p] for a table of
a row (or column), dC[p] = sum_{t<p} R[p, t] - sum_{t>p} R[p, t], and grad_log_decay is the suffix sum of dC (this
element and all later ones of the row or column). Element 0 never influences anything, so its gradient is exactly 0:
it is written as 0, not summed. Sums are in fixed order, without atomics. Gradients of lse, cum and partial are
ignored: the public function does not return them.

A backend that declares `skips_by_products` gets None for lse, cum and partial when nothing requires a gradient.
"""

from __future__ import annotations

from types import ModuleType

import torch

from vitkernels.core import native


def forward(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    cum: torch.Tensor | None,
    partial: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay_w: torch.Tensor,
    log_decay_h: torch.Tensor,
    criss_cross: bool,
    scale: float,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills out, and the by-products that are not None. `module` and `cuda` let the tests run the CUDA kernels on
    the host."""
    module = module or native.load()
    run = (
        module.polyline_path_attention_forward_cuda
        if (q.is_cuda if cuda is None else cuda)
        else module.polyline_path_attention_forward_cpu
    )
    q, k, v = native.dense(q, k, v)
    tensors = native.arguments(module, out, lse, cum, partial, q, k, v, log_decay_w, log_decay_h)
    run(*native.place(q), *tensors, criss_cross, scale)


def backward(
    grad_q: torch.Tensor | None,
    grad_k: torch.Tensor | None,
    grad_v: torch.Tensor | None,
    grad_log_decay_w: torch.Tensor | None,
    grad_log_decay_h: torch.Tensor | None,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_cum: torch.Tensor | None,
    grad_partial: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    cum: torch.Tensor,
    partial: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay_w: torch.Tensor,
    log_decay_h: torch.Tensor,
    criss_cross: bool,
    scale: float,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the gradients that are not None."""
    wanted = (grad_q, grad_k, grad_v)
    if grad_out is None:
        for grad in (*wanted, grad_log_decay_w, grad_log_decay_h):
            if grad is not None:
                grad.zero_()
        return
    module = module or native.load()
    filled = native.writable(*wanted)  # a gradient lies as its input does
    grad_out, q, k, v = native.dense(grad_out, q, k, v)
    tensors = native.arguments(
        module,
        *(*filled, grad_log_decay_w, grad_log_decay_h, grad_out, out, lse, cum, partial),
        *(q, k, v, log_decay_w, log_decay_h),
    )
    workspace = None
    if q.is_cuda if cuda is None else cuda:
        run = module.polyline_path_attention_backward_cuda
        size = module.polyline_path_attention_workspace_cuda(*tensors, criss_cross, scale)
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    else:
        run = module.polyline_path_attention_backward_cpu
    address = 0 if workspace is None else workspace.data_ptr()
    run(*native.place(q), address, *tensors, criss_cross, scale)
    native.deliver(wanted, filled)
