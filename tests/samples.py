"""Sample calls of every operator, for the tests that all operators share. A new operator adds its own here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from vitkernels import BlockSparseTensor, MergePlan, ops


@dataclass
class Sample:
    """One call of a public function.

    Attributes:
        make: (dtype, device, batch) -> tensor arguments by name; all floating and differentiable.
        kwargs: the other arguments.
        products: whether the composition multiplies matrices, which autocast casts and FLOP counters count.
        arguments: makes the function's arguments from the tensors, where some go into an object.
        share: of the reference's FLOPs, what the operator counts.
        positional: names of arguments that the public function takes by position alone.
        bad: argument name -> bad values for it, each with a part of the message expected.
    """

    name: str
    function: Callable[..., Any]
    make: Callable[..., dict[str, torch.Tensor]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    products: bool = True
    bad: list[tuple[dict[str, Any], type[Exception], str]] = field(default_factory=list)
    arguments: Callable[[dict[str, Any]], dict[str, Any]] = dict
    share: Fraction = Fraction(1)
    positional: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        return self.function.__name__

    def tensors(
        self,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        batch: int = 2,
        requires_grad: bool = False,
    ) -> dict[str, torch.Tensor]:
        return {
            name: tensor.to(device, dtype).requires_grad_(requires_grad)
            for name, tensor in self.make(batch).items()
        }

    def __call__(self, tensors: dict[str, torch.Tensor], **kwargs: Any) -> Any:
        return self.function(**self.arguments(tensors), **{**self.kwargs, **kwargs})


def _window(heads: int, window: tuple[int, int], d: int, dv: int, entries: int | None) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tokens = window[0] * window[1]
        tensors = {name: torch.randn(batch, heads, tokens, d) for name in "qk"}
        tensors["v"] = torch.randn(batch, heads, tokens, dv)
        if entries is not None:
            tensors["bias_table"] = torch.randn(heads, entries)
        return tensors

    return make


def _neighborhood(
    sizes: tuple[int, ...], heads: int, d: int, dv: int, bias: tuple[int, ...] | None
) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {name: torch.randn(batch, *sizes, heads, d) for name in "qk"}
        tensors["v"] = torch.randn(batch, *sizes, heads, dv)
        if bias is not None:
            tensors["rpb"] = torch.randn(heads, *bias)
        return tensors

    return make


def _strip(
    heads: int, queries: int, keys: int, r: int, dv: int, bias: tuple[int, ...] | None = None
) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {
            "q": torch.randn(batch, heads, queries, r),
            "k": torch.randn(batch, heads, keys, r),
            "v": torch.randn(batch, heads, keys, dv),
        }
        if bias is not None:  # () is one of the whole shape
            tensors["attn_bias"] = torch.randn(bias or (batch, heads, queries, keys))
        return tensors

    return make


def _polyline(height: int, width: int, heads: int, d: int, dv: int) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {name: torch.randn(batch, height, width, heads, d) for name in "qk"}
        tensors["v"] = torch.randn(batch, height, width, heads, dv)
        return tensors | {f"log_decay_{axis}": -torch.rand(batch, height, width, heads) for axis in "wh"}

    return make


def _decays(height: int, width: int, heads: int, d: int | None = None) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {} if d is None else {"x": torch.randn(batch, height, width, heads, d)}
        return tensors | {f"log_decay_{axis}": -torch.rand(batch, height, width, heads) for axis in "wh"}

    return make


def _cascade(
    heads: int, d: int, key_dim: int, size: tuple[int, int], tokens: int, largest: int
) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        channels, rows = heads * d, 2 * key_dim + d
        return {
            "x": torch.randn(batch, channels, *size),
            "qkv_weight": torch.randn(heads, rows, d) * d**-0.5,
            "qkv_bias": torch.randn(heads, rows) * 0.5,
            "dw_weight": torch.randn(heads, key_dim, largest, largest) / largest,
            "dw_bias": torch.randn(heads, key_dim) * 0.5,
            "attn_bias": torch.randn(heads, tokens),
            "proj_weight": torch.randn(channels, channels) * channels**-0.5,
            "proj_bias": torch.randn(channels) * 0.5,
        }

    return make


def _ffn(channels: int, hidden: int, size: tuple[int, int], scales: bool, dw: bool) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {
            "x": torch.randn(batch, channels, *size),
            "weight1": torch.randn(hidden, channels) * channels**-0.5,
            "bias1": torch.randn(hidden),
            "weight2": torch.randn(channels, hidden) * hidden**-0.5,
            "bias2": torch.randn(channels),
        }
        if scales:
            tensors |= {"scale1": torch.randn(hidden), "scale2": torch.randn(channels)}
        if dw:
            tensors |= {"dw_weight": torch.randn(channels, 3, 3) / 3, "dw_bias": torch.randn(channels)}
        return tensors

    return make


def _kan(channels: int, grids: int, outputs: int, *leading: int) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        return {
            "x": torch.randn(batch, *leading, channels),
            "weight": torch.randn(outputs, channels * grids) / (channels * grids) ** 0.5,
            "ln_weight": 1 + 0.2 * torch.randn(channels),
            "ln_bias": 0.2 * torch.randn(channels),
            "grid": torch.linspace(-2, 2, grids) + 0.1 * torch.randn(grids),
        }

    return make


def _block_sparse(
    pattern: BlockSparseTensor, *leading: int, bias: bool = True
) -> dict[str, Callable[..., dict[str, Any]]]:
    """`make` and `arguments` of a call whose weight has the pattern."""

    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {
            "x": torch.randn(batch, *leading, pattern.shape[1]),
            "values": torch.randn(pattern.values.shape) / pattern.shape[1] ** 0.5,
        }
        # Beyond the matrix a value has no gradient, which differs from what a plain copy would give.
        tensors["values"] *= pattern.values
        return tensors | ({"bias": torch.randn(pattern.shape[0])} if bias else {})

    def arguments(tensors: dict[str, Any]) -> dict[str, Any]:
        others = {name: value for name, value in tensors.items() if name != "values"}
        return {"weight": pattern.with_values(tensors["values"])} | others

    return {"make": make, "arguments": arguments}


def _merge_plan(tensors: dict[str, Any], name: str) -> MergePlan:
    """Seven tokens into four: groups of one, two and three tokens, not in the order of the tokens."""
    x = tensors[name]
    rows = torch.tensor([2, 0, 1, 2, 3, 2, 1], dtype=torch.int32, device=x.device)
    starts = torch.tensor([0, 1, 3, 6, 7], dtype=torch.int32, device=x.device)
    members = torch.tensor([1, 2, 6, 0, 3, 5, 4], dtype=torch.int32, device=x.device)
    return MergePlan(*(t.repeat(x.shape[0], 1) for t in (rows, starts, members)))


def _wrong_plan(**changes: Any) -> MergePlan:
    """With a tensor of another dtype, or cut off along a dimension."""
    plan = _merge_plan({"x": _tokens}, "x")
    for name, change in changes.items():
        value = getattr(plan, name)
        setattr(plan, name, value.narrow(change, 0, 1) if isinstance(change, int) else value.to(change))
    return plan


def token_merge(**arguments: Any) -> torch.Tensor:
    return ops.token_merge(**arguments)[0]  # the sizes have no gradient


def _token_merge(sized: bool) -> dict[str, Callable[..., dict[str, Any]]]:
    def arguments(tensors: dict[str, Any]) -> dict[str, Any]:
        x = tensors["x"]
        size = torch.arange(1.0, 8.0, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return tensors | {
            "plan": _merge_plan(tensors, "x"),
            "size": size.repeat(x.shape[0], 1) if sized else None,
        }

    return {"make": lambda batch: {"x": torch.randn(batch, 7, 5)}, "arguments": arguments}


def _sized_attention(heads: int, queries: int, keys: int, d: int, dv: int) -> dict[str, Any]:
    def arguments(tensors: dict[str, Any]) -> dict[str, Any]:
        q = tensors["q"]
        size = torch.arange(1.0, keys + 1, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        return tensors | {"size": size.repeat(q.shape[0], 1)}

    return {"make": _strip(heads, queries, keys, d, dv), "arguments": arguments}


def learnable_token_merge(z: Any, g: Any, *, other: Any = None, **options: Any) -> Any:
    return ops.learnable_token_merge(z, g, *(() if other is None else (other,)), **options)


def _soft_merge(shared: bool, other: int | None = None) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        mask = torch.rand(7, 3) if shared else torch.rand(batch, 7, 3)
        tensors = {"z": torch.randn(batch, 7, 5), "g": 0.5 + mask}
        return tensors if other is None else tensors | {"other": torch.randn(batch, 7, other)}

    return make


def _ones(rows: int, columns: int, block: tuple[int, int], mask: list[list[int]]) -> BlockSparseTensor:
    return BlockSparseTensor.from_dense(torch.ones(rows, columns), block, torch.tensor(mask))


_edges = _ones(5, 7, (2, 3), [[1, 0, 1], [0, 0, 0], [1, 1, 0]])
_whole = _ones(8, 12, (4, 4), [[0, 1, 0], [0, 1, 1]])
_features = torch.randn(2, 3, 7)
_x = torch.randn(2, 2, 15, 8)
_pixels = torch.randn(2, 5, 3, 4)
_narrow, _wide = torch.randn(2, 2, 5, 1), torch.randn(2, 2, 5, 3)
_map = torch.randn(2, 5, 7, 2, 4)
_cells = torch.zeros(2, 3, 4, 2)
_image = torch.randn(2, 10, 4, 7)
_floats = torch.zeros
_rows = torch.randn(2, 9)
_tokens = torch.randn(2, 7, 5)

SAMPLES = [
    Sample(
        "window_attention-absolute",
        ops.window_attention,
        _window(2, (3, 5), 8, 5, 15),
        {"window": (3, 5), "bias_index": "absolute"},
        bad=[
            ({"q": "text"}, TypeError, "argument `q`: expected a tensor"),
            ({"q": _x[:, :, :14]}, ValueError, "argument `q`: expected 15 tokens"),
            ({"q": _x.int(), "k": _x.int(), "v": _x.int()}, TypeError, "argument `q`: expected dtype"),
            ({"k": _x[:1]}, ValueError, "argument `k`: expected shape"),
            ({"k": torch.randn(2, 2, 15, 8).double()}, TypeError, "argument `k`: expected dtype float32"),
            ({"v": _x[..., :0]}, ValueError, "argument `v`: expected a last dimension of at least 1"),
            ({"v": _x.to("meta")}, ValueError, "argument `v`: expected device cpu"),
            ({"bias_table": torch.zeros(2, 14)}, ValueError, "argument `bias_table`: expected shape"),
            (
                {"bias_table": torch.zeros(2, 15).half()},
                TypeError,
                "argument `bias_table`: expected dtype float32",
            ),
            (
                {"bias_index": "relative"},
                ValueError,
                "argument `bias_index`: expected 'absolute' or 'signed'",
            ),
            ({"window": (3, 0)}, ValueError, "argument `window`: expected 2 positive ints"),
            ({"window": "3x5"}, TypeError, "argument `window`: expected 2 ints"),
            ({"scale": float("nan")}, ValueError, "argument `scale`: expected a finite number"),
            ({"scale": torch.ones(1)}, TypeError, "argument `scale`: expected a number"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "window_attention-signed-lse",
        ops.window_attention,
        _window(1, (4, 4), 16, 16, 49),
        {"window": 4, "bias_index": "signed", "return_lse": True},
    ),
    Sample(
        "window_attention-no_bias", ops.window_attention, _window(2, (1, 3), 3, 7, None), {"window": (1, 3)}
    ),
    Sample(
        "neighborhood_attention-2d-rpb",
        ops.neighborhood_attention,
        _neighborhood((5, 7), 2, 4, 3, (5, 3)),
        {"kernel_size": (3, 2), "dilation": (1, 3)},
        bad=[
            ({"q": "text"}, TypeError, "argument `q`: expected a tensor"),
            ({"q": _map[:, 0, 0]}, ValueError, "argument `q`: expected a map of one or two axes"),
            ({"q": _map.int(), "k": _map.int(), "v": _map.int()}, TypeError, "argument `q`: expected dtype"),
            ({"k": _map[:, 1:]}, ValueError, "argument `k`: expected shape"),
            ({"k": _map.double()}, TypeError, "argument `k`: expected dtype float32"),
            ({"v": _map[..., :0]}, ValueError, "argument `v`: expected a last dimension of at least 1"),
            ({"v": _map.to("meta")}, ValueError, "argument `v`: expected device cpu"),
            ({"kernel_size": 3}, ValueError, "argument `kernel_size`: expected kernel_size * dilation <= 7"),
            ({"kernel_size": (3, 0)}, ValueError, "argument `kernel_size`: expected 2 positive ints"),
            ({"kernel_size": (3, 3, 3)}, TypeError, "argument `kernel_size`: expected 2 ints"),
            (
                {"dilation": (2, 1)},
                ValueError,
                "argument `kernel_size`: expected kernel_size * dilation <= 5",
            ),
            ({"dilation": 0}, ValueError, "argument `dilation`: expected 2 positive ints"),
            ({"is_causal": 1}, TypeError, "argument `is_causal`: expected a bool or 2 bools"),
            ({"is_causal": (False, True)}, ValueError, "argument `rpb`: expected None"),
            ({"rpb": torch.zeros(2, 5, 5)}, ValueError, "argument `rpb`: expected shape"),
            ({"rpb": torch.zeros(2, 5, 3).half()}, TypeError, "argument `rpb`: expected dtype float32"),
            ({"scale": float("nan")}, ValueError, "argument `scale`: expected a finite number"),
            ({"scale": torch.ones(1)}, TypeError, "argument `scale`: expected a number"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "neighborhood_attention-1d-causal-lse",
        ops.neighborhood_attention,
        _neighborhood((9,), 2, 5, 5, None),
        {"kernel_size": 4, "dilation": 2, "is_causal": True, "return_lse": True},
    ),
    Sample(
        "neighborhood_attention-dense-groups",
        ops.neighborhood_attention,
        _neighborhood((4, 9), 1, 8, 8, (3, 5)),
        {"kernel_size": (2, 3), "dilation": (2, 3), "return_lse": True},
    ),
    Sample(
        "strip_attention-one-channel",
        ops.strip_attention,
        _strip(2, 9, 5, 1, 3),
        {"scale": -0.7},
        bad=[
            ({"q": "text"}, TypeError, "argument `q`: expected a tensor"),
            ({"q": _narrow[0]}, ValueError, "argument `q`: expected shape"),
            ({"q": _narrow.int(), "k": _narrow.int(), "v": _wide.int()}, TypeError, "argument `q`: expected"),
            ({"q": _narrow[..., :0], "k": _narrow[..., :0]}, ValueError, "argument `q`: expected a last"),
            ({"k": _wide}, ValueError, "argument `k`: expected shape [batch, heads, M, r] = [2, 2, *, 1]"),
            ({"k": _narrow[:, :, :0], "v": _wide[:, :, :0]}, ValueError, "argument `k`: expected at least"),
            ({"k": _narrow.double()}, TypeError, "argument `k`: expected dtype float32"),
            ({"v": _wide[:, :, 1:]}, ValueError, "argument `v`: expected shape"),
            ({"v": _wide[..., :0]}, ValueError, "argument `v`: expected a last dimension of at least 1"),
            ({"v": _wide.to("meta")}, ValueError, "argument `v`: expected device cpu"),
            ({"attn_bias": 1.0}, TypeError, "argument `attn_bias`: expected a tensor or None"),
            ({"attn_bias": torch.zeros(9, 4)}, ValueError, "argument `attn_bias`: expected a shape that"),
            ({"attn_bias": torch.zeros(1, 1, 1, 9, 5)}, ValueError, "argument `attn_bias`: expected a shape"),
            (
                {"attn_bias": torch.zeros(9, 5).half()},
                TypeError,
                "argument `attn_bias`: expected dtype float32",
            ),
            (
                {"attn_bias": torch.zeros(9, 5, device="meta")},
                ValueError,
                "argument `attn_bias`: expected device",
            ),
            ({"scale": float("nan")}, ValueError, "argument `scale`: expected a finite number"),
            ({"scale": torch.ones(1)}, TypeError, "argument `scale`: expected a number"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "strip_attention-bias-lse",
        ops.strip_attention,
        _strip(3, 4, 7, 2, 5, ()),
        {"return_lse": True},
    ),
    Sample(
        "strip_attention-one-channel-broadcast-bias", ops.strip_attention, _strip(2, 5, 9, 1, 4, (2, 1, 9))
    ),
    Sample(
        "polyline_path_attention-whole",
        ops.polyline_path_attention,
        _polyline(5, 7, 2, 4, 3),
        bad=[
            ({"q": "text"}, TypeError, "argument `q`: expected a tensor"),
            ({"q": _map[0]}, ValueError, "argument `q`: expected shape"),
            ({"q": _map.int(), "k": _map.int(), "v": _map.int()}, TypeError, "argument `q`: expected dtype"),
            ({"k": _map[:, 1:]}, ValueError, "argument `k`: expected shape"),
            ({"k": _map.double()}, TypeError, "argument `k`: expected dtype float32"),
            ({"v": _map[..., :0]}, ValueError, "argument `v`: expected a last dimension of at least 1"),
            ({"v": _map.to("meta")}, ValueError, "argument `v`: expected device cpu"),
            ({"log_decay_w": None}, TypeError, "argument `log_decay_w`: expected a tensor"),
            ({"log_decay_w": _map[..., 0].mT}, ValueError, "argument `log_decay_w`: expected shape"),
            ({"log_decay_w": _map[..., 0].half()}, TypeError, "argument `log_decay_w`: expected dtype"),
            ({"log_decay_h": _map}, ValueError, "argument `log_decay_h`: expected shape"),
            ({"log_decay_h": _map[..., 0].double()}, TypeError, "argument `log_decay_h`: expected dtype"),
            ({"mode": "chunk"}, ValueError, "argument `mode`: expected 'whole' or 'criss_cross'"),
            ({"mode": True}, TypeError, "argument `mode`: expected 'whole' or 'criss_cross'"),
            ({"scale": float("nan")}, ValueError, "argument `scale`: expected a finite number"),
            ({"scale": torch.ones(1)}, TypeError, "argument `scale`: expected a number"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "polyline_path_attention-criss_cross",
        ops.polyline_path_attention,
        _polyline(4, 3, 2, 5, 5),
        {"mode": "criss_cross", "scale": 0.3},
    ),
    Sample(
        "polyline_path_mask",
        ops.polyline_path_mask,
        _decays(3, 4, 2),
        products=False,
        bad=[
            ({"log_decay_w": "text"}, TypeError, "argument `log_decay_w`: expected a tensor"),
            ({"log_decay_w": _map}, ValueError, "argument `log_decay_w`: expected shape"),
            ({"log_decay_w": _cells.int()}, TypeError, "argument `log_decay_w`: expected dtype"),
            ({"log_decay_h": _cells[:, 1:]}, ValueError, "argument `log_decay_h`: expected shape"),
            ({"log_decay_h": _cells.double()}, TypeError, "argument `log_decay_h`: expected dtype float32"),
            ({"log_decay_h": _cells.to("meta")}, ValueError, "argument `log_decay_h`: expected device cpu"),
            ({"log": 1}, TypeError, "argument `log`: expected True or False"),
            ({"transpose": None}, TypeError, "argument `transpose`: expected True or False"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "polyline_path_mask-transposed",
        ops.polyline_path_mask,
        _decays(5, 3, 1),
        {"log": False, "transpose": True},
        products=False,
    ),
    Sample(
        "polyline_path_scan",
        ops.polyline_path_scan,
        _decays(5, 7, 2, 4),
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": _map[0]}, ValueError, "argument `x`: expected shape"),
            ({"x": _map.int()}, TypeError, "argument `x`: expected dtype"),
            ({"log_decay_w": None}, TypeError, "argument `log_decay_w`: expected a tensor"),
            ({"log_decay_w": _map[..., 0].mT}, ValueError, "argument `log_decay_w`: expected shape"),
            ({"log_decay_w": _map[..., 0].half()}, TypeError, "argument `log_decay_w`: expected dtype"),
            ({"log_decay_h": _map}, ValueError, "argument `log_decay_h`: expected shape"),
            ({"log_decay_h": _map[..., 0].double()}, TypeError, "argument `log_decay_h`: expected dtype"),
            ({"log_decay_h": _map[..., 0].to("meta")}, ValueError, "argument `log_decay_h`: expected device"),
            ({"transpose": 1}, TypeError, "argument `transpose`: expected True or False"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample("polyline_path_scan-transposed", ops.polyline_path_scan, _decays(4, 3, 1, 9), {"transpose": True}),
    Sample(
        "cascaded_group_attention-windows",
        ops.cascaded_group_attention,
        _cascade(2, 5, 3, (4, 7), 8, 3),  # padded right to 4 x 8
        {"window_size": (2, 4), "kernel_sizes": (3, 1), "residual": True},
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": _image[0]}, ValueError, "argument `x`: expected shape"),
            ({"x": _image[:, :9]}, ValueError, "argument `x`: expected channels in a positive multiple"),
            ({"x": _image.int()}, TypeError, "argument `x`: expected dtype"),
            ({"x": _image.double()}, TypeError, "argument `qkv_weight`: expected dtype float64"),
            ({"qkv_weight": _floats(2, 11, 4)}, ValueError, "argument `qkv_weight`: expected shape"),
            ({"qkv_bias": _floats(2, 12)}, ValueError, "argument `qkv_bias`: expected shape"),
            ({"qkv_bias": _floats(2, 11).half()}, TypeError, "argument `qkv_bias`: expected dtype float32"),
            ({"dw_weight": _floats(2, 3, 2, 2)}, ValueError, "argument `dw_weight`: expected shape"),
            ({"dw_weight": _floats(2, 3, 3, 1)}, ValueError, "argument `dw_weight`: expected shape"),
            ({"dw_weight": _floats(0, 3, 3, 3)}, ValueError, "argument `dw_weight`: expected at least one"),
            ({"dw_bias": _floats(2)}, ValueError, "argument `dw_bias`: expected shape"),
            ({"attn_bias": _floats(2, 9)}, ValueError, "argument `attn_bias`: expected shape"),
            ({"attn_bias": _floats(2, 8).half()}, TypeError, "argument `attn_bias`: expected dtype float32"),
            ({"proj_weight": _floats(10, 5)}, ValueError, "argument `proj_weight`: expected shape"),
            ({"proj_bias": _floats(10).to("meta")}, ValueError, "argument `proj_bias`: expected device cpu"),
            ({"window_size": (2, 0)}, ValueError, "argument `window_size`: expected 2 positive ints"),
            ({"kernel_sizes": 3}, TypeError, "argument `kernel_sizes`: expected 2 ints"),
            ({"kernel_sizes": (3, 2)}, ValueError, "argument `kernel_sizes`: expected odd ints up to the 3"),
            ({"kernel_sizes": (3, 5)}, ValueError, "argument `kernel_sizes`: expected odd ints up to the 3"),
            ({"scale": float("inf")}, ValueError, "argument `scale`: expected a finite number"),
            ({"residual": 1}, TypeError, "argument `residual`: expected True or False"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "cascaded_group_attention-one_window",
        ops.cascaded_group_attention,
        _cascade(3, 16, 16, (4, 4), 16, 5),
        {"window_size": 4, "kernel_sizes": [5, 3, 3], "scale": 0.3},
    ),
    Sample(
        "residual_ffn-depthwise",
        ops.residual_ffn,
        _ffn(5, 7, (3, 4), True, True),
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": _pixels[0]}, ValueError, "argument `x`: expected shape"),
            ({"x": _pixels.int()}, TypeError, "argument `x`: expected dtype"),
            ({"x": _pixels.double()}, TypeError, "argument `weight1`: expected dtype float64"),
            (
                {"weight1": torch.zeros(7, 4)},
                ValueError,
                "argument `weight1`: expected shape [hidden, C] = [*, 5]",
            ),
            (
                {"weight1": torch.zeros(7, 5, 3, 3)},
                ValueError,
                "argument `weight1`: expected shape [hidden, C, 1, 1]",
            ),
            ({"weight1": torch.zeros(0, 5)}, ValueError, "argument `weight1`: expected at least one"),
            ({"weight2": torch.zeros(5, 6)}, ValueError, "argument `weight2`: expected shape"),
            ({"weight2": torch.zeros(5, 7).half()}, TypeError, "argument `weight2`: expected dtype float32"),
            ({"bias1": None}, TypeError, "argument `bias1`: expected a tensor"),
            ({"bias1": torch.zeros(7).half()}, TypeError, "argument `bias1`: expected dtype float32"),
            ({"bias2": torch.zeros(5).double()}, TypeError, "argument `bias2`: expected dtype float32"),
            ({"bias2": torch.zeros(5).to("meta")}, ValueError, "argument `bias2`: expected device cpu"),
            ({"scale1": torch.zeros(5)}, ValueError, "argument `scale1`: expected shape"),
            ({"scale2": torch.zeros(5, 1)}, ValueError, "argument `scale2`: expected shape"),
            ({"dw_weight": torch.zeros(5, 5, 5)}, ValueError, "argument `dw_weight`: expected shape"),
            ({"dw_weight": None}, ValueError, "argument `dw_weight`: expected a tensor"),
            ({"dw_bias": None}, ValueError, "argument `dw_bias`: expected a tensor"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample("residual_ffn-plain", ops.residual_ffn, _ffn(8, 4, (1, 5), False, False)),
    Sample(
        "kan_linear",
        ops.kan_linear,
        _kan(9, 8, 7),
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": torch.tensor(1.0)}, TypeError, "argument `x`: expected a tensor [..., channels]"),
            ({"x": _rows[:, :0]}, ValueError, "argument `x`: expected a last dimension of at least 1"),
            ({"x": _rows[:, :8]}, ValueError, "argument `weight`: expected shape"),
            ({"x": _rows.int()}, TypeError, "argument `x`: expected dtype"),
            ({"x": _rows.half()}, TypeError, "argument `weight`: expected dtype float16"),
            ({"weight": torch.zeros(7, 72).double()}, TypeError, "argument `weight`: expected dtype"),
            ({"weight": torch.zeros(7, 72).to("meta")}, ValueError, "argument `weight`: expected device cpu"),
            ({"weight": torch.zeros(0, 72)}, ValueError, "argument `weight`: expected a first dimension"),
            ({"ln_weight": torch.ones(8)}, ValueError, "argument `ln_weight`: expected shape"),
            ({"ln_bias": torch.zeros(9).half()}, TypeError, "argument `ln_bias`: expected dtype float32"),
            ({"grid": torch.zeros(0)}, ValueError, "argument `grid`: expected at least 1 grid point"),
            ({"grid": torch.zeros(2, 4)}, ValueError, "argument `grid`: expected shape"),
            ({"inv_denominator": 0.0}, ValueError, "argument `inv_denominator`: expected a finite number"),
            ({"inv_denominator": torch.ones(1)}, TypeError, "argument `inv_denominator`: expected a number"),
            ({"eps": float("nan")}, ValueError, "argument `eps`: expected a finite number above 0"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample("kan_linear-maps", ops.kan_linear, _kan(5, 3, 8, 1, 4), {"inv_denominator": 1.7, "eps": 1e-3}),
    Sample(
        "block_sparse_linear-gelu-edges",
        ops.block_sparse_linear,
        **_block_sparse(_edges, 3),
        kwargs={"activation": "gelu"},
        share=Fraction(4 * 6, 5 * 7),
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": torch.tensor(1.0)}, TypeError, "argument `x`: expected a tensor [..., in_features]"),
            (
                {"x": _features[..., :6]},
                ValueError,
                "argument `x`: expected shape [..., in_features] = [*, *, 7]",
            ),
            ({"x": _features.int()}, TypeError, "argument `x`: expected dtype"),
            ({"x": _features.double()}, TypeError, "argument `weight`: expected dtype float64"),
            ({"weight": torch.zeros(5, 7)}, TypeError, "argument `weight`: expected a BlockSparseTensor"),
            ({"weight": _whole}, ValueError, "argument `x`: expected shape"),
            ({"weight": _edges.to("meta")}, ValueError, "argument `weight`: expected device cpu"),
            ({"bias": "text"}, TypeError, "argument `bias`: expected a tensor"),
            ({"bias": torch.zeros(6)}, ValueError, "argument `bias`: expected shape [out_features] = [5]"),
            ({"bias": torch.zeros(5).half()}, TypeError, "argument `bias`: expected dtype float32"),
            ({"bias": torch.zeros(5).to("meta")}, ValueError, "argument `bias`: expected device cpu"),
            ({"activation": "silu"}, ValueError, "argument `activation`: expected None, 'gelu' or 'relu'"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "block_sparse_linear-relu",
        ops.block_sparse_linear,
        **_block_sparse(_whole),
        kwargs={"activation": "relu"},
        share=Fraction(3, 6),
    ),
    Sample(
        "block_sparse_linear-plain",
        ops.block_sparse_linear,
        **_block_sparse(_whole, 3, bias=False),
        share=Fraction(3, 6),
    ),
    Sample(
        "token_merge-wavg",
        token_merge,
        **_token_merge(True),
        kwargs={"mode": "wavg"},
        products=False,
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": _tokens[:, 1:]}, ValueError, "argument `x`: expected shape [batch, tokens, channels] of"),
            ({"x": _tokens.int()}, TypeError, "argument `x`: expected dtype"),
            ({"x": _tokens[..., :0]}, ValueError, "argument `x`: expected at least one channel"),
            ({"plan": _tokens}, TypeError, "argument `plan`: expected a MergePlan"),
            (
                {"plan": _wrong_plan(rows=torch.int64)},
                TypeError,
                "argument `plan.rows`: expected dtype int32",
            ),
            (
                {"plan": _wrong_plan(members=torch.float)},
                TypeError,
                "argument `plan.members`: expected dtype",
            ),
            ({"plan": _wrong_plan(members=1)}, ValueError, "argument `plan.members`: expected shape"),
            ({"plan": _wrong_plan(starts=0)}, ValueError, "argument `plan.starts`: expected shape"),
            (
                {"plan": _merge_plan({"x": _tokens.to("meta")}, "x")},
                ValueError,
                "argument `plan`: expected device cpu",
            ),
            ({"size": 1.0}, TypeError, "argument `size`: expected a tensor"),
            ({"size": torch.ones(2, 7, 1)}, ValueError, "argument `size`: expected shape"),
            ({"size": torch.ones(2, 7).half()}, TypeError, "argument `size`: expected dtype float32"),
            (
                {"size": torch.ones(2, 7, requires_grad=True)},
                ValueError,
                "argument `size`: expected a tensor without a gradient",
            ),
            ({"mode": "max"}, ValueError, "argument `mode`: expected 'wavg', 'sum', 'mean' or 'amax'"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample("token_merge-amax", token_merge, **_token_merge(False), kwargs={"mode": "amax"}, products=False),
    Sample("token_merge-sum", token_merge, **_token_merge(True), kwargs={"mode": "sum"}, products=False),
    Sample("token_merge-mean", token_merge, **_token_merge(True), kwargs={"mode": "mean"}, products=False),
    Sample(
        "token_unmerge",
        ops.token_unmerge,
        lambda batch: {"y": torch.randn(batch, 4, 5)},
        arguments=lambda tensors: tensors | {"plan": _merge_plan(tensors, "y")},
        products=False,
        bad=[
            ({"y": "text"}, TypeError, "argument `y`: expected a tensor"),
            ({"y": _tokens}, ValueError, "argument `y`: expected shape [batch, merged tokens, channels] of"),
            ({"y": _tokens[:, :4].int()}, TypeError, "argument `y`: expected dtype"),
            ({"plan": None}, TypeError, "argument `plan`: expected a MergePlan"),
            ({"y": _tokens[:, :4].to("meta")}, ValueError, "argument `plan`: expected device meta"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "attention_with_size",
        ops.attention_with_size,
        **_sized_attention(2, 9, 5, 4, 3),
        bad=[
            ({"q": "text"}, TypeError, "argument `q`: expected a tensor"),
            ({"k": _x}, ValueError, "argument `k`: expected shape [batch, heads, M, d] = [2, 2, *, 4]"),
            ({"v": _wide[:, :, 1:]}, ValueError, "argument `v`: expected shape"),
            ({"v": _wide.double()}, TypeError, "argument `v`: expected dtype float32"),
            ({"v": _wide[..., :0]}, ValueError, "argument `v`: expected a last dimension of at least 1"),
            ({"size": None}, TypeError, "argument `size`: expected a tensor [batch, M]"),
            ({"size": torch.ones(2, 9)}, ValueError, "argument `size`: expected shape [batch, M] = [2, 5]"),
            ({"size": torch.ones(2, 5).half()}, TypeError, "argument `size`: expected dtype float32"),
            ({"size": torch.ones(2, 5).to("meta")}, ValueError, "argument `size`: expected device cpu"),
            (
                {"size": torch.ones(2, 5, requires_grad=True)},
                ValueError,
                "argument `size`: expected a tensor without a gradient",
            ),
            ({"scale": float("nan")}, ValueError, "argument `scale`: expected a finite number"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "learnable_token_merge-softmax",
        learnable_token_merge,
        _soft_merge(False),
        {"normalize": "softmax"},
        bad=[
            ({"z": "text"}, TypeError, "argument `z`: expected a tensor"),
            ({"z": _tokens.int()}, TypeError, "argument `z`: expected dtype"),
            ({"g": torch.ones(6, 3)}, ValueError, "argument `g`: expected shape [N, P] = [7, *]"),
            ({"g": torch.ones(1, 7, 3)}, ValueError, "argument `g`: expected shape [batch, N, P] or [N, P]"),
            ({"g": torch.ones(7, 0)}, ValueError, "argument `g`: expected at least one token"),
            ({"g": torch.ones(7, 3).half()}, TypeError, "argument `g`: expected dtype float32"),
            ({"g": torch.ones(7, 3).to("meta")}, ValueError, "argument `g`: expected device cpu"),
            ({"z": torch.ones(2, 7, 0)}, ValueError, "argument `z`: expected at least one channel"),
            ({"other": torch.ones(2, 7, 0)}, ValueError, "argument `others`: expected at least one channel"),
            ({"other": _tokens[:, 1:]}, ValueError, "argument `others`: expected shape"),
            ({"other": _tokens.double()}, TypeError, "argument `others`: expected dtype float32"),
            ({"other": _tokens.to("meta")}, ValueError, "argument `others`: expected device cpu"),
            ({"normalize": "max"}, ValueError, "argument `normalize`: expected None, 'sum', 'softmax'"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "learnable_token_merge-sum-shared",
        learnable_token_merge,
        _soft_merge(True, 4),
        {"normalize": "sum"},
        share=Fraction(3 * (5 + 4), 3 * 5 + 4),  # no gradient of the second result arrives where this counts
        positional=("z", "g", "other"),
    ),
    Sample(
        "learnable_token_merge-rows",
        learnable_token_merge,
        _soft_merge(False, 2),
        {"normalize": "softmax_rows"},
        share=Fraction(3 * (5 + 2), 3 * 5 + 2),
        positional=("z", "g", "other"),
    ),
    Sample("learnable_token_merge-plain-shared", learnable_token_merge, _soft_merge(True)),
]

# Matching returns integers; its tests are in tests/kernels.
WITHOUT_GRADIENT = {"bipartite_match"}
