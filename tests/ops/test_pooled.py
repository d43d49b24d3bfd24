"""Rows of many adapters in one call: each as by its own adapter alone."""

import pools
import pytest
import torch
from common import DEVICES

from fastreft import functional
from fastreft.ops import activations, edit, native, pooled

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def mixed_rows(total: int, adapters: int, seed: int = 0):
    """Most rows, in no order, each with some adapter or none."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(total, generator=generator)[: total - total // 4]
    which = torch.randint(-1, adapters, (len(rows),), generator=generator)
    rows[::7] = -1
    return rows, which


@pytest.mark.parametrize("d", [64, 61, 192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_bits_of_its_adapter_alone(d, dtype):
    torch.manual_seed(0)
    made = pools.adapters(d)
    h = torch.randn(4, 30, d).to(dtype)
    rows, which = mixed_rows(120, len(made))
    pool = pools.pool(d, torch.float64 if dtype is torch.float64 else torch.float32)
    out = pooled.edit_pooled_(h.clone(), rows, which, pool)
    alone = h.clone()
    for i, (w, act) in enumerate(made):
        name = next(name for name, known in activations._KNOWN.items() if known is act)
        alone = edit.edit(alone, w, name, rows.masked_fill(which != i, -1))
    assert torch.equal(out, alone)


def on(device: str, pool: pooled.Pool) -> pooled.Pool:
    return pooled.Pool(*(each.to(device) if isinstance(each, torch.Tensor) else each for each in pool))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", [64, 61, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_as_good_as_plain_torch_makes_them(d, dtype, device):
    torch.manual_seed(0)
    made = pools.adapters(d)
    h = torch.randn(4, 30, d).to(dtype)
    rows, which = mixed_rows(120, len(made))
    wanted = pools.expected(h, rows, which, made, torch.float64)
    pool = on(device, pools.pool(d, torch.float64 if dtype is torch.float64 else torch.float32))
    got = [pooled.edit_pooled_(h.to(device, copy=True), rows.to(device), which.to(device), pool) for _ in range(2)]
    assert torch.equal(*got)
    eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    assert (got[0].cpu().double() - wanted).abs().max() <= eps * wanted.abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_neighbours_change_nothing(device):
    torch.manual_seed(0)
    made = pools.adapters(96)
    h, pool = torch.randn(40, 96, device=device), on(device, pools.pool(96))
    rows, which = torch.arange(40, device=device), torch.arange(40, device=device) % len(made)
    whole = pooled.edit_pooled_(h.clone(), rows, which, pool)
    for i in (0, 7, 23):
        one = pooled.edit_pooled_(h.clone(), rows[i : i + 1], which[i : i + 1], pool)
        assert torch.equal(one[i], whole[i])


def test_transposed_states_and_nothing_to_do():
    made = pools.adapters(32)
    h = torch.randn(6, 4, 32).transpose(0, 1)
    rows, which = torch.tensor([3, 20, 11]), torch.tensor([0, 2, -1])
    wanted = pools.expected(h.contiguous(), rows, which, made)
    got = pooled.edit_pooled_(h.clone(memory_format=torch.preserve_format), rows, which, pools.pool(32))
    torch.testing.assert_close(got, wanted)
    nothing = torch.empty(0, dtype=torch.int64)
    assert torch.equal(pooled.edit_pooled_(h.clone(), nothing, nothing, pools.pool(32)), h)


def test_an_empty_line_of_the_table_edits_nothing():
    pool = pools.pool(32)
    pool.table[0] = 0
    h = torch.randn(5, 32)
    assert torch.equal(pooled.edit_pooled_(h.clone(), torch.arange(5), torch.zeros(5, dtype=torch.int64), pool), h)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(rows=torch.tensor([0, 9])), "past the last of 5 rows"),
        (dict(which=torch.tensor([0, 99])), "there is no adapter 99"),
        (dict(line=[9999, 4, 0, 1]), "are not in the pool"),
        (dict(line=[0, 4, 0, 7]), "are not in the pool"),
    ],
)
def test_what_is_not_there_is_said(change, said):
    if not native.CPU:
        pytest.skip("plain torch's own errors")
    pool = pools.pool(32)
    if "line" in change:
        pool.table[0] = torch.tensor(change["line"], dtype=torch.int32)
    rows, which = change.get("rows", torch.tensor([0, 1])), change.get("which", torch.tensor([0, 1]))
    with pytest.raises(IndexError, match=said):
        pooled.edit_pooled_(torch.randn(5, 32), rows, which, pool)


def test_it_has_no_gradient_and_says_so():
    if not native.CPU:
        pytest.skip("the op is native")
    h = torch.randn(5, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.ops.fastreft.edit_pooled_(h * 1, torch.arange(2), torch.zeros(2, dtype=torch.int64), *pools.pool(32))


def test_the_op_is_registered_as_torch_wants_it():
    if not native.CPU:
        pytest.skip("the op is native")
    pool = pools.pool(32)
    arguments = (torch.randn(5, 32), torch.arange(3), torch.tensor([0, 1, 2]), *pool)
    torch.library.opcheck(torch.ops.fastreft.edit_pooled_.default, arguments)


def test_loreft_is_loreft():
    torch.manual_seed(0)
    R = torch.linalg.qr(torch.randn(64, 4)).Q.T.contiguous()
    W, b = torch.randn(4, 64), torch.randn(4)
    pool = pooled.pool_of([((R, W, R, b, None), edit.LINEAR)])
    h = torch.randn(7, 64)
    got = pooled.edit_pooled_(h.clone(), torch.arange(7), torch.zeros(7, dtype=torch.int64), pool)
    torch.testing.assert_close(got, functional.loreft(h, R, W, b))
