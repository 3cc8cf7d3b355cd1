"""linear_lora and linear_4bit as torch ops: fake tensors, autocast, checkpointing, torch.func, compile."""

import functools

import pytest
import torch
import torch._dynamo.testing
from linear_cases import inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import pyfastpeft as pf

SEED = torch.tensor([0x1234_5678_9ABC])
KINDS = ["lora", "4bit"]


def _layer(kind, dtype=torch.float32, M=12, requires_grad=True, device="cpu"):
    """(f(x, bias, lora_a, lora_b, *options), its tensors, grad): one signature for both ops."""
    x, weight, bias, a, b, grad = inputs((M, 10, 36, 4), dtype)
    tensors = [t.to(device).requires_grad_(requires_grad) for t in (x, bias, a, b)]
    if kind == "4bit":
        q = pf.ops.quantize_4bit(weight.float(), 64, double_quant=True).to(device)
        return lambda x, *rest: pf.ops.linear_4bit(x, q, *rest), tensors, grad
    weight = weight.to(device)
    return lambda x, bias, *rest: pf.ops.linear_lora(x, weight, bias, *rest), tensors, grad


def _flat(kind, tensors, weight, seed, p):
    x, bias, a, b = tensors
    if kind == "4bit":
        q = pf.ops.quantize_4bit(weight, 64, double_quant=True)
        return torch.ops.pyfastpeft.linear_4bit, (x, *q.flat(), bias, a, b, 1.0, p, seed)
    return torch.ops.pyfastpeft.linear_lora, (x, weight, bias, a, b, 1.0, p, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p, dtype", [(0.0, torch.float32), (0.5, torch.float32), (0.5, torch.bfloat16)])
def test_opcheck(kind, p, dtype):
    x, weight, bias, a, b, grad = inputs((3, 4, 6, 2), dtype)
    tensors = [t.requires_grad_() for t in (x, bias, a, b)]
    op, arguments = _flat(kind, tensors, weight if kind == "lora" else weight.float(), SEED, p)
    torch.library.opcheck(op, arguments)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    with_s = getattr(torch.ops.pyfastpeft, f"linear_{kind}_with_s")
    torch.library.opcheck(with_s, arguments)
    _, s, kept = with_s(*detached)
    if kind == "lora":
        weightless = (detached[0], detached[1], *detached[3:])
        mask = [True] * 5
    else:
        weightless = (*detached[:10], *detached[11:])
        mask = [True] * 4
    backward = getattr(torch.ops.pyfastpeft, f"linear_{kind}_backward")
    torch.library.opcheck(backward, (grad, *weightless, mask, s, kept))
    # graphs that torch.compile has kept from before S and the mask were give neither: they are made again
    torch.library.opcheck(backward, (grad, *weightless, mask))
    for got, expected in zip(
        backward(grad, *weightless, mask), backward(grad, *weightless, mask, s, kept), strict=True
    ):
        assert torch.equal(got, expected)
    torch.library.opcheck(backward, (grad, *weightless, [False] * len(mask)))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_and_fake_tensors(kind):
    layer, tensors, _ = _layer(kind, torch.bfloat16, device="meta")
    y = layer(tensors[0].expand(2, 12, 36), *tensors[1:], 1.0, 0.5)
    assert y.shape == (2, 12, 10) and y.dtype == torch.bfloat16 and y.is_meta
    y.sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.dtype == t.dtype for t in tensors)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer, tensors, _ = _layer(kind, torch.bfloat16)
        layer(*tensors, 1.0, 0.5).sum().backward()
        assert all(t.grad.shape == t.shape for t in tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_f_linear(kind, x_dtype, autocast_dtype):
    layer, tensors, grad = _layer(kind, x_dtype)
    weight = torch.zeros(10, 36, dtype=x_dtype)
    with torch.autocast("cpu", autocast_dtype):
        y = layer(*tensors, 1.0, 0.5)
        assert y.dtype == torch.nn.functional.linear(tensors[0], weight).dtype == autocast_dtype
    y.backward(grad.to(y.dtype))
    assert all(t.grad.dtype == t.dtype for t in tensors)
    with torch.autocast("cpu", autocast_dtype, enabled=False):
        assert layer(*tensors).dtype == x_dtype
    with torch.autocast("cpu", autocast_dtype), pytest.raises(TypeError, match="torch.int64"):
        layer(torch.ones(2, 36, dtype=torch.int64), *tensors[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_what_the_casts_say(kind):
    layer, tensors, _ = _layer(kind, torch.float32, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(*tensors)
    x, weight, bias, a, b, _ = inputs((12, 10, 36, 4), torch.float32)
    if kind == "lora":
        assert torch.equal(y, pf.ops.linear_lora(x.bfloat16(), weight.bfloat16(), bias, a, b))
    else:
        assert torch.equal(y, layer(tensors[0].bfloat16(), *tensors[1:]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(kind, use_reentrant):
    layer, tensors, grad = _layer(kind)
    torch.manual_seed(3)
    expected = torch.autograd.grad(layer(*tensors, 1.0, 0.5), tensors, grad)
    torch.manual_seed(3)
    y = checkpoint(lambda *t: layer(*t, 1.0, 0.5), *tensors, use_reentrant=use_reentrant)
    torch.rand(7)  # the generator has moved on by the time the forward is run again
    y.backward(grad)
    assert all(torch.equal(t.grad, e) for t, e in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_selective_checkpointing_sees_the_op(kind):
    layer, tensors, grad = _layer(kind)
    op = getattr(torch.ops.pyfastpeft, f"linear_{kind}_with_s").default
    seen = []

    def policy(ctx, func, *args, **kwargs):
        seen.append((func, ctx.is_recompute))
        return CheckpointPolicy.MUST_SAVE if func is op else CheckpointPolicy.PREFER_RECOMPUTE

    def function(*tensors):
        return layer(*tensors, 1.0, 0.5).sin().cos()

    torch.manual_seed(3)
    expected = torch.autograd.grad(function(*tensors), tensors, grad)
    torch.manual_seed(3)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    y = checkpoint(function, *tensors, use_reentrant=False, context_fn=contexts)
    assert (op, False) in seen
    got = torch.autograd.grad(y, tensors, grad)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


class _Seen(TorchDispatchMode):
    """The names of this library's ops that reach it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyfastpeft":
            self.names.append(func._schema.name.removeprefix("pyfastpeft::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_s_is_asked_for_only_where_a_gradient_is(kind):
    layer, tensors, grad = _layer(kind)
    with _Seen() as seen:
        with torch.no_grad():
            quiet = layer(*tensors)
        frozen = layer(*(t.detach() for t in tensors))
        assert seen.names == [f"linear_{kind}"] * 2
        y = layer(*tensors)
        torch.autograd.grad(y, tensors, grad)
        assert seen.names[2:] == [f"linear_{kind}_with_s", f"linear_{kind}_backward"]
    assert torch.equal(y, quiet) and torch.equal(y, frozen)


def test_s_has_no_gradient():
    layer, tensors, _ = _layer("lora")
    x, bias, a, b = tensors
    y, s, mask = torch.ops.pyfastpeft.linear_lora_with_s(x, torch.randn(10, 36), bias, a, b, 0.5, 0.0, None)
    assert y.requires_grad and not s.requires_grad and mask.numel() == 0
    torch.testing.assert_close(s, 0.5 * x.detach() @ a.detach().t())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_two_levels(kind):
    """The inner level's result is differentiated by the outer one, which must find a gradient there."""
    layer, tensors, grad = _layer(kind)
    x, *rest = (t.detach() for t in tensors)

    def inner(scale, x):
        return (layer(x * scale, *rest) * grad).sum()

    def value(x):
        return torch.func.grad_and_value(inner)(torch.ones(()), x)[1]

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(leaf, *rest), leaf, grad)
    torch.testing.assert_close(torch.func.grad(value)(x), expected)
    value(leaf).backward()  # and so must autograd itself
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_functional_grad(kind, p):
    layer, tensors, grad = _layer(kind)
    expected = torch.autograd.grad(layer(*tensors, 1.0, p, SEED), tensors, grad)
    plain = [t.detach() for t in tensors]

    def loss(*tensors):
        return (layer(*tensors, 1.0, p, SEED) * grad).sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*plain)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
    _, pullback = torch.func.vjp(lambda *t: layer(*t, 1.0, p, SEED), *plain)
    for g, e in zip(pullback(grad), expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_vmap(kind, p):
    layer, tensors, grad = _layer(kind, requires_grad=False)
    x, bias, a, b = tensors

    def call(x, bias, a, b):
        return layer(x, bias, a, b, 1.0, p, SEED)

    def loop(*batched):
        return torch.stack([call(*each) for each in zip(*batched, strict=True)])

    xs, a_s = torch.stack([x, x + 1, x * 2]), torch.stack([a, -a, a + 1])
    torch.testing.assert_close(
        torch.func.vmap(call, (0, None, None, None))(xs, bias, a, b), loop(xs, [bias] * 3, [a] * 3, [b] * 3)
    )
    torch.testing.assert_close(
        torch.func.vmap(call, (2, None, 0, None))(xs.permute(1, 2, 0), bias, a_s, b), loop(xs, [bias] * 3, a_s, [b] * 3)
    )
    torch.testing.assert_close(
        torch.func.vmap(call, (None, None, 0, None))(x, bias, a_s, b), loop([x] * 3, [bias] * 3, a_s, [b] * 3)
    )
    # gradients per sample
    per_sample = torch.func.vmap(torch.func.grad(lambda a, x, g: (call(x, bias, a, b) * g).sum()), (None, 0, 0))
    got = per_sample(a, x, grad)
    for i in range(3):
        leaf = a.clone().requires_grad_()
        (expected,) = torch.autograd.grad(call(x[i], bias, leaf, b), leaf, grad[i])
        torch.testing.assert_close(got[i], expected)


def test_vmap_randomness():
    layer, tensors, _ = _layer("lora", requires_grad=False)
    xs = tensors[0].expand(3, 12, 36)

    def call(x):
        return layer(x, *tensors[1:], 1.0, 0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call)(xs)
    same = torch.func.vmap(call, randomness="same")(xs)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(call, randomness="different")(xs)
    assert not torch.equal(different[0], different[1])


def test_functional_call():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 6))
            self.a, self.b = torch.nn.Parameter(torch.randn(2, 6)), torch.nn.Parameter(torch.randn(4, 2))

        def forward(self, x):
            return pf.ops.linear_lora(x, self.weight, None, self.a, self.b)

    module, x = Layer(), torch.randn(3, 6)
    parameters = {name: p.detach() * 2 for name, p in module.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,)).sum())(parameters)
    assert gradients.keys() == parameters.keys()
    torch.testing.assert_close(gradients["weight"], torch.ones(3, 4).t() @ x)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused_by_name(kind):
    layer, tensors, grad = _layer(kind)
    gradients = torch.autograd.grad(layer(*tensors), tensors, grad, create_graph=True)
    with pytest.raises(RuntimeError, match=f"linear_{kind}_backward: second derivatives of linear_{kind} are not"):
        gradients[0].sum().backward()


def _train(function, tensors, grad, steps):
    losses = []
    for _ in range(steps):
        y = function(*tensors)
        y.backward(grad.expand(y.shape))
        losses.append(y.detach())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_compile_trains_with_dropout_and_does_not_recompile(kind):
    layer, tensors, grad = _layer(kind)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: layer(*t, 1.0, 0.5).cos(), fullgraph=True, backend=counter)
    masks = _train(compiled, tensors, grad, 4)
    assert counter.frame_count == 1
    assert len({m.sum().item() for m in masks}) == 4  # a fresh mask each step
    # gradients are those of the mask of their own forward
    torch.manual_seed(9)
    got = torch.autograd.grad(compiled(*tensors), tensors, grad)
    torch.manual_seed(9)
    expected = torch.autograd.grad(layer(*tensors, 1.0, 0.5).cos(), tensors, grad)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("kind", KINDS)
def test_compile_with_any_number_of_tokens(kind):
    layer, tensors, grad = _layer(kind)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: layer(*t, 1.0, 0.5), fullgraph=True, backend=counter, dynamic=True)
    for M in (12, 5, 30, 9):
        x = torch.randn(M, 36, requires_grad=True)
        y = compiled(x, *tensors[1:])
        y.sum().backward()
        assert y.shape == (M, 10) and x.grad.shape == x.shape
    assert counter.frame_count == 1


def test_compile_with_inductor():
    layer, tensors, grad = _layer("4bit")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: layer(*t, 1.0, 0.5) * 2, fullgraph=True)
    first, second = _train(compiled, tensors, grad, 2)
    assert not torch.equal(first, second)
    torch.testing.assert_close(
        torch.compile(lambda *t: layer(*t, 1.0, 0.5, SEED) * 2, fullgraph=True)(*tensors),
        layer(*tensors, 1.0, 0.5, SEED) * 2,
    )


def test_compile_under_autocast():
    layer, tensors, grad = _layer("4bit")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: layer(*t), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(*tensors)
        assert y.dtype == torch.bfloat16 and torch.equal(y, layer(*tensors))
    y.backward(grad.bfloat16())
    assert tensors[0].grad.dtype == torch.float32


def test_a_written_input_is_noticed():
    """x is saved for the backward: changing it in place before the backward must be an error, not a wrong gradient."""
    layer, tensors, grad = _layer("4bit")
    x = tensors[0].detach().clone()
    y = layer(x, *tensors[1:])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)
