"""The edit by matrix products, what a GPU does above r = 64: on any device, through the public functions."""

from __future__ import annotations

import pytest
import torch
from common import DEVICES
from family import DTYPES, FAMILY, compare, gradients, weights

from fastreft import functional as F
from fastreft.ops import checks, gemms, native


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """On a CPU too: by products, and each row once as a GPU's lists are."""
    monkeypatch.setattr(gemms, "takes", lambda h, U: True)
    monkeypatch.setattr(native, "quick", native.Elsewhere)
    each_once, as_index = checks.each_once, checks.as_index
    monkeypatch.setattr(checks, "listed", lambda rows, unique: rows if unique else each_once(as_index(rows)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("rows", [False, True])
def test_family(device, dtype, wide, method, rows):
    torch.manual_seed(10)
    h = torch.randn(5, 40, 96, device=device).to(dtype)
    index = torch.tensor([0, 5, -1, 110, 5, 64, -1, 36, 199], device=device) if rows else None
    for act in (None,) if method in ("consreft", "lobireft") else (None, "silu"):
        compare(method, h, weights(method, 96, 70, wide, device, bias=True), act, index)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "rows", [[4, -1, 9, 30, 4, 2], [-1, 30, -1], [30], [-1, 0], [29, 30], []], ids=str
)  # 30 is past the end
def test_rows_that_are_not_listed_keep_their_bits_and_their_gradients(device, rows):
    torch.manual_seed(11)
    h, g = torch.randn(2, 30, 96, device=device)
    h[[0, 12]] = -0.0
    h[17] = torch.nan
    ws = weights("noreft", 96, 70, torch.float32, device)
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    left = [i for i in range(30) if i not in rows]
    before = h.clone()

    def in_place(h, *ws):
        return F.noreft_rows_(h.clone(), index, *ws)

    def apart(h, P, W, b):
        return F.edit_rows(h, index, P, W, P, b)

    for run in (in_place, apart):
        out, dh, *dws = gradients(run, h, ws, g)
        assert torch.equal(h.view(torch.int32), before.view(torch.int32))
        assert torch.equal(out[left].view(torch.int32), h[left].view(torch.int32))
        assert torch.equal(dh[left], g[left])
        assert all(bool(dw.isfinite().all()) for dw in dws)
        if len(left) == 30:
            assert not any(dw.any() for dw in dws)
        again = gradients(run, h, ws, g)
        assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip([out, dh, *dws], again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_and_gradients_through_views(device):
    torch.manual_seed(12)
    ws = weights("loreft", 96, 70, torch.float64, device)
    base, g = torch.randn(2, 4, 6, 96, dtype=torch.float64, device=device)
    rows = torch.tensor([3, -1, 7, 0], device=device)

    def turned(h, *ws):
        return F.loreft_rows_((h * 1).transpose(0, 1), rows, *ws).transpose(0, 1)

    def through_a_view(h, *ws):
        whole = (h * 1).transpose(0, 1).contiguous()
        F.loreft_rows_(whole[:, :], rows, *ws)  # the base learns of it
        return whole.transpose(0, 1)

    def copied(h, R, W, b):
        return F.edit_rows(h.transpose(0, 1), rows, R, W, R, b).transpose(0, 1)

    first, *others = (gradients(run, base, ws, g) for run in (turned, through_a_view, copied))
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-12, atol=1e-12)
    leaf = base.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="in-place operation"):
        F.loreft_rows_(leaf, rows, *ws)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device")
def test_replay_of_a_captured_graph_is_the_eager_call():
    torch.manual_seed(13)
    h, g = torch.randn(2, 50, 256, device="cuda").bfloat16()
    ws = weights("loreft", 256, 80, torch.float32, "cuda")
    rows = torch.tensor([3, -1, 7, 60, 0], device="cuda")
    run = lambda h, *ws: F.loreft_rows_(h * 1, rows, *ws)  # noqa: E731
    eager = gradients(run, h, ws, g)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients(run, h, ws, g)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(run, h, ws, g)
    for t in captured:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, eager, captured))
