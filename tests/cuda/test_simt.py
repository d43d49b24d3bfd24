"""The CUDA kernels, run on the host by tests/cuda/simt under AddressSanitizer and UBSan, against the oracle in fp64.

The tolerance is a rule, not a number: error against fp64 <= 2 x the error of plain torch in the same dtype + one rounding.
"""

from __future__ import annotations

import pools
import pytest
import torch
from fastreft._C import policy
from simt import harness
from simt.edit_case import METHODS, Edit, worst_excess

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="needs g++ on Linux")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NARROW = (9, 0, 6, 100_000, 8)  # so little shared memory that plans shrink
ROWS = [3, -1, 7, 0, 99, 5, 18, 2, 11]  # 99 is past the end, -1 is skipped


def check(edit: Edit, runner, folder) -> dict[str, torch.Tensor]:
    got = edit.run(runner, folder)
    excess = worst_excess(edit, got)
    assert max(excess.values()) <= 1, excess
    return got


SIMPLE = [
    *(dict(method=m) for m in METHODS),
    *(dict(method=m, rows=ROWS, total=20, act="silu" if m == "untied" else "linear") for m in METHODS),
    dict(method="untied", act="gelu", dtype=F64, weights=F64, d=37, r=5),
    dict(d=61, r=7, n=6, skew=4),
    dict(d=1026, r=20, n=21, weights=BF16, method="noreft", act="gelu_new"),
    dict(dtype=BF16, d=100, r=70, n=5),
    dict(dtype=F16, d=63, r=3, n=5, skew=2),
    dict(dtype=BF16, d=64, r=4, n=12, batch_inner=4, skew=2),
    dict(frozen="U", rows=ROWS, total=20),
    dict(frozen="VPbc", method="untied", act="tanh"),
    dict(want_dh=False),
    dict(frozen="UVPbc"),
]
TENSOR_CORES = [
    dict(dtype=BF16, d=512, r=3, n=40),
    dict(dtype=BF16, d=1024, r=12, n=40),
    dict(dtype=F16, d=1000, r=32, n=33),
    dict(dtype=BF16, d=1024, r=50, n=20, method="noreft"),
    dict(dtype=BF16, d=2048, r=8, rows=ROWS, total=20),
    dict(dtype=BF16, d=4096, r=4, rows=list(range(40)), total=41, weights=BF16),
    dict(dtype=BF16, d=1040, r=16, n=90, method="untied", act="mish"),
    dict(dtype=BF16, d=1024, r=8, method="untied", act="relu", rows=ROWS, total=20),
    dict(dtype=BF16, d=520, r=16, n=90, device=harness.A100),
    dict(dtype=BF16, d=768, r=16, n=700, device=(9, 0, 2, 232448, 8)),
    dict(dtype=F16, d=640, r=24, n=50, device=NARROW),
    dict(dtype=BF16, d=64, r=4, n=12, batch_inner=4),
    *(dict(dtype=BF16, d=520, r=5, n=18, method=m) for m in METHODS),
    dict(dtype=BF16, d=3584, r=8, rows=ROWS, total=20),  # clusters of 7
    dict(dtype=BF16, d=8192, r=34, n=17, method="lobireft", device=(9, 0, 16, 120_000, 16)),  # clusters of 16
    dict(dtype=BF16, d=1024, r=50, rows=ROWS, total=20),  # two passes, dh in place of g
    dict(dtype=F16, d=5120, r=16, n=20),  # slices too wide for one pass
    dict(dtype=BF16, d=512, r=20, n=50, frozen="U"),
    dict(dtype=BF16, d=1000, r=32, n=70),  # one pass with 32 coordinates
    dict(dtype=F16, d=1024, r=24, n=40, method="noreft", rows=ROWS, total=20),
    dict(dtype=BF16, d=512, r=40, n=50, act="gelu", method="untied"),  # sums of z, gp and gz
    dict(dtype=BF16, d=512, r=40, n=50, act="gelu", method="untied", frozen="P"),  # and of gz the vector's alone
    dict(dtype=BF16, d=512, r=20, n=50, frozen="VP", act="silu", method="direft"),
    dict(dtype=BF16, d=512, r=20, n=50, method="lobireft", want_dh=False),
]


# Matrices in registers: four tiles or more for a cluster, of one CTA or two, and three to five stages.
HELD = dict(dtype=BF16, d=1024, r=32, n=130, device=(9, 0, 2, 180_000, 8))
HELD_64 = dict(HELD, r=64)
HELDS = [
    HELD,
    dict(HELD_64, d=512, n=250, method="noreft"),
    dict(HELD, dtype=F16, d=1000, r=20, device=(9, 0, 2, 140_000, 8), method="direft", act="silu"),
    dict(HELD_64, r=50, rows=[*range(3, 102), -1, 109], total=109),
    dict(HELD_64, frozen="UVPbc"),
    dict(HELD, d=512, r=24, n=250, device=(8, 0, 2, 166912, 1)),
]


@pytest.mark.parametrize("kwargs", SIMPLE, ids=str)
def test_edit_on_cuda_cores(kwargs, runner, tmp_path):
    check(Edit(**kwargs), runner, tmp_path)


@pytest.mark.parametrize("kwargs", TENSOR_CORES, ids=str)
def test_edit_on_tensor_cores(kwargs, runner, tmp_path):
    check(Edit(**kwargs), runner, tmp_path)


@pytest.mark.parametrize("kwargs", HELDS, ids=str)
def test_edit_on_tensor_cores_with_matrices_in_registers(kwargs, runner, tmp_path):
    edit = Edit(**kwargs)
    assert policy.fused(edit.n, edit.d, edit.r, 1, 1, False, policy.Device(*edit.device))["held"]
    check(edit, runner, tmp_path)


# Where the matrices do not stay in shared memory.
STREAM = dict(dtype=BF16, d=896, r=8, n=150, device=(8, 6, 2, 60_000, 1))  # 7 pieces, 5 tiles for 4 CTAs
STREAM_12 = dict(dtype=BF16, d=512, r=64, n=100, act="gelu", method="untied", device=(12, 0, 3, 101376, 1))
STREAMED = [
    STREAM,
    STREAM_12,
    dict(dtype=BF16, d=2048, r=16, n=40, device=harness.A100),
    dict(dtype=F16, d=4096, r=50, n=20, device=harness.A100),
    dict(dtype=BF16, d=2048, r=8, rows=ROWS, total=20, device=(8, 0, 4, 120_000, 1)),
    dict(dtype=BF16, d=1048, r=24, n=40, method="untied", act="mish", device=harness.A100),
    dict(dtype=BF16, d=1048, r=50, n=20, method="untied", act="relu", rows=ROWS, total=20, device=harness.A100),
    *(dict(STREAM, method=m, n=18) for m in METHODS),
    dict(STREAM, method="lobireft", want_dh=False),
    dict(STREAM, rows=ROWS, total=20, frozen="U", weights=BF16),
    dict(STREAM, rows=ROWS, total=20, apart=True),
    dict(STREAM, n=300, batch_inner=4),
]


@pytest.mark.parametrize("kwargs", STREAMED, ids=str)
def test_edit_on_tensor_cores_with_streamed_matrices(kwargs, runner, tmp_path):
    edit = Edit(**kwargs)
    matrices = 2 if edit.method == "untied" else 1
    shape = (edit.n, edit.d, edit.r, matrices, matrices, False, policy.Device(*edit.device))
    assert not policy.fused(*shape)["fits"] and policy.fused(*shape, streamed=True)["pieces"] > 1
    got = check(edit, runner, tmp_path)
    if edit.rows is not None:
        left = [i for i in range(edit.total) if i not in edit.rows]
        assert torch.equal(got["out"][left], edit.state[left]) and torch.equal(got["dh"][left], edit.grad[left])


# Into other memory, the rows that are not listed copied by the same launch.
APART = [
    dict(dtype=BF16, d=2048, r=8),  # one pass, clusters
    dict(dtype=BF16, d=1024, r=50),  # two passes
    dict(dtype=F16, d=520, r=5, act="silu", method="untied"),
    dict(dtype=BF16, d=64, r=4, total=600, device=(9, 0, 1, 232448, 8)),  # 256 rows a copying CTA
    dict(dtype=BF16, d=64, r=4, total=24, batch_inner=4),
    dict(d=61, r=7, skew=4),
    dict(dtype=F64, weights=F64, d=36, r=5, act="gelu", method="untied"),
    dict(dtype=BF16, d=512, r=8, frozen="UVPbc"),
    dict(d=64, r=4, frozen="UVPbc"),
    dict(dtype=BF16, d=512, r=8, want_dh=False),
    dict(dtype=BF16, d=512, r=8, rows=[-1, -1]),
    dict(dtype=BF16, d=512, r=8, rows=[]),
    dict(d=60, r=2, rows=list(range(20))),
]


@pytest.mark.parametrize("kwargs", APART, ids=str)
def test_edit_of_rows_apart(kwargs, runner, tmp_path):
    edit = Edit(**{"rows": ROWS, "total": 20, "apart": True} | kwargs)
    got = check(edit, runner, tmp_path)
    left = [i for i in range(edit.total) if i not in edit.rows]
    assert torch.equal(got["out"][left], edit.state[left])
    assert not edit.want_dh or torch.equal(got["dh"][left], edit.grad[left])
    if not edit.batch_inner and not edit.skew and len(edit.rows) == len(ROWS):  # in place it gives the same bits
        edit.apart = False
        there = check(edit, runner, tmp_path / "in_place")
        assert all(torch.equal(got[name], there[name]) for name in got)


def test_rows_without_elements_have_vectors_of_zeros(runner, tmp_path):
    """The memory of the vectors' gradients is given as it comes, and there is nothing else to do."""
    got = Edit(method="noreft", d=0, n=3).run(runner, tmp_path)
    for name in ("db", "dc"):
        assert torch.equal(got[name], torch.zeros(4))


ACTS = (
    "relu gelu gelu_new silu sigmoid tanh relu2 relu6 leaky_relu quick_gelu mish laplace gelu_10 hardswish sqrtsoftplus"
)


@pytest.mark.parametrize("act", ACTS.split())
def test_activation(act, runner, tmp_path):
    check(Edit(method="direft", act=act, n=20, r=8, d=16), runner, tmp_path)


@pytest.mark.parametrize("kwargs", [SIMPLE[7], *(TENSOR_CORES[i] for i in (0, 4, 6)), STREAM], ids=str)
def test_any_order_of_threads_gives_the_same_bits(kwargs, runner, tmp_path):
    runs = [check(Edit(**kwargs, order=order), runner, tmp_path / str(order)) for order in range(1, 4)]
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


def test_a_row_does_not_depend_on_its_batch(runner, tmp_path):
    all_rows = check(Edit(dtype=BF16, d=1024, r=8, n=40), runner, tmp_path / "all")["out"]
    some = Edit(dtype=BF16, d=1024, r=8, n=40)
    some.state, some.grad, some.n, some.total = some.state[5:9], some.grad[5:9], 4, 4
    assert torch.equal(check(some, runner, tmp_path / "some")["out"], all_rows[5:9])


@pytest.mark.parametrize("r", [32, 64])
def test_a_row_does_not_depend_on_where_the_matrices_are(r, runner, tmp_path):
    """Of few rows they are in shared memory."""
    kwargs = dict(HELD, r=r, device=(9, 0, 2, 180_000, 2), frozen="UVPbc")
    some, device = Edit(**kwargs), policy.Device(*kwargs["device"])
    few, many = (policy.fused(n, some.d, some.r, 1, 1, False, device) for n in (40, some.n))
    assert (few["held"], many["held"]) == (False, True) and few["width"] == many["width"]
    all_rows = check(Edit(**kwargs), runner, tmp_path / "all")
    some.state, some.grad, some.n, some.total = some.state[5:45], some.grad[5:45], 40, 40
    got = check(some, runner, tmp_path / "some")
    assert all(torch.equal(got[name], all_rows[name][5:45]) for name in ("out", "dh"))


def test_skipped_rows_are_not_touched(runner, tmp_path):
    edit = Edit(dtype=BF16, d=64, r=4, rows=ROWS, total=20)
    got = check(edit, runner, tmp_path)
    left = [i for i in range(20) if i not in ROWS]
    assert torch.equal(got["out"][left], edit.state[left]) and torch.equal(got["dh"][left], edit.grad[left])
    assert not got["z"][[1, 4]].any()


# Faults on purpose: what is left out must be noticed, in some order of the threads.
TILED = dict(dtype=BF16, d=512, r=8, n=70, device=(9, 0, 2, 40_000, 8))  # clusters of 4, two stages; one pass: four
AHEAD = dict(dtype=BF16, d=512, r=32, n=70, device=(9, 0, 2, 52_000, 8))  # three stages: the next tile is shrunk first
FORWARD = dict(frozen="UVPbc", want_dh=False)  # alone
HELD_FORWARD = dict(HELD, n=98) | FORWARD
ALONE = dict(dtype=BF16, d=128, r=32, n=90, device=(9, 0, 2, 232448, 8))  # a cluster is one CTA
ALONE_16 = dict(dtype=BF16, d=128, r=16, n=24, device=(9, 0, 1, 232448, 8))
WORKERS, MOVER, OWNERS = "0 7", "8 8", "9 11"  # warps
COPY = dict(dtype=BF16, d=64, r=4, rows=ROWS, total=20, apart=True)
SUMS = dict(dtype=BF16, d=128, r=8, n=300, act="gelu", method="untied", device=(9, 0, 1, 232448, 8))


def fails(edit: Edit, runner, folder) -> bool:
    try:
        return not max(worst_excess(edit, edit.run(runner, folder)).values()) <= 1
    except RuntimeError:
        return True


def noticed(kwargs: dict, runner, folder, plant: str = "") -> bool:
    return any(fails(Edit(**kwargs, order=order, plant=plant), runner, folder) for order in range(1, 9))


@pytest.mark.parametrize(
    "kwargs",
    [TILED, AHEAD | FORWARD, HELD_FORWARD, ALONE, ALONE_16, STREAM, STREAM_12 | FORWARD, SUMS, COPY, {}],
    ids="clusters ahead held alone alone_16 streamed streamed_12 sums copy cores".split(),
)
def test_without_faults_all_is_well(kwargs, runner, tmp_path):
    assert not noticed(kwargs, runner, tmp_path)


@pytest.mark.parametrize(
    ("plant", "kwargs"),
    [
        pytest.param("cluster 0 0", TILED | FORWARD, id="the cluster barrier"),
        pytest.param(f"block 0 0 {WORKERS}", TILED | FORWARD, id="the barrier before what expands is used"),
        pytest.param(f"arrival 0 0 {WORKERS}", TILED | FORWARD, id="the wait for the first tile"),
        pytest.param(f"arrival 1 0 {WORKERS}", TILED | FORWARD, id="the first wait for coordinates"),
        pytest.param(f"arrival 3 0 {WORKERS}", TILED | FORWARD, id="the wait for the second tile"),
        pytest.param(f"arrival 4 0 {WORKERS}", TILED | FORWARD, id="the second wait for coordinates"),
        pytest.param(f"arrival 6 0 {WORKERS}", TILED | FORWARD, id="the wait for the third tile"),
        pytest.param(f"arrival 0 0 {OWNERS}", TILED | FORWARD, id="the first wait for sums"),
        pytest.param(f"arrival 1 0 {OWNERS}", TILED | FORWARD, id="the second wait for sums"),
        pytest.param(f"arrival 0 0 {MOVER}", TILED | FORWARD, id="the wait for the first tile to be given back"),
        pytest.param("copy 0 0", TILED | FORWARD, id="the wait before a stage is filled again"),
        pytest.param(f"warp 0 0 {WORKERS}", TILED | FORWARD, id="a warp's lanes have read what it gives back"),
        pytest.param(f"warp 1 0 {WORKERS}", TILED | FORWARD, id="the same of the next tile"),
        pytest.param(f"arrival 1 0 {WORKERS}", AHEAD | FORWARD, id="ahead: the wait for the second tile"),
        pytest.param(f"arrival 2 0 {WORKERS}", AHEAD | FORWARD, id="ahead: the first wait for coordinates"),
        pytest.param(f"arrival 1 0 {OWNERS}", AHEAD | FORWARD, id="ahead: the second wait for sums"),
        pytest.param(f"block 0 0 {WORKERS}", HELD_FORWARD, id="in registers: the barrier before the matrices are read"),
        pytest.param(
            "cluster 0 0", HELD_FORWARD, id="in registers: the barrier before tiles come where the matrices were"
        ),
        pytest.param(f"arrival 0 0 {WORKERS}", HELD_FORWARD, id="in registers: the wait for the first tile"),
        pytest.param(f"arrival 1 0 {WORKERS}", HELD_FORWARD, id="in registers: the wait for the second tile"),
        pytest.param(f"arrival 2 0 {WORKERS}", HELD_FORWARD, id="in registers: the first wait for coordinates"),
        pytest.param(f"arrival 0 0 {OWNERS}", HELD_FORWARD, id="in registers: the first wait for sums"),
        pytest.param(f"arrival 1 0 {OWNERS}", HELD_FORWARD, id="in registers: the second wait for sums"),
        pytest.param(f"warp 0 0 {WORKERS}", ALONE | FORWARD, id="no cluster: a warp's lanes have stored their sums"),
        pytest.param(
            f"warp 0 0 {OWNERS}", ALONE_16 | FORWARD, id="no cluster: a warp's lanes have stored their coordinates"
        ),
        pytest.param("cluster 0 1", TILED, id="one pass: the cluster barrier"),
        pytest.param(f"block 0 1 {WORKERS}", TILED, id="one pass: the barrier before what expands is used"),
        pytest.param(f"arrival 0 1 {WORKERS}", TILED, id="one pass: the wait for the first tile"),
        pytest.param(f"arrival 2 1 {WORKERS}", TILED, id="one pass: the first wait for coordinates"),
        pytest.param(f"arrival 4 1 {WORKERS}", TILED, id="one pass: the first wait for the CTA's other warps"),
        pytest.param(f"arrival 11 1 {WORKERS}", TILED, id="one pass: the third wait for the second input"),
        pytest.param(f"arrival 0 1 {OWNERS}", TILED, id="one pass: the first wait for sums"),
        pytest.param("copy 0 1", TILED, id="one pass: the wait before a stage is filled again"),
        pytest.param(
            f"block 0 1 {OWNERS}", TILED, id="one pass: all sums have been read before the vectors come there"
        ),
        pytest.param(f"block 1 1 {OWNERS}", TILED, id="one pass: the barrier before the vectors are added"),
        pytest.param(f"warp 1 1 {WORKERS}", TILED, id="one pass: a warp's lanes have read what it gives back"),
        pytest.param("block 0 0", STREAM | FORWARD, id="streamed: the CTA barrier (A)"),
        pytest.param("block 1 0", STREAM | FORWARD, id="streamed: the CTA barrier (B)"),
        pytest.param("block 13 0", STREAM | FORWARD, id="streamed: the CTA barrier (B) of the last piece"),
        pytest.param("block 15 0", STREAM | FORWARD, id="streamed: the CTA barrier (C)"),
        pytest.param("block 16 0", STREAM | FORWARD, id="streamed: the CTA barrier (D)"),
        pytest.param("warp 0 0", STREAM | FORWARD, id="streamed: a warp's lanes have edited what it stores"),
        pytest.param("copy 0 0", STREAM | FORWARD, id="streamed: the first wait for a copy"),
        pytest.param("block 0 2", SUMS, id="sums: the CTA barrier after the arrivals are made"),
        pytest.param("arrival 0 2", SUMS, id="sums: the first waits, for a tile and for a stage to be free"),
        pytest.param("arrival 1 2", SUMS, id="sums: the second waits"),
        pytest.param("block 0 0", dict(), id="CUDA cores: the first CTA barrier"),
        pytest.param("block 1 0", COPY, id="copy: the CTA barrier before the marks are read"),
    ],
)
def test_a_barrier_or_wait_left_out_is_noticed(plant, kwargs, runner, tmp_path):
    assert noticed(kwargs, runner, tmp_path, plant)


@pytest.mark.parametrize(
    "patches",
    [
        {"edit_both.cuh": ("second_sum, row + Depth,", "second_sum, row + Depth + 8,")},
        {"edit_both.cuh": ("float* vectors = cta.received(0);", "float* vectors = cta.received(0) + 8192;")},
    ],
    ids=["a coordinate", "past the end of shared memory"],
)
def test_an_index_shifted_by_one_is_noticed(patches, runner, tmp_path):
    faulty = harness.build(tmp_path / "build", patches=patches, reuse=runner.parent)
    assert noticed(TILED, faulty, tmp_path)


def test_a_patch_reaches_the_units_that_are_made_of_its_file_and_no_others(runner):
    def units(name: str) -> set[str]:
        return {listing.stem for listing in runner.parent.glob("*.d") if name in harness.made_of(listing)}

    assert units("edit_streamed.cuh") == {"edit_streamed_forward", "edit_streamed_backward"}
    fused = {f"edit_{road}_{way}" for road in ("fused", "held") for way in ("forward", "backward")}
    assert units("edit_cta.cuh") == units("edit_streamed.cuh") | fused | {"edit_both", "edit_sums"}
    assert "runner" not in units("policy.h") >= units("edit_args.h") | {"retract", "launch"}


POOLED = [
    dict(dtype=BF16, d=512),
    dict(dtype=F16, d=1000),
    dict(dtype=F32, d=61, skew=4),
    dict(dtype=BF16, d=100, weights=BF16),
    dict(dtype=F64, weights=F64, d=36),
    dict(dtype=BF16, d=64, batch_inner=4),
]


@pytest.mark.parametrize("kwargs", POOLED, ids=str)
def test_rows_of_many_adapters(kwargs, runner, tmp_path):
    """Rows past the end, adapters that are not there and lines out of the pool are skipped, as a GPU cannot say so."""
    dtype, d, weights = kwargs["dtype"], kwargs["d"], kwargs.get("weights", F32)
    inner, total = kwargs.get("batch_inner", 0), 20
    pool, made = pools.pool(d, weights), pools.adapters(d)
    made = [([None if t is None else t.to(weights) for t in w], act) for w, act in made]
    table = torch.cat([pool.table, torch.tensor([[9999, 4, 0, 1]], dtype=torch.int32)])
    rows = torch.tensor([3, -1, 7, 0, 99, 5, 18, 2, 11, 12, 13, 14])
    which = torch.tensor([0, 1, 1, 2, 3, 3, 4, 5, -1, 6, 7, 99])
    state = torch.randn(total, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    case = harness.Case(runner, tmp_path)
    laid = state.view(-1, inner, d).transpose(0, 1).contiguous() if inner else state
    case.load("h", laid, skew=kwargs.get("skew", 0))
    for name, tensor in dict(index=rows, adapter=which, table=table, A=pool.A, U=pool.U, b=pool.b, c=pool.c).items():
        case.load(name, tensor)
    strides = dict(h__inner=inner, h__outer_stride=d, h__inner_stride=total // inner * d) if inner else {}
    case.set(
        n=len(rows), total=total, d=d, type=harness.TYPES[dtype], h="h", index="index", adapter="adapter", A="A", U="U"
    )
    case.set(b="b", c="c", table="table", vectors=len(pool.A), adapters=len(table), most_r=pool.most_r, **strides)
    case.set(**{f"{name}__type": harness.TYPES[weights] for name in "AUbc"})
    case.call("pooled")
    case.want("h")
    got = case.run()["h"]
    got = got.view(inner, -1, d).transpose(0, 1).reshape(total, d) if inner else got
    exact = pools.expected(state, rows, which, made, F64)
    plain = pools.expected(state, rows, which, made).double()
    step = 2.0 ** -{F32: 24, BF16: 8, F16: 11, F64: 53}[dtype]
    # V - P is rounded to the pool's dtype.
    rounding = step + (0 if weights is F64 else 2.0 ** -{F32: 24, BF16: 8}[weights])
    assert (got.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2 * rounding * exact.abs().max()
    untouched = [i for i in range(total) if i not in (3, 7, 0, 5, 18, 2, 12)]
    assert torch.equal(got[untouched], state[untouched])
