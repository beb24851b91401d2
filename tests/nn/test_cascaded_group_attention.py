from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from edits import EDITS
from randomise import randomise
from tolerance import FORWARD, GRADIENT, assert_close_to_truth
from torch import nn

from vitkernels import ops
from vitkernels.nn import CascadedGroupAttention, LocalWindowAttention, resize_attention_biases


def plain_attention(m: CascadedGroupAttention, x: torch.Tensor) -> torch.Tensor:
    """The definition, with the bias matrix gathered by the official scan over pairs of points."""
    side, k = m.resolution, m.key_dim
    points = list(itertools.product(range(side), range(side)))
    offsets: dict[tuple[int, int], int] = {}
    index = [
        offsets.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(offsets)) for a in points for b in points
    ]
    bias = m.attention_biases[:, index].unflatten(1, (len(points), len(points)))
    features = []
    for head, chunk in enumerate(x.chunk(m.num_heads, 1)):
        y = m.qkvs[head](chunk + features[-1] if features else chunk)
        q, key, v = m.dws[head](y[:, :k]).flatten(2), y[:, k : 2 * k].flatten(2), y[:, 2 * k :].flatten(2)
        p = torch.softmax(torch.einsum("bcn,bcm->bnm", q, key) * m.scale + bias[head], -1)
        features.append(torch.einsum("bcm,bnm->bcn", v, p).unflatten(2, (side, side)))
    return m.proj(torch.cat(features, 1))


def plain_windows(m: LocalWindowAttention, x: torch.Tensor) -> torch.Tensor:
    """Each window of the explicitly padded map on its own."""
    side = m.attn.resolution
    height, width = x.shape[2:]
    padded = x.new_zeros(*x.shape[:2], -(-height // side) * side, -(-width // side) * side)
    padded[:, :, :height, :width] = x
    rows = [torch.cat([m.attn(window) for window in row.split(side, 3)], 3) for row in padded.split(side, 2)]
    return torch.cat(rows, 2)[:, :, :height, :width]


def mixer(
    heads: int, side: int, width: int = 16, kernels: tuple[int, ...] = (7, 5, 3, 3)
) -> CascadedGroupAttention:
    return randomise(CascadedGroupAttention(heads * width, 16, heads, width / 16, side, kernels))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("heads", "side", "width"), [(1, 1, 16), (2, 4, 112), (3, 7, 32), (4, 6, 16), (2, 12, 48)]
)
def test_equals_the_definition(heads: int, side: int, width: int, channels_last: bool, train: bool) -> None:
    def run(forward, module, dtype, x, weight):
        module = copy.deepcopy(module).to(dtype)
        leaf = x.to(dtype, copy=True).requires_grad_()
        out = forward(module, leaf)
        (out * weight.to(dtype)).sum().backward()
        return {"out": out, "x": leaf.grad} | {name: p.grad for name, p in module.named_parameters()}

    # Three draws are held to the rule together: of one, PyTorch's own error in a small tensor is a matter of luck.
    draws = []
    for seed in range(3):
        torch.manual_seed(seed)
        module = mixer(heads, side, width).train(train)
        x = torch.randn(3, heads * width, side, side)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(x.shape)
        draws.append(
            (
                run(lambda m, leaf: m(leaf), module, torch.float32, x, weight),
                run(plain_attention, module, torch.float32, x, weight),
                run(plain_attention, module, torch.float64, x, weight),
            )
        )
    for name in draws[0][0]:
        got, baseline, truth = (torch.stack([draw[kind][name] for draw in draws]) for kind in range(3))
        if truth.abs().max() < 1e-9:
            # A single token attends to itself whatever its query and key; batch statistics cancel a shift.
            assert side == 1 or train
            continue
        reduced = 1 if name in ("out", "x") else 3 * side**4 if name == "attention_biases" else 3 * side**2
        # Twice the rule of a kernel: the norms between amplify rounding, so two runs of PyTorch differ as much.
        factor = 2 * (FORWARD if name == "out" else GRADIENT)
        assert_close_to_truth(name, got, baseline, truth, factor=factor, reduced=reduced)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_attention_reads_the_convolution_in_place(
    monkeypatch: pytest.MonkeyPatch, channels_last: bool
) -> None:
    module = mixer(2, 7).eval()
    outputs, calls = [], []
    for conv in (*module.qkvs, *module.dws):
        conv.register_forward_hook(lambda _, __, output: outputs.append(output.data_ptr()))

    def spy(q, k, v, **kwargs):
        calls.append((q.data_ptr(), k.data_ptr(), v.data_ptr()))
        out = window_attention(q, k, v, **kwargs)
        if kwargs["backend"] != "reference":
            assert out.stride()[2:] == v.stride()[2:] or out.stride(2) == 1 or out.stride(3) == 1
        return out

    window_attention = ops.window_attention
    monkeypatch.setattr(ops, "window_attention", spy)
    x = torch.randn(2, 32, 7, 7)
    with torch.no_grad():
        module(x.contiguous(memory_format=torch.channels_last) if channels_last else x)
    token = 1 if channels_last else 49
    for head, (q, k, v) in enumerate(calls):
        qkv, dw = outputs[2 * head : 2 * head + 2]
        assert q == dw
        assert (k - qkv, v - qkv) == (4 * 16 * token, 4 * 32 * token)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 8), (7, 9), (13, 5), (15, 22), (14, 14)])
def test_windows_of_any_map(size: tuple[int, int], channels_last: bool) -> None:
    module = LocalWindowAttention(32, 16, 2, 1, resolution=14, window_resolution=7)
    randomise(module).eval()
    x = torch.randn(2, 32, *size)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        got, expected = module(x), plain_windows(module, x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(module.attn(x), expected, rtol=1e-5, atol=1e-5)
        assert size == (7, 7) or not torch.allclose(got, expected.roll(1, 3), atol=1e-3) or size == (1, 1)


def test_padded_tokens_are_keys_and_enter_batch_statistics() -> None:
    module = randomise(LocalWindowAttention(32, 16, 2, 1, resolution=14, window_resolution=7)).train()
    twin = copy.deepcopy(module)
    x = torch.randn(2, 32, 5, 6)
    padded = torch.zeros(2, 32, 7, 7)
    padded[:, :, :5, :6] = x
    torch.testing.assert_close(module(x), twin(padded)[:, :, :5, :6], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.attn.qkvs[0].bn.running_var, twin.attn.qkvs[0].bn.running_var)


def test_default_initialisation_closes_the_branch_and_random_weights_open_it() -> None:
    x = torch.randn(2, 32, 7, 7)
    module = CascadedGroupAttention(32, 16, 2, 1, 7)
    assert module(x).abs().max() == 0
    assert randomise(module)(x).abs().max() > 0.1


def test_a_constant_bias_of_a_head_changes_nothing() -> None:
    module = mixer(3, 7).eval()
    x = torch.randn(2, 48, 7, 7)
    with torch.no_grad():
        before = module(x)
        module.attention_biases += torch.tensor([[1.0], [-2.0], [3.0]])
        torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-5)


def without_fold(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The composition, layer by layer: a hook on one keeps the module from folding."""
    twin = copy.deepcopy(module)
    twin.qkvs[0].register_forward_hook(lambda *_: None)
    return twin(x)


@pytest.mark.parametrize("name", EDITS)
def test_the_fold_follows_every_edit(name: str) -> None:
    """The official code keeps its biases as a plain attribute, which such edits leave behind."""
    module, x = mixer(2, 7).eval(), torch.randn(2, 32, 9, 7)
    with torch.no_grad():
        before = module(x)
        kept = module.__dict__["_vitkernels_kept"]
        assert torch.equal(module(x), before)
        assert module.__dict__["_vitkernels_kept"] is kept, "folded again without a reason"
        EDITS[name](module)
        x = x.to(module.attention_biases.dtype)
        after, expected = module(x), without_fold(module, x)
    assert after.dtype is expected.dtype
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    if name not in ("double", "half_and_back"):
        assert not torch.allclose(after.float(), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_after_eval(dtype: torch.dtype) -> None:
    """The official code fails here: half values times float probabilities."""
    module, x = mixer(2, 7).eval(), torch.randn(2, 32, 14, 14)
    with torch.no_grad():
        exact = module(x)
        theirs = without_fold(module.to(dtype), x.to(dtype))
        ours = module(x.to(dtype))
    assert ours.dtype is dtype
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_copies_fold_for_themselves() -> None:
    module, x = mixer(2, 7).eval(), torch.randn(2, 32, 7, 7)
    with torch.no_grad():
        before = module(x)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert "_vitkernels_kept" not in twin.__dict__
            assert torch.equal(twin(x), before)
            twin.proj[1].bn.bias += 1
            torch.testing.assert_close(twin(x), before + 1)
            assert torch.equal(module(x), before)
    assert "_vitkernels_kept" in module.__dict__
    assert "_vitkernels_kept" not in module.train().__dict__


def test_frozen_norms_train_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detection trains with every batch norm in eval mode; the kernel then has the gradients of the definition."""
    module = randomise(LocalWindowAttention(48, 16, 3, 1, resolution=14)).train().double()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    twin, x = copy.deepcopy(module), torch.randn(2, 48, 13, 9).double()
    calls, original = [], ops.cascaded_group_attention
    monkeypatch.setattr(
        ops, "cascaded_group_attention", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    weight = torch.randn_like(x)
    (module(leaves[0]) * weight).sum().backward()
    assert calls == [1]
    side = twin.attn.resolution
    padded = nn.functional.pad(leaves[1], (0, -x.shape[3] % side, 0, -x.shape[2] % side))
    rows = [
        torch.cat([plain_attention(twin.attn, window) for window in row.split(side, 3)], 3)
        for row in padded.split(side, 2)
    ]
    (torch.cat(rows, 2)[:, :, :13, :9] * weight).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for (name, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert b.grad.abs().max() > 1e-9, name
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_the_residual_rides_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = randomise(LocalWindowAttention(32, 16, 2, 1, resolution=14)).eval(), torch.randn(2, 32, 14, 9)
    calls, original = [], ops.cascaded_group_attention
    monkeypatch.setattr(
        ops, "cascaded_group_attention", lambda *a, **k: (calls.append(k["residual"]), original(*a, **k))[1]
    )
    with torch.no_grad():
        expected = x + module(x)
        torch.testing.assert_close(module.residual(x), expected, rtol=1e-5, atol=1e-5)
        assert calls == [False, True]
        with torch.autocast("cpu", torch.bfloat16):
            assert module.residual(x).dtype is torch.float32, "a float32 map plus a bfloat16 one"
            assert module.residual(x.bfloat16()).dtype is torch.bfloat16
        assert calls[2:] == [False, True]
        module.register_forward_hook(lambda _, __, y: 2 * y)
        torch.testing.assert_close(module.residual(x), 2 * expected - x, rtol=1e-5, atol=1e-5)


def test_hooks_and_live_norms_run_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = (
        randomise(LocalWindowAttention(32, 16, 2, 1, resolution=14)).eval(),
        torch.randn(1, 32, 14, 14),
    )
    monkeypatch.setattr(ops, "cascaded_group_attention", lambda *_, **__: pytest.fail("the fused kernel ran"))
    for layer in (module.attn.qkvs[1], module.attn.dws[0].c, module.attn.proj[0], module.attn.proj[1].bn):
        seen = []
        handle = layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        module(x)
        handle.remove()
        assert seen == [1]
    module.attn.dws[1].bn.train()
    module(x)


def test_loads_the_official_keys() -> None:
    module = CascadedGroupAttention(32, 16, 2, 1, 7)
    keys = set(module.state_dict())
    assert {"qkvs.0.c.weight", "dws.1.bn.running_var", "proj.1.bn.bias", "attention_biases"} <= keys
    official = mixer(2, 7, kernels=(5, 5)).state_dict() | {
        "attention_bias_idxs": torch.zeros(49, 49, dtype=torch.int64)
    }
    module.load_state_dict(official, strict=True)
    assert torch.equal(module.attention_biases, official["attention_biases"])
    assert set(module.state_dict()) == keys
    assert "attention_bias_idxs" in official, "the caller's dict was changed"
    wrapper = nn.Sequential(LocalWindowAttention(32, 16, 2, 1))
    wrapper.load_state_dict({f"0.attn.{key}": value for key, value in official.items()}, strict=True)


def test_a_ratio_that_is_no_binary_fraction_gives_the_whole_width() -> None:
    assert 61 / 7 * 7 < 61
    layer = CascadedGroupAttention(122, 7, num_heads=2, attn_ratio=122 / (7 * 2), resolution=4)
    assert layer.d == 61
    assert CascadedGroupAttention(16, 5, num_heads=1, attn_ratio=0.5).d == 2


def test_empty_batch() -> None:
    module = LocalWindowAttention(32, 16, 2, 1).eval()
    assert module(torch.randn(0, 32, 14, 14)).shape == (0, 32, 14, 14)
    assert module(torch.randn(0, 32, 9, 8)).shape == (0, 32, 9, 8)


def test_autocast_and_training_step() -> None:
    module = randomise(LocalWindowAttention(32, 16, 2, 1)).train()
    x = torch.randn(2, 32, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype is torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    assert module.attn.attention_biases.grad.dtype is torch.float32


def test_compiles_as_one_graph_for_all_batch_sizes() -> None:
    module = randomise(LocalWindowAttention(32, 16, 2, 1)).eval()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    # PyTorch's own convolution guards on batches below 16, here windows.
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 5, 7):
            x = torch.randn(batch, 32, 14, 14)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


def test_resized_biases() -> None:
    table = torch.randn(3, 49)
    assert resize_attention_biases(table, 7) is table
    assert resize_attention_biases(table, 12).shape == (3, 144)
    assert resize_attention_biases(table.half(), 4).dtype is torch.float16
    torch.testing.assert_close(resize_attention_biases(torch.full((2, 16), 0.7), 9), torch.full((2, 81), 0.7))
    rows = torch.arange(7.0).repeat_interleave(7)[None]
    stretched = resize_attention_biases(rows, 14).view(14, 14)
    torch.testing.assert_close(stretched, stretched[:, :1].expand(14, 14))
    torch.testing.assert_close(stretched[:, 0], torch.arange(14.0) / 2 - 0.25, rtol=0, atol=0.3)
    with pytest.raises(ValueError, match=r"argument `table`.*\[2, 50\]"):
        resize_attention_biases(torch.zeros(2, 50), 7)
    with pytest.raises(ValueError, match="argument `table`: expected shape"):
        resize_attention_biases(table[0], 7)
    with pytest.raises(ValueError, match=r"argument `resolution`: expected 1 positive ints; got .*0"):
        resize_attention_biases(table, 0)
    with pytest.raises(TypeError, match="argument `resolution`: expected 1 ints; got"):
        resize_attention_biases(table, 7.5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [CascadedGroupAttention, LocalWindowAttention])
def test_a_wrong_map_is_refused(kind: type, training: bool) -> None:
    module = randomise(kind(32, 16, 2, 1, 7)).train(training)
    calls = [module, module.residual] if kind is LocalWindowAttention else [module]
    for call in calls:
        for shape in ((32, 7, 7), (1, 16, 7, 7), (1, 64, 14, 14)):
            with pytest.raises(
                ValueError, match=r"argument `x`: expected shape \[B, C, H, W\] = \[\*, 32, \*, \*\]"
            ):
                call(torch.randn(shape))
        with pytest.raises(TypeError, match="argument `x`: expected a tensor"):
            call("a map")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 30, "key_dim": 16, "num_heads": 4}, "argument `dim`.*multiple of num_heads"),
        ({"dim": 64, "key_dim": 16, "num_heads": 4, "attn_ratio": 4}, "argument `attn_ratio`.*= 1,"),
        ({"dim": 80, "key_dim": 16, "num_heads": 5, "attn_ratio": 1}, "argument `kernels`.*5 heads"),
        ({"dim": 64, "key_dim": 16, "num_heads": 0}, "argument `num_heads`: expected 1 positive ints"),
        ({"dim": 64, "key_dim": 16, "num_heads": -4}, "argument `num_heads`: expected 1 positive ints"),
        ({"dim": 64, "key_dim": 0, "num_heads": 4}, "argument `key_dim`: expected 1 positive ints"),
        ({"dim": 64, "key_dim": 16, "resolution": 0}, "argument `resolution`: expected 1 positive ints"),
        ({"dim": 32, "key_dim": 16, "num_heads": 2, "kernels": (5, 4)}, "argument `kernels`: expected odd"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CascadedGroupAttention(**arguments)
    if "resolution" in arguments:
        with pytest.raises(ValueError, match=message):
            LocalWindowAttention(**arguments)


def test_bad_windows() -> None:
    with pytest.raises(ValueError, match="argument `window_resolution`: expected a positive int; got 0"):
        LocalWindowAttention(64, 16, 4, window_resolution=0)
