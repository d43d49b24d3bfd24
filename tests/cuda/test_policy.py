"""The CUDA launch policy, exhaustively and on any machine: csrc/cuda/policy.h through pybind11.

For every shape and device: shared memory stays under the limit, every CTA owns columns, every column and row is owned
once, and the grid covers the rows.
"""

from __future__ import annotations

import itertools

import pytest
from fastreft._C import policy

# cc -> (multiprocessors, bytes of shared memory a CTA may ask for, the largest cluster)
DEVICES = {
    (8, 0): (108, 166912, 1),
    (8, 6): (84, 101376, 1),
    (8, 9): (142, 101376, 1),
    (9, 0): (132, 232448, 16),
    (10, 0): (148, 232448, 16),
    (12, 0): (170, 101376, 8),
}
ROWS = [1, 2, 15, 16, 17, 31, 64, 160, 1000, 4096, 32768, 1_000_003]
WIDTHS = [
    8,
    16,
    64,
    120,
    128,
    136,
    256,
    512,
    520,
    768,
    1024,
    1536,
    2048,
    2304,
    2560,
    3072,
    3584,
    4096,
    5120,
    8192,
    16384,
]
ODD_WIDTHS = [1, 7, 63, 4097]
RANKS = [1, 4, 8, 9, 16, 17, 32, 33, 64]
MATRICES = [(0, 1), (1, 1), (2, 1), (1, 0), (1, 2)]  # (shrink, expand)


@pytest.fixture(params=DEVICES, ids=lambda cc: f"cc {cc[0]}.{cc[1]}")
def device(request):
    return policy.Device(*request.param, *DEVICES[request.param])


def check_fused(plan, n, d, r, device):
    assert plan["shared"] <= device.shared
    assert plan["per_sm"] in (1, 2) and plan["per_sm"] * (plan["shared"] + 1024) <= device.shared + 1024
    assert plan["rank"] >= r and plan["rank"] in (8, 16, 32, 64)
    assert 1 <= plan["cluster"] <= device.largest_cluster
    assert plan["width"] % 128 == 0  # 16 columns, one step of mma, for each of 8 warps
    assert plan["cluster"] * plan["width"] >= d > (plan["cluster"] - 1) * plan["width"]  # all columns; no CTA without
    assert plan["rows"] in (16, 32, 64) and plan["rows"] >= plan["cluster"]
    assert 1 <= plan["stages"] <= 8 and (plan["stages"] > 1 or plan["tiles"] <= plan["clusters"])
    assert (plan["tiles"] - 1) * plan["rows"] < n <= plan["tiles"] * plan["rows"]
    assert 1 <= plan["clusters"] <= plan["tiles"]  # every cluster has a tile
    assert plan["clusters"] * plan["cluster"] <= max(device.multiprocessors * plan["per_sm"], plan["cluster"])


@pytest.mark.parametrize(("shrinks", "expands"), MATRICES)
def test_fused_pass(shrinks, expands, device):
    for n, d, r in itertools.product(ROWS, WIDTHS, RANKS):
        plan = policy.fused(n, d, r, shrinks, expands, False, device)
        if plan["fits"]:
            check_fused(plan, n, d, r, device)


@pytest.mark.parametrize(("shrinks", "expands"), MATRICES)
def test_streamed_pass(shrinks, expands, device):
    for n, d, r in itertools.product(ROWS, WIDTHS, RANKS):
        plan = policy.fused(n, d, r, shrinks, expands, False, device, streamed=True)
        assert plan["fits"] or (r > 32 and 2 in (shrinks, expands)), (
            "beyond that a matrix pair is more than all there is"
        )
        if plan["fits"]:
            assert plan["cluster"] == 1
            check_fused(plan | {"width": plan["width"] * plan["pieces"]}, n, d, r, device)
            assert plan["width"] % 128 == 0 and (plan["pieces"] - 1) * plan["width"] < d


@pytest.mark.parametrize("expands", [0, 1, 2])
def test_one_pass_backward(expands, device):
    for n, d, r in itertools.product(ROWS, WIDTHS, RANKS):
        plan = policy.fused(n, d, r, 1, expands, True, device)
        if plan["fits"]:
            check_fused(plan, n, d, r, device)
            # Its sums are in registers.
            assert plan["rank"] <= 32 and plan["width"] <= (256 if plan["rank"] > 16 else 512) and plan["per_sm"] == 1
            assert plan["rank"] <= 16 or plan["cluster"] <= 8


@pytest.mark.parametrize(("shrinks", "expands"), MATRICES)
def test_matrices_in_registers(shrinks, expands, device):
    """One of each sort, with many coordinates, for at least four tiles a cluster, of which three are on their way."""
    found = 0
    for n, d, r in itertools.product(ROWS, WIDTHS, RANKS):
        plan = policy.fused(n, d, r, shrinks, expands, False, device)
        if plan["fits"] and plan["held"]:
            found += 1
            assert plan["rank"] > 16 and 2 not in (shrinks, expands)
            assert (plan["rows"], plan["width"], plan["per_sm"]) == (32, 512, 1) and 3 <= plan["stages"] <= 8
            assert plan["tiles"] >= 4 * plan["clusters"] and 4 * d >= 3 * plan["cluster"] * 512
    assert found > 0 or 2 in (shrinks, expands) or device.shared < 110_000


def test_a_device_that_was_asked_gets_no_more_clusters_than_it_runs():
    """Clusters that the device does not run are not used, and never more at once than it said."""
    for refused in ((), (7,), (7, 8), tuple(range(2, 17))):
        resident = [[0 if c in refused else 132 * per_sm // c - (c > 4) for c in range(1, 17)] for per_sm in (1, 2)]
        device = policy.Device(9, 0, *DEVICES[9, 0], resident)
        for n, d, r in itertools.product(ROWS, WIDTHS, RANKS):
            plan = policy.fused(n, d, r, 1, 1, False, device)
            if plan["fits"]:
                check_fused(plan, n, d, r, device)
                assert plan["cluster"] not in refused
                assert plan["clusters"] <= resident[plan["per_sm"] - 1][plan["cluster"] - 1]
            assert plan["fits"] or d > 512


def test_copy(device):
    for total, cluster in itertools.product([0, *ROWS], (1, 3, 8)):
        rows, blocks = policy.copy(total, cluster, device)
        assert 0 <= rows <= 256 and blocks % cluster == 0
        assert total <= rows * blocks < total + rows * cluster or total == 0 == blocks
        # a mark a row must fit into the shared memory of whatever pass it goes with
        assert rows <= policy.simple(1, 1, 4, device)["shared"]


def test_what_tensor_cores_must_take():
    h200 = policy.Device(9, 0, *DEVICES[9, 0])
    for n, r in itertools.product(ROWS, RANKS):
        for d in (768, 896, 1024, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 8192):
            assert policy.fused(n, d, r, 1, 1, False, h200)["fits"]
            assert policy.fused(n, d, r, 1, 1, True, h200)["fits"] == (r <= 16 or (r <= 32 and d <= 2048))
    for r, cluster, per_sm, elements in ((8, 4, 2, 32768), (16, 8, 2, 32768), (32, 8, 1, 16384), (64, 8, 1, 16384)):
        dense = policy.fused(32768, 4096, r, 1, 1, False, h200)
        assert (dense["cluster"], dense["per_sm"]) == (cluster, per_sm) and dense["clusters"] * cluster >= 120 * per_sm
        # 64 KB at work; with many coordinates 32, the matrices in registers, so that the next tiles are on their way
        assert per_sm * dense["rows"] * dense["width"] == elements
        assert dense["held"] == (r > 16) and dense["stages"] >= (3 if r > 16 else 2)
    rows = policy.fused(160, 4096, 8, 1, 1, False, h200)
    assert rows["rows"] == 16 and rows["clusters"] == 10 and rows["cluster"] == 8  # few rows: more CTAs share the work


def test_what_tensor_cores_must_leave(device):
    for d in ODD_WIDTHS:
        assert not policy.fused(100, d, 8, 1, 1, False, device)["fits"]
    assert not policy.fused(100, 4096, 65, 1, 1, False, device)["fits"]
    assert not policy.fused(0, 4096, 8, 1, 1, False, device)["fits"]


def test_simple_pass(device):
    for n, r, size in itertools.product(ROWS, [*RANKS, 65, 256, 700], (4, 8)):
        plan = policy.simple(n, r, size, device)
        assert plan["fits"] and plan["shared"] <= device.shared
        assert (plan["blocks"] - 1) * plan["rows"] < n <= plan["blocks"] * plan["rows"]


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_sums(tensor_cores, device):
    for n, d, r, three in itertools.product(ROWS, WIDTHS, RANKS, (False, True)):
        plan = policy.sums(n, d, r, tensor_cores, device, three)
        assert plan["shared"] <= device.shared
        assert (plan["column_blocks"] - 1) * plan["columns"] < d <= plan["column_blocks"] * plan["columns"]
        assert (plan["chunks"] - 1) * plan["coordinates"] < r <= plan["chunks"] * plan["coordinates"]
        assert (plan["splits"] - 1) * plan["range"] < n <= plan["splits"] * plan["range"]  # every range has rows
        assert plan["splits"] <= 64 and plan["range"] % 16 == 0
        ctas = plan["splits"] * plan["column_blocks"] * plan["chunks"]
        assert plan["splits"] == 1 or ctas <= plan["per_sm"] * device.multiprocessors  # one wave
        assert plan["per_sm"] * (plan["shared"] + 1024) <= device.shared + 1024 or plan["per_sm"] == 1


def test_sums_fill_an_h200_once():
    """Of 132 multiprocessors, a CTA each."""
    h200 = policy.Device(9, 0, *DEVICES[9, 0])
    for r, three, blocks, splits in ((8, False, 16, 8), (16, True, 16, 8), (64, False, 16, 8), (64, True, 32, 4)):
        plan = policy.sums(32768, 4096, r, True, h200, three)
        assert (plan["column_blocks"], plan["splits"]) == (blocks, splits)
    assert policy.sums(0, 4096, 8, True, h200)["splits"] == policy.sums(9, 0, 8, False, h200)["splits"] == 0


def test_code_that_is_older_than_its_device_is_planned_for_as_what_it_was_compiled_for():
    """Clusters from 9.0 on are in the code or not, whatever the device has."""
    for device, ptx, usable in (
        (9, 90, 9),
        (9, 80, 8),
        (10, 90, 9),
        (12, 86, 8),
        (8, 80, 8),
        (8, 86, 8),
        (10, 100, 10),
    ):
        assert policy.usable_major(device, ptx) == usable


def test_retraction(device):
    ranks = [1, 2, 4, 8, 16, 32, 64, 65, 128, 512]
    for r, d, matrices, wide in itertools.product(ranks, [64, 520, 4096, 16384], [1, 32, 64, 200], (False, True)):
        if r > d:
            continue
        plan = policy.retract(r, d, matrices, wide, device)
        assert plan["shared"] <= device.shared and plan["terms"] >= 1
        assert 1 <= plan["cluster"] <= (8 if device.major >= 9 and plan["in_shared"] else 1)
        # All at once; or the smallest cluster whose columns stay.
        assert plan["cluster"] == 1 or plan["resident"] or matrices * plan["cluster"] <= device.multiprocessors
        assert -(-d // plan["cluster"]) * (plan["cluster"] - 1) < d  # every CTA owns columns
        assert plan["in_shared"] or r > 32


def test_a_retraction_whose_columns_stay_in_shared_memory():
    """64 matrices of 8 x 4096 on an H200: two CTAs each, which have a multiprocessor to themselves and all run at once, and
    whose columns of R and of the gradient stay; where there is not the room they come in chunks."""
    h200 = policy.Device(9, 0, *DEVICES[9, 0])
    plan = policy.retract(8, 4096, 64, False, h200)
    assert plan["cluster"] == 2 and plan["resident"]
    more = policy.retract(8, 4096, 80, False, h200)  # than run at once: two turns of the same
    assert more["cluster"] == 2 and more["resident"]
    assert not policy.retract(64, 8192, 80, False, h200)["resident"]
    assert not policy.retract(8, 4096, 64, False, policy.Device(8, 9, *DEVICES[8, 9]))["resident"]
