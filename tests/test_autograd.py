"""Contract: derivatives of the operators are the straight-through network's, or a NotImplementedError, never zeros.

The network is written here in plain torch: the quantized value, with the slope of x inside the hull. Against it, bit
for bit (mixtures: to rounding): reverse and forward mode, of first, second and third order, torch.func's transforms
nested in one another, the registered operator called directly, a forced backend, float64, and compiled. An operator
without a derivative refuses tensors that are being differentiated, and every operator counts what it writes.
"""

from __future__ import annotations

import oracles
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from askew_kernels import ops
from askew_kernels.ops import RULES, schema
from askew_kernels.ops.autograd import refuse
from askew_kernels.quant import Binary, Codebook, Ternary, Uniform

ROWS = torch.tensor([0.3, 0.2, 0.5, 0.25])
GRIDS = {"uniform": Uniform(4), "binary": Binary(), "codebook": Codebook(oracles.NF4)}


# the codes of packed_dequantize_ are whole numbers, which nothing differentiates
# whose first argument cannot be differentiated
OF_INTEGERS = {"packed_dequantize_", "packed_bands", "packed_bands_codes", "level_product"}
WITHOUT_DERIVATIVE = [n for n, o in schema.OPERATORS.items() if o.derivative is refuse and n not in OF_INTEGERS]


@pytest.fixture
def x(generator):
    return torch.randn(4, 6, generator=generator) * 2


def straight_through(x, s, grid, clip=True):
    s = s.to(x.dtype)[:, None]
    table = torch.tensor(grid.levels, dtype=x.dtype)
    value = (x / s).detach()[..., None]
    q = table[(value - table).abs().argmin(-1)] * s  # no ties among random numbers
    inside = ((x >= s * table[0]) & (x <= s * table[-1])).to(x.dtype) if clip else 1
    return q + (x - x.detach()) * inside


def cubed(f):
    return lambda x: f(x).pow(3).sum()


def twice(f, x):
    w = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(w).pow(3).sum(), w, create_graph=True)
    return torch.autograd.grad(first.sum(), w)[0]


def three_times(f, x):
    w = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(w).pow(4).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w, create_graph=True)
    return torch.autograd.grad(second.sum(), w)[0]


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x + 1))).tangent


def penalty(f, x):
    """The gradient of a gradient's norm, as gradient penalties take it, by backward()."""
    w = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(w).square().sum(), w, create_graph=True)
    slope.square().sum().backward()
    return w.grad


WAYS = {
    "twice": twice, "three times": three_times, "dual numbers": dual, "penalty": penalty,
    "jvp": lambda f, x: jvp(f, (x,), (x + 1,))[1], "grad": lambda f, x: grad(cubed(f))(x),
    "jacrev": lambda f, x: jacrev(f)(x), "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(cubed(f))(x), "reverse twice": lambda f, x: jacrev(jacrev(cubed(f)))(x),
    "forward twice": lambda f, x: jacfwd(jacfwd(cubed(f)))(x),
    "forward inside": lambda f, x: jacrev(jacfwd(cubed(f)))(x),
    "jvp of grad": lambda f, x: jvp(grad(cubed(f)), (x,), (x,))[1],
    "vmap": lambda f, x: vmap(f)(torch.stack([x, 2 * x])),
    "vmap along another": lambda f, x: vmap(f, in_dims=1, out_dims=2)(torch.stack([x, 2 * x], 1)),
    "vmap twice": lambda f, x: vmap(vmap(f))(torch.stack([x, 2 * x, -x, x]).reshape(2, 2, 4, 6)),
    "vmap of grad": lambda f, x: vmap(grad(cubed(f)))(torch.stack([x, 2 * x])),
    "grad of vmap": lambda f, x: grad(lambda y: vmap(cubed(f))(y).sum())(torch.stack([x, 2 * x])),
    "vmap of jvp": lambda f, x: vmap(lambda y: jvp(f, (y,), (y,))[1])(torch.stack([x, 2 * x])),
}  # fmt: skip


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("way", WAYS)
def test_fake_quantize(way, name, clip, backend, x):
    grid = GRIDS[name]
    got = WAYS[way](lambda x: ops.fake_quantize(x, ROWS, grid, ste_clip=clip), x)
    assert torch.equal(got, WAYS[way](lambda x: straight_through(x, ROWS, grid, clip), x))
    assert not (got == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_float64(way, x):
    x = x.double()
    got = WAYS[way](lambda x: ops.fake_quantize(x, ROWS.double(), GRIDS["codebook"]), x)
    torch.testing.assert_close(got, WAYS[way](lambda x: straight_through(x, ROWS, GRIDS["codebook"]), x))


@pytest.mark.parametrize("way", WAYS)
def test_the_registered_operator(way, x):
    def f(x):
        return torch.ops.askew.fake_quantize(x, ROWS, torch.empty(0), [1, -8, 7], True, False, 0)

    assert torch.equal(WAYS[way](f, x), WAYS[way](lambda x: straight_through(x, ROWS, Uniform(4)), x))


@pytest.mark.parametrize("way", WAYS)
def test_one_scale_for_the_whole_tensor(way, x, backend):
    """As Linear(n, 1) and ``per_tensor`` have it."""
    for scale in (ROWS[:1], ROWS[0]):
        got = WAYS[way](lambda x: ops.fake_quantize(x, scale, Uniform(4)), x)  # noqa: B023
        assert torch.equal(got, WAYS[way](lambda x: straight_through(x, ROWS[:1], Uniform(4)), x))


@pytest.mark.parametrize("way", ["jvp", "grad", "vmap", "hessian"])
def test_compiled(way, x):
    torch._dynamo.reset()

    def whole(x):
        return WAYS[way](lambda x: ops.fake_quantize(x, ROWS, Uniform(4)), x)

    assert torch.equal(torch.compile(whole, backend="aot_eager")(x), whole(x))


def test_batched_scales_and_stochastic_rounding(x, backend):
    many, rows = torch.stack([x, x + 1, -x]), torch.stack([ROWS, 2 * ROWS, 3 * ROWS])
    for of, dims, loop in (
        ((many, rows), (0, 0), list(zip(many, rows, strict=True))), ((x, rows), (None, 0), [(x, s) for s in rows]),
        ((many, ROWS), (0, None), [(t, ROWS) for t in many]),
    ):  # fmt: skip
        for options in ({}, {"stochastic": True, "seed": 3}):

            def f(x, s):
                return ops.fake_quantize(x, s, Uniform(4), **options)  # noqa: B023

            assert torch.equal(vmap(f, dims, randomness="same")(*of), torch.stack([f(*args) for args in loop]))
    assert torch.equal(vmap(lambda x: ops.row_sums(x, 4))(many), torch.stack([ops.row_sums(t, 4) for t in many]))


# ---- mixtures -------------------------------------------------------------------------------------------------------

MIXED = [Uniform(2), Ternary(), None, Binary()]
SCALES = torch.stack([2 * ROWS, ROWS, ROWS, 3 * ROWS])


def mixture(x, p):
    return ops.mix_fake_quantize(x, SCALES, p, MIXED)


def plain_mixture(x, p):
    return sum(p[k] * (x if g is None else straight_through(x, SCALES[k], g)) for k, g in enumerate(MIXED))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.fixture
def p(generator):
    return torch.softmax(torch.randn(4, generator=generator), 0)


@pytest.mark.parametrize("way", WAYS)
def test_mixture(way, x, p, backend):
    close(WAYS[way](lambda x: mixture(x, p), x), WAYS[way](lambda x: plain_mixture(x, p), x))


STRENGTHS = {
    "grad": lambda f, x, p: grad(lambda p: f(x, p).pow(3).sum())(p),
    "hessian": lambda f, x, p: hessian(lambda p: f(x, p).pow(3).sum())(p),
    "jvp": lambda f, x, p: jvp(lambda p: f(x, p), (p,), (p + 1,))[1],
    "mixed": lambda f, x, p: jacrev(lambda x: grad(lambda p: f(x, p).pow(2).sum())(p))(x),
    "vmap": lambda f, x, p: vmap(lambda p: f(x, p))(torch.stack([p, p.flip(0)])),
}


@pytest.mark.parametrize("way", STRENGTHS)
def test_strengths(way, x, p, backend):
    close(STRENGTHS[way](mixture, x, p), STRENGTHS[way](plain_mixture, x, p))


def test_second_derivatives_of_a_mixture(x, p, backend):
    found = []
    for f in (mixture, plain_mixture):
        w, q = x.clone().requires_grad_(), p.clone().requires_grad_()
        first = torch.autograd.grad(f(w, q).pow(3).sum(), (w, q), create_graph=True)
        found.append(torch.autograd.grad(first[0].sum() + first[1].square().sum(), (w, q)))
    for got, want in zip(*found, strict=True):
        close(got, want)


def test_learned_scales_are_differentiated_once(x, p, backend):
    w, s = x.clone().requires_grad_(), SCALES.clone().requires_grad_()
    y = ops.mix_fake_quantize(w, s, p, MIXED, learned=True)
    y.sum().backward(retain_graph=True)
    assert w.grad is not None and s.grad is not None
    with pytest.raises(NotImplementedError, match="askew::mix_fake_quantize.*learned=False"):
        torch.autograd.grad(y.sum(), w, create_graph=True)
    with pytest.raises(NotImplementedError, match="askew::mix_fake_quantize.*learned=False"):
        jvp(lambda x: ops.mix_fake_quantize(x, SCALES, p, MIXED, learned=True), (x,), (x,))


# ---- operators without a derivative ---------------------------------------------------------------------------------


def calls(x):
    """{name: arguments}, the first of which may be differentiated"""
    none, one, grid = torch.empty(0), torch.tensor(1.0), [1, -8, 7]
    return {
        "fake_quantize_out_": (x, ROWS, none, grid, torch.empty_like(x)),
        "ste_clip_": (x.clone(), x, ROWS, none, grid),
        "ste_clip_scale_grad_": (x.clone(), x, ROWS, none, grid, True, 0.5),
        "project_interval_": (x, ROWS, none, grid, one),
        "soft_quantize": (x, ROWS, none, grid, one),
        "row_sums": (x, 4), "sam_norm": ([x], [x], [0], 0.1),
        "scales_from_sums_": ([x], [torch.ones(24, 3)], [0, 0, 6], [7.0, 0.0, 0.0]),
        "mse_scales": (x, torch.ones(4, 3), none, grid, 7.0, 0),
        "token_levels": (x, none, [1, -127, 127], 127.0, torch.int8),
        "scaled_sums": (x, torch.ones(4), torch.ones(6), None, torch.float32),
        "stochastic_levels": (x, torch.ones(1), torch.tensor(1)), "luq": (x, 4, torch.tensor(1)),
        "packed_tiles_linear": (x, torch.zeros(1, 1, 4, 32, 4, dtype=torch.int32), ROWS, none, grid, 4, 4, 1, None),
        "packed_bands_linear": (x, torch.zeros(1, 64, dtype=torch.uint8), torch.ones(1, 1, 16), grid, 4, 4, None),
        "packed_bands_conv": (x[None, None], torch.zeros(1, 64, dtype=torch.uint8), torch.ones(1, 1, 16), grid, 4, 4,
                              [2, 2, 1, 1, 1, 1, 0, 0, 0, 0], False, None),
        "packed_depthwise": (x[None, :, None], torch.ones(2, x.shape[1]), [2, 1, 1, 1, 1, 1, 0, 0, 0, 0], None),
        **{r.operator: ([x], [x], [x * x for _ in r.buffers], [ROWS], [none], grid, [], [], [], one, one, one, 1.0,
                        r.numbers_of(r.defaults), False, True, False, False) for r in RULES.values()},
        "sam_perturb_": ([x], [x], [x.clone()], torch.tensor([0.1, 0.0]), [0], 0.1),
        "sam_restore_": ([x], [x.clone()]), "sam_average_": ([x], [x.clone()], torch.tensor([0.1, 0.0])),
    }  # fmt: skip


def first(value, arguments):
    return ([value] if isinstance(arguments[0], list) else value.reshape(arguments[0].shape), *arguments[1:])


@pytest.mark.parametrize("name", WITHOUT_DERIVATIVE)
def test_they_refuse(name, x):
    op, arguments = getattr(torch.ops.askew, name), calls(x)[name]
    before = x.clone()
    for t in (x.clone().requires_grad_(), x.clone().requires_grad_() * 1):
        with pytest.raises(NotImplementedError, match=f"askew::{name} has no derivative.*no_grad"):
            op(*first(t, arguments))
    with pytest.raises(NotImplementedError, match=f"askew::{name}"):
        jvp(lambda t: op(*first(t, arguments)), (x,), (x,))
    with pytest.raises(NotImplementedError, match=f"askew::{name}"):
        grad(lambda t: op(*first(t, arguments)).sum())(x)
    assert torch.equal(x, before)
    with torch.no_grad():
        op(*first(x.clone().requires_grad_(), arguments))


def test_what_is_differentiable():
    """The rest refuses, by default."""
    smooth = {"fake_quantize", "mix_fake_quantize"}
    known = {*smooth, *(f"{name}_backward" for name in smooth), "packed_linear", "packed_linear_bf16",
             "packed_linear_int8"}  # fmt: skip
    assert known == {*schema.OPERATORS} - {*WITHOUT_DERIVATIVE} - OF_INTEGERS


PURE = (
    "row_sums",
    "sam_norm",
    "mse_scales",
    "packed_tiles_linear",
    "packed_bands_linear",
    "packed_bands_conv",
    "packed_depthwise",
    "soft_quantize",
    "token_levels",
    "scaled_sums",
    "stochastic_levels",
    "luq",
)


@pytest.mark.parametrize("name", [n for n in WITHOUT_DERIVATIVE if n not in PURE])
def test_writes_are_counted(name, x):
    """What autograd saved before is known to be stale."""
    arguments = calls(x)[name]
    op = getattr(torch.ops.askew, name).default
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    tensors = [t for i in written for t in (arguments[i] if isinstance(arguments[i], list) else [arguments[i]])]
    before = [t._version for t in tensors]
    op(*arguments)
    assert [t._version for t in tensors] > before and all(t._version > v for t, v in zip(tensors, before, strict=True))


@pytest.mark.parametrize("call", [
    lambda y, x: ops.project_interval_(y, ROWS, Uniform(4), 0.5), lambda y, x: ops.ste_clip_(y, x, ROWS, Uniform(4)),
    lambda y, x: ops.fake_quantize_out_(x, ROWS, Uniform(4), out=y),
    lambda y, x: ops.skew_sgd_([y], [x], None, [ROWS], [Uniform(4)], lr=0.1, eps=0.5),
    lambda y, x: ops.sam_restore_(params=[y], kept=[x]),
], ids=["project_interval_", "ste_clip_", "fake_quantize_out_", "skew_sgd_", "sam_restore_"])  # fmt: skip
def test_what_a_graph_leads_to_is_not_written(call, x):
    """A parameter is, as an optimizer does; the result of a computation is only without recording."""
    y = x.clone().requires_grad_() * 2
    before = y.detach().clone()
    with pytest.raises(NotImplementedError, match="askew::.*double backward.*no_grad"):
        call(y, x)
    assert torch.equal(y, before)
    with torch.no_grad():
        call(y, x)
    call(x.clone().requires_grad_(), x)


def test_vmap_of_what_writes_names_the_operator(x):
    with pytest.raises(RuntimeError, match="askew::project_interval_"):
        vmap(lambda x: torch.ops.askew.project_interval_(x, ROWS, torch.empty(0), [1, -8, 7], torch.tensor(0.5)))(
            x[None]
        )
