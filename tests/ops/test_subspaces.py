"""An edit by some of R's rows: the formula with a 0/1 factor on its coordinates, in double, gradients and all."""

import oracles
import pytest
import torch
from family import FAMILY, weights

from fastreft import interventions, reference
from fastreft.interventions import INTERVENTIONS
from fastreft.ops import groups, subspaces

B, L, D, R = 4, 3, 16, 6
GROUPS = groups.parse({"b": [4, 5], "a": [0, 2]}, R)
CHOSEN = [(0, 2), None, (), (4, 5)]


def masked(h, U, V, P, b, c, act, mask):
    """h + U^T (m * (act(V h + b) - P h - c)), with m of each sample (B, 1, r)."""
    zero = torch.zeros(*h.shape[:-1], len(U), dtype=h.dtype)
    z = zero if V is None else h @ V.T
    z = z + b if b is not None else z
    z = act(z) if act is not None else z
    z = z - h @ P.T if P is not None else z
    z = z - c if c is not None else z
    return h + (z * mask) @ U


def mask_of(chosen):
    made = torch.zeros(len(chosen), 1, R, dtype=torch.float64)
    for i, rows in enumerate(chosen):
        made[i, 0, list(range(R)) if rows is None else list(rows)] = 1
    return made


def module_of(method, act_fn=None, **more):
    torch.manual_seed(0)
    plain = method in ("consreft", "lobireft")
    made = INTERVENTIONS[method](D, R, act_fn=None if plain else act_fn, dtype=torch.float64, **more)
    return made, None if plain or act_fn is None else torch.relu


@pytest.mark.parametrize("act_fn", [None, "relu"])
@pytest.mark.parametrize("method", FAMILY)
def test_the_formula_and_its_gradients(method, act_fn):
    module, act = module_of(method, act_fn, add_bias=True)
    h = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    g = torch.randn(B, L, D, dtype=torch.float64)
    given = [[0, 2], None, [], [4, 5]]
    of = [h, *module.parameters()]
    ours = module(h, None, given)
    theirs = masked(h, *module.weights(), act, mask_of(CHOSEN))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    for name, mine, wanted in zip(
        ["h", *dict(module.named_parameters())],
        torch.autograd.grad(ours, of, g, allow_unused=True),
        torch.autograd.grad(theirs, of, g, allow_unused=True),
        strict=True,
    ):
        assert (mine is None) == (wanted is None), name
        if mine is not None:
            torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("method", FAMILY)
def test_other_rows_have_no_gradient_at_all(method):
    module, _ = module_of(method)
    h = torch.randn(B, L, D, dtype=torch.float64)
    module(h, None, [[1, 3], [3], [], [1]]).square().sum().backward()
    for name, p in module.named_parameters():
        idle = [i for i in range(R) if i not in (1, 3)]
        assert not p.grad[idle].any() and p.grad[[1, 3]].abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_batch_of_groups_is_each_alone(dtype):
    """Bit for bit, in any dtype; all rows together are the whole edit, and the edits of all groups add up to it."""
    module, _ = module_of("loreft")
    module = module.to(dtype if dtype is torch.float64 else torch.float32)
    h = torch.randn(B, L, D).to(dtype)
    mixed = module(h, None, [[0, 2], None, [], [4, 5]])
    for i, rows in enumerate(([0, 2], list(range(R)), [], [4, 5])):
        assert torch.equal(mixed[i], module(h[i : i + 1], None, [rows])[0])
    assert torch.equal(mixed[1], module(h)[1]) and torch.equal(mixed[2], h[2])
    if dtype is torch.float64:
        parts = sum(module(h, None, [rows] * B) - h for rows in ([0, 1], [2, 3, 4], [5]))
        torch.testing.assert_close(module(h), h + parts, rtol=0, atol=1e-13)


def test_scale_and_dropout_and_a_partition():
    torch.manual_seed(0)
    module = interventions.LoreftIntervention(D, R, subspace_partition=[[0, 3], [3, 5, 4]])
    assert module.partition == (("0", (0, 1, 2)), ("1", (3, 4, 5)))
    h = torch.randn(B, L, D)
    edited = module(h, None, [[1]] * B)
    module.scale = 0.5
    torch.testing.assert_close(module(h, None, [[1]] * B), h + 0.5 * (edited - h))
    module.scale, module.dropout = 1.0, 0.5
    dropped = module.train()(h, None, [[0], [1], [0], [0, 1]])
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * module.eval()(h, None, [[0], [1], [0], [0, 1]])[kept])
    assert 0 < kept.float().mean() < 1


@pytest.mark.parametrize("cls", ["Loreft", "Direft", "Consreft"])
def test_pyrefts_edit_is_the_sum_of_its_groups(cls):
    """pyreft's own outputs, from files."""
    for case in oracles.read(oracles.INTERVENTIONS / f"{cls}.pt"):
        if case["dtype"] != "float64" or case["r"] < 4 or case["act_fn"]:
            continue
        module = INTERVENTIONS[cls.lower()](case["d"], case["r"], dtype=torch.float64)
        raw = case["raw_state_dict"]
        with torch.no_grad():
            module.R.copy_(case["R"].T)
            names = (
                {"b": "learned_source"}
                if cls == "Consreft"
                else {"W": "learned_source.weight", "b": "learned_source.bias"}
            )
            for own, name in names.items():
                module.get_parameter(own).copy_(raw[name])
        h, half = case["h"], case["r"] // 2
        rows = list(range(case["r"]))
        parts = [module(h, None, [some] * len(h)) - h for some in (rows[:half], rows[half:])]
        torch.testing.assert_close(h + sum(parts), case["out"], rtol=0, atol=1e-10)


def test_listed_rows_are_sorted_by_what_edits_them():
    rows = torch.tensor([0, -1, 5, 6, 10, 11])
    (one, a), (two, whole) = subspaces.parts(rows, [(1,), None, (1,)], 4, rows.device)
    assert one.tolist() == [0, -1, 10, 11] and a.tolist() == [1]
    assert two.tolist() == [5, 6] and whole is None
    ((same, only),) = subspaces.parts(rows, [(1,)] * 3, 4, rows.device)
    assert same is rows and only.tolist() == [1]
    ((every, _),) = subspaces.parts(None, [(), (1,)], 3, rows.device)
    assert every.tolist() == [3, 4, 5]
    assert subspaces.parts(rows, [(), ()], 3, rows.device) == []


def test_choices():
    assert [name for name, _ in GROUPS] == ["a", "b"]  # by their first rows
    rows = [groups.rows_of(choice, GROUPS, R, "it") for choice in (("b",), ("a", 1), (0,), ("1",), (), None)]
    assert rows == [(4, 5), (0, 2, 4, 5), (0, 2), (4, 5), (), None]
    assert groups.rows_of((2, "0"), (), R, "it") == (0, 2) and groups.rows_of((0, 1), (), 2, "it") is None
    assert subspaces.parse("a+b").samples == (("a", "b"),)
    assert subspaces.parse(["a+b", 1, None, [], ["a", 1]]).samples == (("a", "b"), (1,), None, (), ("a", 1))
    assert subspaces.parse(torch.tensor([[0, -1], [1, 0]])).samples == ((0,), (1, 0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "subspaces is 3; it must be groups of rows"),
        ([], r"subspaces is \[\]; it must be groups of rows"),
        ([[0], []], r"subspaces gives 1 \[\]"),
        ([0, 1], "subspaces gives 0 0; it must be groups of rows"),
        ([[0, 6]], "subspaces gives '0' the row 6; r is 6, so that rows are 0 to 5"),
        ([[0, 1], [1]], "subspaces has the row 1 in '0' and in '1'; it may be in one group, once"),
        ([[1, 1]], "subspaces has the row 1 in '0' twice"),
        ({"a+b": [0]}, r"subspaces has the name 'a\+b'"),
        ({"1": [0]}, "subspaces has the name '1'"),
        ({1: [0]}, "subspaces has the name 1"),
    ],
)
def test_groups_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        groups.parse(given, R)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (2.5, "subspaces is a float; it must have one entry a sample"),
        ([0.5], r"subspaces has 0\.5 for a sample"),
        ([[[0]]], r"subspaces has \[\[0\]\] for a sample"),
        (torch.ones(2, 2), r"subspaces has shape \(2, 2\) and dtype torch.float32"),
        (torch.ones(2, 2, 2, dtype=torch.int64), r"subspaces has shape \(2, 2, 2\)"),
    ],
)
def test_choices_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        subspaces.parse(given)


def test_a_modules_own_refusals():
    module, _ = module_of("loreft")
    h = torch.randn(2, 3, D, dtype=torch.float64)
    for given, message in (
        ([[0]], "subspaces has 1 entries; it must have one a sample, here 2"),
        ([[6], [0]], "subspaces names 6; this LoreftIntervention has no named subspaces, and rows 0 to 5"),
        (["a", "a"], "subspaces names 'a'; this LoreftIntervention has no named"),
    ):
        with pytest.raises(ValueError, match=message):
            module(h, None, given)
    with pytest.raises(ValueError, match="subspaces has one entry a sample of base"):
        module(h, None, [[0], [1]], rows=torch.tensor([0]))
    with pytest.raises(ValueError, match="subspace_partition gives '0' the row 6"):
        interventions.LoreftIntervention(D, R, subspace_partition=[[0, 7]])


def test_pyvenes_ranges_there_and_back():
    for given in ([[0, 4], [4, 6]], [[0, 1], [1, 2], [2, 6]], [[0, 2, 5], [1, 3, 4]]):
        assert groups.to_pyvene(groups.of_pyvene(given, R)) == given
    assert groups.to_pyvene(()) is None
    with pytest.raises(ValueError, match="'a' the rows 0 and 2, which pyvene would take for a range"):
        groups.to_pyvene(GROUPS)


def test_the_weights_are_those_that_the_reference_takes():
    """Rows listed in place by the fused way, against the plain formula of as few rows."""
    R6, W, b = weights("loreft", D, R, torch.float64)
    h, only = torch.randn(8, D, dtype=torch.float64), torch.tensor([1, 4])
    U, V, P, c, _ = subspaces.restricted((R6, W, R6, b, None), only)
    assert P is U
    wanted = reference.loreft(h, R6[only], W[only], b[only])
    torch.testing.assert_close(reference.edit(h, U, V, P, c), wanted, rtol=0, atol=0)
