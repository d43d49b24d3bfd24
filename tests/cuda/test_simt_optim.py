"""The CUDA kernels of the retraction and the optimizer step, run on the host as test_simt.py runs those of the edit."""

from __future__ import annotations

import pytest
import torch
from simt import harness

from fastreft import reference

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="needs g++ on Linux")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


# So little shared memory that the columns of all but small matrices come in chunks, anew for every pass.
CHUNKS = (8, 6, 4, 49152, 1)
DEVICES = pytest.mark.parametrize("device", [harness.H200, harness.A100, CHUNKS], ids=["clusters", "single", "chunks"])


def items(case: harness.Case, skew: int = 0, **columns) -> None:
    """One field of every item from each list of tensors, ``skew`` elements past a 16-byte boundary."""
    for key, tensors in columns.items():
        for i, tensor in enumerate(tensors):
            case.set(**{f"{key}__{i}": case.load(f"{key}{i}", tensor, skew=skew * tensor.element_size())})
    for i, tensor in enumerate(columns["param"]):
        case.set(**{f"r__{i}": tensor.shape[0], f"d__{i}": tensor.shape[1], f"type__{i}": harness.TYPES[tensor.dtype]})
    case.set(count=len(columns["param"]))


def statuses(got, count):
    return got.pop("SCRATCH")[:count].tolist()


def retract(matrices, runner, folder, skew=0, **kwargs):
    case = harness.Case(runner, folder, **kwargs)
    items(case, skew, param=matrices)
    case.call("retract")
    case.tensors["SCRATCH"] = (torch.int32, (-1,))
    case.want(*(f"param{i}" for i in range(len(matrices))), "SCRATCH")
    got = case.run()
    status = statuses(got, len(matrices))
    return list(got.values()), status


def skewed(r, d, dtype, seed=0):
    torch.manual_seed(seed)
    return (torch.linalg.qr(torch.randn(d, r, dtype=F64))[0].T + 0.3 * torch.randn(r, d) / d**0.5).to(dtype)


@DEVICES
@pytest.mark.parametrize(
    "shapes", [[(4, 1100), (1, 64), (7, 33)], [(64, 600)], [(16, 2048), (3, 8)], [(70, 80)], [(32, 32)]], ids=str
)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_retraction(dtype, shapes, device, runner, tmp_path):
    given = [skewed(r, d, dtype) for r, d in shapes]
    got, status = retract(given, runner, tmp_path, device=device)
    again, _ = retract(given, runner, tmp_path, device=device, seed=2)
    exact = [m.double() for m in given]
    reference.retract_(exact)
    eps = torch.finfo(dtype).eps
    for R, Q, same in zip(got, exact, again, strict=True):
        # The condition of these matrices is below 10; a square one's is not bounded that way.
        slack = 100 if R.shape[0] * 2 > R.shape[1] else 4
        assert (R.double() - Q).abs().max() <= slack * eps
        if dtype != BF16:
            # fp64 sums of d terms round like sqrt(d); fp32's are summed in fp64.
            terms = R.shape[1] if dtype == F64 else 1
            assert (R.double() @ R.double().T - torch.eye(len(R))).abs().max() <= (8 + terms**0.5) * eps
        assert torch.equal(R, same)
    assert status == [0] * len(shapes)


ORDERS = range(1, 6)  # of the threads, in which planted faults are looked for


def wrong(runner, folder, r=8, **kwargs) -> bool:
    """Whether a retraction of two matrices ends in an error or with others than it should. Their condition is below 10, and
    their rows are far from orthogonal: a wrong pivot of others is mended by the polish."""
    near = torch.eye(r) + 0.3 * torch.rand(r, r, generator=torch.Generator().manual_seed(0))
    given = [near @ skewed(r, 2048, F32), skewed(3, 300, F32)]
    try:
        got, _ = retract(given, runner, folder, **kwargs)
    except RuntimeError:
        return True
    allowed = 4 * torch.finfo(F32).eps
    return not all((R.double() - reference_q(m)).abs().max() <= allowed for R, m in zip(got, given, strict=True))


@pytest.mark.parametrize("r", [8, 20])
@pytest.mark.parametrize("device", [harness.H200, CHUNKS], ids=["clusters", "chunks"])
def test_without_faults_a_retraction_is_right(device, r, runner, tmp_path):
    assert not any(wrong(runner, tmp_path, r, device=device, seed=seed) for seed in ORDERS)


# The barriers of a thread in their order. A matrix of 8 rows is factored by one warp, which has none of the CTA's, one of 20 by
# all: those of that loop, three a row from 4 on, end at 4 + 3 * 20. Without what comes before 4, or without the waits for what
# the CTAs send each other, there is NaN in the Gram matrix, and a matrix that is finite itself goes the other way, to the same
# result: those are left out of a step.
@pytest.mark.parametrize(
    ("plant", "device", "r"),
    [
        pytest.param("cluster 0 0", harness.H200, 8, id="the other CTAs have started"),
        pytest.param("block 4 0", harness.H200, 8, id="what the warp found is there"),
        pytest.param("block 6 0", harness.H200, 8, id="the product is there"),
        pytest.param("block 4 0", harness.H200, 20, id="cholesky: the pivot has been read"),
        pytest.param("block 5 0", harness.H200, 20, id="cholesky: the column is there"),
        pytest.param("block 6 0", harness.H200, 20, id="cholesky: the rest is there"),
        pytest.param("block 64 0", harness.H200, 20, id="invert: the inverse is there"),
        pytest.param("block 65 0", harness.H200, 20, id="the factor is there"),
        pytest.param("block 0 0", CHUNKS, 20, id="chunks: what the CTA works with is there"),
        pytest.param("block 3 0", CHUNKS, 20, id="chunks: the first has been used"),
        pytest.param("block 4 0", CHUNKS, 20, id="chunks: the second has been fetched"),
    ],
)
def test_a_barrier_left_out_of_a_retraction_is_noticed(plant, device, r, runner, tmp_path):
    assert any(wrong(runner, tmp_path, r, device=device, plant=plant, seed=seed) for seed in ORDERS)


@pytest.mark.parametrize("device", [harness.H200, CHUNKS], ids=["clusters", "chunks"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_unaligned_matrices_have_the_bits_of_aligned_ones(dtype, device, runner, tmp_path):
    """Element by element as by quads; odd widths are never aligned."""
    given = [skewed(r, d, dtype) for r, d in [(4, 1100), (5, 77), (2, 2048), (9, 1030)]]
    aligned, _ = retract(given, runner, tmp_path / "0", device=device)
    for skew in (1, 3):
        moved, _ = retract(given, runner, tmp_path / str(skew), skew, device=device)
        assert all(map(torch.equal, aligned, moved))


def test_retraction_of_dependent_rows_and_of_what_is_not_finite(runner, tmp_path):
    dependent, broken = skewed(6, 40, F32), skewed(3, 300, F32)
    dependent[2], dependent[4] = 0, dependent[1]
    broken[1, 2] = float("nan")
    got, status = retract([dependent, broken, skewed(5, 50, BF16)], runner, tmp_path)
    assert status == [1, 2, 0]
    assert (got[0] @ got[0].T - torch.eye(6)).abs().max() < 1e-6
    assert (got[0][:2] - reference_q(dependent[:2])).abs().max() < 1e-6
    assert torch.equal(got[1].nan_to_num(7.0), broken.nan_to_num(7.0))


@pytest.mark.parametrize("device", [harness.H200, CHUNKS], ids=["clusters", "chunks"])
def test_a_matrix_whose_products_overflow_is_retracted_all_the_same(device, runner, tmp_path):
    huge, broken = 1e30 * skewed(4, 1100, F32), 1e30 * skewed(3, 1100, F32)
    broken[2, 7] = float("inf")
    got, status = retract([huge, broken, 1e30 * skewed(5, 52, BF16)], runner, tmp_path, device=device)
    assert status == [0, 2, 0]
    for R, tolerance in ((got[0], 1e-6), (got[2].float(), 0.02)):
        assert (R @ R.T - torch.eye(len(R))).abs().max() < tolerance
    assert (got[0] - reference_q(huge)).abs().max() < 1e-6
    assert torch.equal(got[1], broken)


def reference_q(R):
    R = R.double()
    reference.retract_([R])
    return R


STEP = dict(lr=0.02, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, correction1=0.271, correction2=0.0297)


def step_reference(R, g, m, v, orthonormal):
    """The step of csrc/edit.h (StepItem) in fp64."""
    R, g, m, v = (x.double() for x in (R, g, m, v))
    if orthonormal:
        A = g @ R.T
        g = g - 0.5 * (A + A.T) @ R
    else:
        R = R * (1 - STEP["lr"] * STEP["weight_decay"])
    m = STEP["beta1"] * m + (1 - STEP["beta1"]) * g
    v = STEP["beta2"] * v + (1 - STEP["beta2"]) * g * g
    Y = R - STEP["lr"] * (m / STEP["correction1"]) / ((v / STEP["correction2"]).sqrt() + STEP["eps"])
    return (reference_q(Y) if orthonormal else Y), m, v


class Step:
    """Parameters of these shapes with gradients and moments, and a step of them."""

    def __init__(self, shapes, orthonormal, dtype):
        torch.manual_seed(3)
        self.orthonormal, self.count = orthonormal, len(shapes)
        self.dtype, self.moments = dtype, F64 if dtype == F64 else F32
        self.param = [
            (reference_q(torch.randn(*s)) if o else torch.randn(*s, dtype=F64)).to(dtype)
            for s, o in zip(shapes, orthonormal, strict=True)
        ]
        self.g = [torch.randn(*s, dtype=F64).to(dtype) for s in shapes]
        self.m = [0.1 * torch.randn(*s, dtype=F64).to(self.moments) for s in shapes]
        self.v = [torch.rand(*s, dtype=F64).to(self.moments) + 0.01 for s in shapes]

    def run(self, runner, folder, skew=0, **kwargs):
        case = harness.Case(runner, folder, **kwargs)
        items(case, skew, param=self.param, g=self.g, m=self.m, v=self.v)
        case.set(**STEP, **{f"orthonormal__{i}": int(o) for i, o in enumerate(self.orthonormal)})
        case.call("step")
        case.tensors["SCRATCH"] = (torch.int32, (-1,))
        case.want(*(f"{k}{i}" for k in ("param", "m", "v") for i in range(self.count)), "SCRATCH")
        got = case.run()
        assert statuses(got, self.count) == [0] * self.count
        return got

    def excess(self, got) -> float:
        """The largest error against fp64 over what is allowed."""
        worst = 0.0
        for i, o in enumerate(self.orthonormal):
            want = step_reference(self.param[i], self.g[i], self.m[i], self.v[i], o)
            for key, x in zip(("param", "m", "v"), want, strict=True):
                error = (got[f"{key}{i}"].double() - x).abs().max() / x.abs().max()
                # m and v are fp32 whatever the parameter is; 32 roundings for the r-term products before them.
                allowed = 32 * torch.finfo(self.dtype if key == "param" else self.moments).eps
                worst = max(worst, float(error / allowed) if error == error else float("inf"))
        return worst


@DEVICES
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_step(dtype, device, runner, tmp_path):
    shapes = [(4, 1100), (4, 1100), (4, 1), (20, 64), (70, 130), (3, 2047), (3, 2047)]
    step = Step(shapes, [True, False, False, True, True, True, False], dtype)
    assert step.excess(step.run(runner, tmp_path, device=device)) <= 1


@pytest.mark.parametrize("device", [harness.H200, CHUNKS], ids=["clusters", "chunks"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_a_step_of_unaligned_parameters_has_the_bits_of_aligned_ones(dtype, device, runner, tmp_path):
    """In any order of the threads, too."""
    step = Step([(4, 1100), (4, 1100), (3, 77), (2, 2048), (1, 9001)], [True, False, True, True, False], dtype)
    aligned = step.run(runner, tmp_path / "0", device=device)
    for skew in (0, 1):
        moved = step.run(runner, tmp_path / "1", skew, device=device, seed=2 + skew)
        assert all(torch.equal(aligned[key], moved[key]) for key in aligned)


def test_a_step_writes_nothing_past_a_parameter_whose_elements_are_no_whole_quads(runner, tmp_path):
    """Every block is one of exactly its size under AddressSanitizer."""
    step = Step([(1, size) for size in (1, 3, 5, 8191, 8193)], [False] * 5, BF16)
    assert step.excess(step.run(runner, tmp_path)) <= 1


def faulty(runner, folder, device, plant, seed) -> bool:
    step = Step([(8, 2048)], [True], F32)
    try:
        return not step.excess(step.run(runner, folder, device=device, plant=plant, seed=seed)) <= 1
    except (RuntimeError, AssertionError):
        return True


@pytest.mark.parametrize("device", [harness.H200, CHUNKS], ids=["clusters", "chunks"])
def test_without_faults_a_step_is_right(device, runner, tmp_path):
    assert not any(faulty(runner, tmp_path, device, "", seed) for seed in ORDERS)


# Of the waits for what CTAs send each other (arrivals) the first warp has two a sum, for its share and for the sums, the others
# one.
@pytest.mark.parametrize(
    ("plant", "device"),
    [
        pytest.param("block 1 0", harness.H200, id="the chunk has been fetched"),
        pytest.param("block 2 0", harness.H200, id="the warps' sums are there"),
        pytest.param("block 3 0", harness.H200, id="the CTA's part is there"),
        pytest.param("arrival 0 0 0 0", harness.H200, id="the CTAs' parts are there"),
        pytest.param("arrival 1 0 0 0", harness.H200, id="the sums are there, in the first warp"),
        pytest.param("arrival 0 0 1 15", harness.H200, id="the sums are there"),
        pytest.param("block 4 0", harness.H200, id="the tangent's matrix is there"),
        pytest.param("block 5 0", harness.H200, id="the tangent gradient is there"),
        pytest.param("block 6 0", harness.H200, id="Y is there"),
        pytest.param("arrival 2 0 0 0", harness.H200, id="the CTAs' parts of Y Y^T are there"),
        pytest.param("arrival 3 0 0 0", harness.H200, id="the sums of Y Y^T are there, where one warp factors them"),
        pytest.param("block 17 0", CHUNKS, id="chunks: the first product is there"),
        pytest.param("block 20 0", CHUNKS, id="chunks: the second product is there"),
    ],
)
def test_a_barrier_left_out_of_a_step_is_noticed(plant, device, runner, tmp_path):
    assert any(faulty(runner, tmp_path, device, plant, seed) for seed in ORDERS)


def correction(beta: float, t: int) -> float:
    """1 - beta^t as bias_correction in csrc/edit.h multiplies it."""
    power = 1.0
    while t:
        power, t, beta = power * beta if t & 1 else power, t >> 1, beta * beta
    return 1 - power


@DEVICES
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_step_reads_its_rate_and_ages_from_memory(dtype, device, runner, tmp_path):
    """As a captured step does: the bits of the step with the same numbers given."""
    torch.manual_seed(5)
    shapes, orthonormal, ages = [(4, 1100), (4, 1100), (9, 1100), (1, 3)], [True, True, False, False], [3, 40, 3, 1000]
    param = [reference_q(torch.randn(*s)).to(dtype) for s in shapes]
    g = [torch.randn(*s, dtype=dtype) for s in shapes]
    v = [torch.rand(*s, dtype=dtype) + 0.01 for s in shapes]
    lr = torch.tensor([0.03], dtype=dtype)

    def step(folder, live, **numbers):
        case = harness.Case(runner, folder, device=device)
        items(case, param=param, g=g, m=g, v=v)
        if live:
            case.set(**{f"age__{i}": case.load(f"age{i}", torch.tensor([float(t)])) for i, t in enumerate(ages)})
            case.set(live_lr=case.load("lr", lr), live_lr__type=harness.TYPES[dtype])
        case.set(**STEP | numbers, **{f"orthonormal__{i}": int(o) for i, o in enumerate(orthonormal)})
        case.call("step")
        case.want(*(f"{k}{i}" for k in ("param", "m", "v") for i in range(len(shapes))))
        return case.run()

    got = step(tmp_path / "live", True, lr=2.0)
    for age in set(ages):
        numbers = {f"correction{i}": correction(STEP[f"beta{i}"], age) for i in (1, 2)}
        want = step(tmp_path / str(age), False, lr=2 * lr.item(), **numbers)
        for i, t in enumerate(ages):
            for key in ("param", "m", "v"):
                same = torch.equal(got[f"{key}{i}"], want[f"{key}{i}"])
                assert same if t == age or key != "param" else not same, (key, i, age)


def test_step_leaves_an_item_alone_whose_gradient_is_not_finite_and_shortens_a_step_that_is_singular(runner, tmp_path):
    torch.manual_seed(4)
    good, bad = reference_q(torch.randn(3, 50)).float(), reference_q(torch.randn(3, 50)).float()
    g = torch.randn(3, 50)
    g[2, 7] = float("inf")
    case = harness.Case(runner, tmp_path)
    # The direction U is R itself in the first row: Y = R - lr U has a vanishing first row at lr = 1.
    m, v = torch.zeros(3, 50), torch.full((3, 50), 1e-12)
    m[0] = good[0] * 1e-6
    items(case, param=[bad, good], g=[g, torch.zeros(3, 50)], m=[m, m.clone()], v=[v, v.clone()])
    case.set(lr=1.0, beta1=1, beta2=1, eps=0, orthonormal__0=1, orthonormal__1=1)
    case.call("step")
    case.tensors["SCRATCH"] = (torch.int32, (-1,))
    case.want("param0", "m0", "v0", "param1", "SCRATCH")
    got = case.run()
    assert statuses(got, 2) == [2, 1]
    assert torch.equal(got["param0"], bad) and torch.equal(got["m0"], m) and torch.equal(got["v0"], v)
    assert (got["param1"] - good).abs().max() < 1e-6  # half of R along R: retracted to R again
