"""The edit on every device: values and gradients against fp64, odd shapes and rows, and what torch asks of an op."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest
import torch
from common import DEVICES
from family import DTYPES, FAMILY, compare, gradients, weights
from torch.library import opcheck

from fastreft import functional as F
from fastreft import reference
from fastreft.interventions import activation_module
from fastreft.ops import activations, gemms
from fastreft.ops import native as core
from fastreft.ops.edit import FUSED, GEMMS, IN_PLACE, NEW, PLAIN, WHERE_ALLOWED, settled, way_of
from fastreft.ops.names import FUSED_ACTIVATIONS

TESTS = Path(__file__).parents[1]

native = pytest.mark.skipif(not core.build_info().get("devices"), reason="the native core is not built")


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("rows", [False, True])
def test_family(device, dtype, wide, method, rows):
    torch.manual_seed(0)
    h = torch.randn(3, 37, 72, device=device).to(dtype)
    index = torch.tensor([0, 5, -1, 110, 7, 64, -1, 36], device=device) if rows else None
    compare(method, h, weights(method, 72, 5, wide, device, bias=True), rows=index)


@native
@pytest.mark.parametrize("device", DEVICES)
def test_the_difference_of_masters_is_formed_before_it_is_rounded(device):
    """z = (W - R) h with fp32 weights and bf16 rows: rounding W and R apart would lose most of a small difference."""
    torch.manual_seed(0)
    h = torch.randn(50, 256, device=device).bfloat16()
    R, _, _ = weights("loreft", 256, 4, torch.float32, device)
    W = R + 1e-3 * torch.randn_like(R)
    _, z = torch.ops.fastreft.edit(h, R, W, None, None, None, 0, True, True)
    exact = h.double() @ (W.double() - R.double()).T
    apart = h.double() @ (W.bfloat16().double() - R.bfloat16().double()).T
    assert (z - exact).abs().max() < 0.1 * (apart - exact).abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", FUSED_ACTIVATIONS)
@pytest.mark.parametrize("method", ["loreft", "noreft", "nodireft"])
def test_activations(device, act, method):
    torch.manual_seed(0)
    # Enough rows that the largest error is not a matter of luck: some slopes are steep in a narrow place.
    h = 2 * torch.randn(900, 32, dtype=torch.float64, device=device)
    if (device, act) != ("cuda", "hardswish"):  # torch's own has a sixth in fp32 there
        compare(method, h, weights(method, 32, 3, torch.float64, device, bias=True), act)
    compare(
        method, h.float(), weights(method, 32, 3, torch.float32, device), act, torch.arange(0, 900, 3, device=device)
    )


def test_every_activation_of_transformers_works():
    """prelu and xielu hold parameters, so they stay outside the kernels; everything else is inside."""
    from transformers.activations import ACT2CLS

    assert set(ACT2CLS) - set(FUSED_ACTIVATIONS) <= {"prelu", "xielu"}
    h, (R, W, b) = torch.randn(4, 32), weights("loreft", 32, 3, torch.float32)
    for name in ACT2CLS:
        fn = activation_module(name).float()
        torch.testing.assert_close(
            F.loreft(h, R, W, b, act_fn=name if name in FUSED_ACTIVATIONS else fn),
            reference.loreft(h, R, W, b, act_fn=fn),
        )


@pytest.mark.parametrize("device", DEVICES)
def test_large_r_and_many_parts(device):
    torch.manual_seed(2)
    compare("loreft", torch.randn(300, 200, device=device), weights("loreft", 200, 128, torch.float32, device))
    compare("loreft", torch.randn(2000, 24, device=device), weights("loreft", 24, 2, torch.float32, device), "gelu")


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["transposed", "narrowed", "last dim", "4-d", "expanded"])
def test_strides(device, layout):
    """Every layout gives what its contiguous copy gives; in place, nothing but the listed rows changes."""
    torch.manual_seed(3)
    ws = weights("loreft", 16, 3, torch.float32, device)
    base = {
        "transposed": lambda: torch.randn(5, 4, 16, device=device).transpose(0, 1),
        "narrowed": lambda: torch.randn(4, 9, 40, device=device)[:, 2:7, 8:24],
        "last dim": lambda: torch.randn(4, 16, 5, device=device).transpose(1, 2),
        "4-d": lambda: torch.randn(2, 5, 2, 16, device=device).permute(2, 0, 1, 3)[:, :, ::2],
        "expanded": lambda: torch.randn(16, device=device).expand(4, 5, 16),
    }[layout]()
    dense = F.loreft(base.contiguous(), *ws)
    assert torch.equal(F.loreft(base, *ws), dense)
    rows = torch.tensor([1, 3, 8], device=device)
    expected = base.contiguous().view(-1, 16).clone()
    expected[rows] = dense.view(-1, 16)[rows]
    assert torch.equal(F.edit_rows(base, rows, ws[0], ws[1], ws[0], ws[2]).reshape(-1, 16), expected)
    if layout != "expanded":  # its rows are one row: nothing in place could be right
        assert F.loreft_rows_(base, rows, *ws) is base
        assert torch.equal(base.reshape(-1, 16), expected)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_edited_once_and_alone(device):
    torch.manual_seed(4)
    ws = weights("loreft", 64, 4, torch.float32, device)
    h = torch.randn(50, 64, device=device)
    once, many = h.clone(), h.clone()
    F.loreft_rows_(once, torch.tensor([3, 11, 40], device=device), *ws)
    F.loreft_rows_(many, torch.tensor([11, 3, -1, 40, 3, -1, 11], device=device), *ws)
    assert torch.equal(once, many)
    untouched = torch.ones(50, dtype=torch.bool)
    untouched[[3, 11, 40]] = False
    assert torch.equal(once[untouched], h[untouched])
    # a row's result does not depend on its batch
    assert torch.equal(once[11], F.loreft(h[11:12], *ws)[0])
    assert torch.equal(F.loreft(h, *ws)[40], once[40])
    F.loreft_rows_(h, torch.tensor([], dtype=torch.int64, device=device), *ws)


def test_same_bits_on_any_number_of_threads():
    torch.manual_seed(5)
    h, g = torch.randn(1000, 96), torch.randn(1000, 96)
    ws = weights("loreft", 96, 8, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(F.loreft, h, ws, g))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("calls")
def test_gradient_held_by_others_is_left_alone():
    """The in-place backward must not touch a gradient that someone else still sees."""
    torch.manual_seed(6)
    ws = [w.requires_grad_() for w in weights("loreft", 32, 4, torch.float32)]
    rows = torch.tensor([0, 3])
    x = torch.randn(6, 32, requires_grad=True)

    def edited():
        return F.loreft_rows_(x * 1, rows, *ws)

    mine = torch.randn(6, 32)
    copy = mine.clone()
    edited().backward(mine)  # the caller's own gradient
    assert torch.equal(mine, copy)

    seen = []
    y = edited()
    y.register_hook(seen.append)
    y.backward(copy * 1)
    assert torch.equal(seen[0], copy)

    w = torch.zeros(6, 32, requires_grad=True)  # a sum hands one gradient to both its terms
    for first, second in (
        (lambda: w * 1, edited),
        (edited, lambda: w * 1),
        (lambda: w.view(6, 32), lambda: edited().view(3, 64).view(6, 32)),
    ):
        w.grad = None
        (first() + second()).backward(copy * 1)
        assert torch.equal(w.grad, copy)
    edited().sum().backward()  # an expanded gradient: all rows are one
    x.grad = None
    edited().sum().backward()
    exact = x.detach().clone().requires_grad_()
    reference.edit_rows(exact, rows, ws[0], ws[1], ws[0], ws[2]).sum().backward()
    torch.testing.assert_close(x.grad, exact.grad)


@native
def test_opcheck():
    torch.manual_seed(7)
    ops = torch.ops.fastreft
    h, g, rows = torch.randn(6, 5, 16), torch.randn(6, 5, 16), torch.tensor([3, -1, 7, 20])
    R, W, b = weights("loreft", 16, 3, torch.float32)
    for act, args in ((0, (R, W, None, b, None, 0, True)), (2, (R, W, W.clone(), b, b.clone(), 2, False))):
        z = ops.edit(h, *args, True)[1]
        _, saved, z_rows = ops.edit_rows(h, rows, *args, True)
        opcheck(ops.edit_backward, (g, h, z, *args, True))
        opcheck(ops.edit_backward, (g, h, z, *args, False))
        opcheck(ops.edit_rows_backward, (g, rows, saved, z_rows, *args))
        opcheck(ops.edit_rows_backward_, (g.clone(), rows, saved, z_rows, *args, True))
        opcheck(ops.edit_rows_, (h.clone(), rows, *args, True))
        opcheck(ops.edit, (h, *args, False))
        trained = tuple(a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
        x = h.clone().requires_grad_()
        opcheck(ops.edit, (x, *trained, True))
        opcheck(ops.edit_rows, (x, rows, *trained, True))
        assert act == args[5]
    opcheck(ops.retract_, ([torch.randn(2, 8), torch.randn(3, 5)],))
    lists = ([torch.randn(2, 8)], [torch.randn(2, 8)], [torch.zeros(2, 8)], [torch.zeros(2, 8)])
    for ages, live_lr in (([], None), ([torch.tensor(3.0)], torch.tensor(0.1))):
        opcheck(ops.step_, (*lists, ages, live_lr, 0, *(0.1,) * 6, 1))
    mask, labels = torch.ones(2, 7, dtype=torch.int64), torch.full((2, 7), -100)
    opcheck(ops.prompt_rows, (mask, labels, 2, 7, 3, 2, False))
    opcheck(ops.prompt_rows, (None, None, 2, 7, 3, 2, True))


@pytest.mark.usefixtures("calls")
@native
@pytest.mark.parametrize(
    ("mask", "labels", "message"),
    [
        (torch.ones(2, 6, dtype=torch.bool), None, r"mask must be \(2, 7\)"),
        (torch.ones(2, 7), None, "mask must hold integers or bools"),
        (None, torch.ones(14, dtype=torch.int64), r"labels must be \(2, 7\)"),
    ],
)
def test_rows_of_prompts_refuse(mask, labels, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastreft.prompt_rows(mask, labels, 2, 7, 3, 2, False)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("act", [None, "gelu"])
def test_gradcheck(method, act):
    torch.manual_seed(8)
    ws = [w.requires_grad_() for w in weights(method, 7, 3, torch.float64, bias=True)]
    h = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    extra = {"act_fn": act} if method not in ("consreft", "lobireft") else {}
    assert torch.autograd.gradcheck(lambda h, *ws: getattr(F, method)(h, *ws, **extra), (h, *ws))
    rows = torch.tensor([4, 0, -1, 0])
    assert torch.autograd.gradcheck(lambda h, *ws: getattr(F, f"{method}_rows_")(h * 1, rows, *ws, **extra), (h, *ws))


def test_compile_fullgraph():
    torch.manual_seed(9)
    torch.compiler.reset()
    ws = [w.requires_grad_() for w in weights("loreft", 32, 4, torch.float32)]
    rows = torch.tensor([1, 5, -1])
    h = torch.randn(8, 32)

    def dense(h, *ws):
        return F.loreft(h.sin(), *ws).cos()

    def listed(h, R, W, b):
        return F.edit_rows(h.sin(), rows, R, W, R, b).cos()

    for run in (dense, listed):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        g = torch.randn(8, 32)
        for a, b in zip(gradients(compiled, h, ws, g), gradients(run, h, ws, g), strict=True):
            torch.testing.assert_close(a, b)


@native
def test_raw_mutating_ops_refuse_gradients():
    R, W, b = weights("loreft", 16, 3, torch.float32)
    h, rows = torch.randn(4, 16), torch.tensor([1])
    args = (W, None, b, None, 0, True, False)
    with pytest.raises(RuntimeError, match="has no gradient of its own"):
        torch.ops.fastreft.edit_rows_(h, rows, R.requires_grad_(), *args)
    with pytest.raises(RuntimeError, match="has no gradient of its own"):
        torch.ops.fastreft.retract_([R])
    with torch.no_grad():
        torch.ops.fastreft.edit_rows_(h, rows, R, *args)


@pytest.mark.usefixtures("calls")
def test_no_second_derivative_is_an_error_not_a_zero():
    ws = weights("loreft", 8, 2, torch.float64)
    h = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    (dh,) = torch.autograd.grad(F.loreft_rows_(h * 1, torch.tensor([0]), *ws).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError):
        dh.sum().backward()


@pytest.mark.usefixtures("calls")
def test_bad_arguments_are_named():
    R, W, b = weights("loreft", 16, 3, torch.float32)
    h = torch.randn(4, 16)
    for call, error, words in (
        (lambda: F.loreft(h.int(), R, W, b), TypeError, "h is torch.int32"),
        (lambda: F.loreft(h[:, :8], R, W, b), ValueError, r"must be \(r, 8\)"),
        (lambda: F.loreft(h, R, W[:, :8], b), ValueError, r"V is \(3, 8\)"),
        (lambda: F.loreft(h, R, W, b[:2]), ValueError, r"b is \(2,\)"),
        (lambda: F.loreft(h, R, W, b, act_fn="nope"), ValueError, "act_fn 'nope' is not one of"),
        (lambda: F.loreft_rows_(h, torch.tensor([0.0]), R, W, b), TypeError, "rows is torch.float32"),
        (lambda: F.loreft_rows_(h, torch.tensor([4]), R, W, b), IndexError, "^rows: 4 is past the last of 4 rows$"),
        (lambda: F.retract_([torch.zeros(4, 3)]), ValueError, r"matrices\[0\] is \(4, 3\)"),
    ):
        with pytest.raises(error, match=words):
            call()


@native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    """Each set the processor has passes the family test; FASTREFT_CPU_ISA asks for a lesser one."""
    script = (
        "import sys; from fastreft.ops import native; got = native.build_info()['cpu_isa'];\n"
        "if got != sys.argv[1]: print('absent', got); sys.exit(0)\n"
        "import pytest; sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *sys.argv[2:], '-k', "
        "'test_family or test_strides or test_retraction_of_hard']) if sys.argv[2:] else 0)"
    )
    files = [str(TESTS / name) for name in ("ops/test_edit.py", "ops/test_gemms.py", "optim/test_adamw.py")]
    if isa == core.build_info()["cpu_isa"]:
        files = []  # these very tests run on it in this process
    done = forked.run(script, isa, *files, FASTREFT_CPU_ISA=isa)
    if "absent" in done.stdout:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_reference_backend():
    """FASTREFT_BACKEND=reference runs without the native core; anything else is one sentence."""
    code = (
        "import torch, fastreft.functional as F; from fastreft.ops import native; R = torch.eye(2, 8); "
        "print(native.build_info()['backend'], float(F.loreft(torch.ones(1, 8), R, 2 * R, torch.zeros(2)).sum()))"
    )
    done = forked.run(code, FASTREFT_BACKEND="reference")
    assert done.stdout.split() == ["reference", "10.0"]
    done = forked.run(code, FASTREFT_BACKEND="fast")
    assert "FASTREFT_BACKEND is 'fast'; it must be native or reference" in done.stderr


@native
def test_the_way_of_an_edit(monkeypatch):
    """Plain torch where no kernel has the activation or the device, products beyond the fused ranks, else the native ops."""
    h, w = torch.randn(3, 8), (torch.eye(2, 8), None, None, None, None)
    assert way_of(h, w, activations.find("gelu")) is FUSED
    assert way_of(h, w, activations.find(torch.sin)) is PLAIN
    assert way_of(h.to("meta"), w, activations.find(None)) is PLAIN
    monkeypatch.setattr(gemms, "takes", lambda h, U: U.shape[0] == 2)
    assert way_of(h, w, activations.find(None)) is GEMMS
    monkeypatch.setattr(core, "CPU", False)
    assert way_of(h, w, activations.find(None)) is PLAIN


def test_where_an_edit_goes():
    """In place only where memory and autograd allow it, when that is what is asked."""
    leaf = torch.randn(4, 8, requires_grad=True)
    cases = {
        IN_PLACE: [torch.randn(4, 8), leaf * 1, torch.randn(4, 8)[:, None].expand(4, 2, 8).contiguous()],
        NEW: [leaf, torch.randn(8, 4).T, leaf.unbind()[0], (leaf * 1).unbind()[0]],
    }
    for wanted, states in cases.items():
        assert [settled(WHERE_ALLOWED, h) for h in states] == [wanted] * len(states)
        assert [settled(NEW, h) for h in states] == [NEW] * len(states)
    with torch.no_grad():
        assert settled(WHERE_ALLOWED, leaf) == IN_PLACE
