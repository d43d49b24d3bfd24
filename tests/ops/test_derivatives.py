"""Every way of differentiating that torch offers gives the oracle's numbers, or is refused by name."""

import warnings

import pytest
import torch
from family import weights
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp, jacobian

from fastreft import functional as F
from fastreft import reference
from fastreft.interventions import INTERVENTIONS
from fastreft.ops import native

D, R, N = 6, 2, 5
KINDS = pytest.mark.parametrize("kind", list(INTERVENTIONS))
ACTS = pytest.mark.parametrize("act_fn", [None, "gelu", "tanh"])
ROWS = torch.tensor([3, -1, 0, 3])
DOUBLE = torch.float64


def module(kind, act_fn=None):
    torch.manual_seed(0)
    settings = {} if kind in ("consreft", "lobireft") else {"act_fn": act_fn}
    made = INTERVENTIONS[kind](embed_dim=D, low_rank_dimension=R, dtype=DOUBLE, add_bias=True, **settings)
    for p in made.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return made


def hidden(*shape):
    torch.manual_seed(1)
    return torch.randn(*(shape or (N, D)), dtype=DOUBLE)


def oracle(made, h, rows=None):
    """The same edit in plain torch."""
    act = (
        made.act
        if made.act is not None
        else {None: None, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh}[made.act_fn]
    )
    if rows is None:
        return reference.edit(h, *made.weights(), act)
    return reference.edit_rows(h, rows, *made.weights(), act)


@KINDS
@ACTS
def test_the_second_order_of_every_row(kind, act_fn):
    made = module(kind, act_fn)
    params = list(made.parameters())

    def orders(call):
        h = hidden().requires_grad_()
        first = torch.autograd.grad(call(h).pow(3).sum(), [h, *params], create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in first if g is not None)
        return first, torch.autograd.grad(total, [h, *params], allow_unused=True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = orders(made)
    for ours, theirs in zip(found, orders(lambda h: oracle(made, h)), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.zeros(1) if a is None else a, torch.zeros(1) if b is None else b)


@KINDS
def test_gradgradcheck(kind):
    made = module(kind, "tanh")
    names = [name for name, _ in made.named_parameters()]
    h = hidden().requires_grad_()

    def call(h, *params):
        return torch.func.functional_call(made, dict(zip(names, params, strict=True)), (h,))

    inputs = (h, *(p.detach().requires_grad_() for p in made.parameters()))
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("form", ["edit_rows", "edit_rows_"])
def test_listed_rows_have_one_derivative_and_say_so(form):
    U, V, b = weights("loreft", D, R, DOUBLE)
    leaves = [t.requires_grad_() for t in (U, V, b)]
    h = hidden().requires_grad_()
    call = getattr(F, form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = call(h * 1, ROWS, U, V, U, b)
        first = torch.autograd.grad(out.square().sum(), [h, *leaves], create_graph=True)
    wanted = torch.autograd.grad(reference.edit_rows(h, ROWS, U, V, U, b).square().sum(), [h, *leaves])
    for a, w in zip(first, wanted, strict=True):
        torch.testing.assert_close(a, w)
    if native.BACKEND != "native":
        return
    with pytest.raises(RuntimeError, match=rf"fastreft\.functional\.{form} has no second derivative"):
        torch.autograd.grad(first[1].square().sum(), leaves)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("form", ["edit", "edit_rows", "edit_rows_"])
def test_many_gradients_at_once(form):
    U, V, b = weights("loreft", D, R, DOUBLE)
    leaves = [t.requires_grad_() for t in (U, V, b)]
    h = hidden().requires_grad_()
    many = hidden(4, N, D)

    def gradients(out, given, **how):
        return torch.autograd.grad(out, [h, *leaves], given, retain_graph=True, **how)

    out = F.edit(h, U, V, U, b) if form == "edit" else getattr(F, form)(h * 1, ROWS, U, V, U, b)
    if form == "edit_rows_" and native.quick is not native.Elsewhere:
        with pytest.raises(RuntimeError, match="takes one gradient at a time"):
            gradients(out, many, is_grads_batched=True)
        return
    found = gradients(out, many, is_grads_batched=True)
    wanted = [gradients(out, g) for g in many]
    for i, a in enumerate(found):
        torch.testing.assert_close(a, torch.stack([w[i] for w in wanted]))


@KINDS
@pytest.mark.parametrize("vectorize", [True, False])
def test_torchs_own_jacobians_and_hessians(kind, vectorize):
    made, h = module(kind, "tanh"), hidden(2, D)
    for of in (jacobian, hessian):

        def total(call, of=of):
            return (lambda x: call(x).pow(3).sum()) if of is hessian else call

        found = of(total(made), h, vectorize=vectorize)
        torch.testing.assert_close(found, of(total(lambda x: oracle(made, x)), h))
    torch.testing.assert_close(
        hvp(lambda x: made(x).pow(3).sum(), h, h), hvp(lambda x: oracle(made, x).pow(3).sum(), h, h)
    )


def transforms(call):
    """What torch.func makes of a function of (h, v)."""
    h, v = hidden(2, D), hidden(2, D) + 1
    total = lambda x: call(x).pow(3).sum()  # noqa: E731
    yield torch.func.grad(total)(h)
    yield torch.func.vjp(call, h)[1](v)[0]
    yield torch.func.jvp(call, (h,), (v,))[1]
    yield torch.func.jacrev(call)(h)
    yield torch.func.jacfwd(call)(h)
    yield torch.func.hessian(total)(h)
    yield torch.func.vmap(call)(hidden(3, 2, D))
    yield torch.func.vmap(torch.func.grad(total))(hidden(3, 2, D))
    with forward_ad.dual_level():
        yield forward_ad.unpack_dual(call(forward_ad.make_dual(h, v))).tangent


@KINDS
@pytest.mark.parametrize("listed", [False, True])
def test_torch_func(kind, listed):
    made = module(kind, "tanh")
    rows = torch.tensor([1, -1, 1]) if listed else None
    found = [*transforms(lambda h: made(h, rows=rows, inplace=False))]
    for ours, theirs in zip(found, [*transforms(lambda h: oracle(made, h, rows))], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vmap_over_weights_rows_and_an_ensemble():
    many = [module("loreft", "tanh") for _ in range(3)]
    for i, made in enumerate(many):
        for p in made.parameters():
            p.data.mul_(1 + i)
    params, buffers = torch.func.stack_module_state(many)
    h = hidden(3, N, D)

    def one(p, b, x):
        return torch.func.functional_call(many[0], (p, b), (x,))

    for where, given in ((0, h), (None, h[0])):
        found = torch.func.vmap(one, in_dims=(0, 0, where))(params, buffers, given)
        wanted = torch.stack([oracle(m, h[i] if where == 0 else h[0]) for i, m in enumerate(many)])
        torch.testing.assert_close(found, wanted)
    rows = torch.tensor([[0, -1], [2, 2], [4, 1]])
    found = torch.func.vmap(lambda x, r: F.edit_rows(x, r, *many[0].weights(), act_fn="tanh"))(h, rows)
    torch.testing.assert_close(found, torch.stack([oracle(many[0], x, r) for x, r in zip(h, rows, strict=True)]))


def test_in_place_within_a_transform():
    made = module("loreft")
    found = torch.func.grad(lambda h: made(h * 1, rows=ROWS).pow(3).sum())(hidden())
    torch.testing.assert_close(found, torch.func.grad(lambda h: oracle(made, h, ROWS).pow(3).sum())(hidden()))


def test_nothing_is_left_of_a_transform():
    made, h = module("loreft"), hidden()
    torch.func.vmap(made)(hidden(2, N, D))
    assert torch.equal(made(h), made(h))
