"""Several adapters trained in one batch: each as it would train alone on its own samples."""

import pytest
import torch

import pyfastpeft as pf
from tests.methods.models import batch, build
from tests.methods.test_mixed_batch import ADAPTERS, NAMES, _inputs, _model


def _losses(model, inputs, names=None, **more):
    """Each sample's own loss, so that a batch of several is the sum of batches of one."""
    logits = model(**inputs, **({} if names is None else {"adapter_names": names}), **more).logits
    return logits.float().square().flatten(1).mean(1)


def _train(model, steps, names):
    """Three steps of AdamW on the samples that `names` gives; the parameters afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for inputs in steps:
        optimizer.zero_grad()
        _losses(model, inputs, names).sum().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind, quantised", [("llama", False), ("llama", True), ("gpt2", False), ("t5", False)])
def test_each_adapter_trains_as_if_alone(kind, quantised):
    """Three steps of AdamW in one batch, and of each adapter on its samples, give the same parameters."""

    def made():
        base = build(kind)
        return _model(kind, pf.quantize_model(base, skip=("lm_head",)) if quantised else base).train()

    names = ["wide", "small", "__base__", "wide", "part"]
    steps = [{k: v for k, v in batch(kind, rows=5, seed=i).items() if kind == "t5" or k != "labels"} for i in range(3)]
    model = made()
    model.base_model.set_requires_grad(list(ADAPTERS))
    together = _train(model, steps, names)
    assert {name.split(".")[-2] for name in together} == set(ADAPTERS)
    for adapter in ADAPTERS:
        samples = [i for i, name in enumerate(names) if name == adapter]
        alone = made()
        before = {name: p.detach().clone() for name, p in alone.named_parameters()}
        alone.set_adapter(adapter)
        own = _train(alone, [{k: v[samples] for k, v in inputs.items()} for inputs in steps], None)
        assert own
        for name, values in own.items():
            # two sums of the same numbers in other orders, through three steps of an optimizer that divides by their size
            torch.testing.assert_close(together[name], values, atol=2e-3, rtol=2e-3, msg=f"{adapter}: {name}")
            assert (values - before[name]).abs().max() > 5e-3


def test_gradients_of_several_adapters_in_one_batch():
    """In eval mode with autograd on, which PEFT allows too: each adapter's gradient is that of its own samples."""
    model, inputs = _model("llama"), _inputs("llama")
    model.base_model.set_requires_grad(list(ADAPTERS))
    model(**inputs, adapter_names=NAMES).logits.square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[-2] for name in got} == set(ADAPTERS)
    model.zero_grad()
    for i, name in enumerate(NAMES):
        if name != "__base__":
            model.set_adapter(name)
            model(**{key: value[i : i + 1] for key, value in inputs.items()}).logits.square().sum().backward()
    for name, p in model.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], p.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_the_kernel_makes_the_gradients():
    model, inputs = _model("llama").train(), _inputs("llama")
    model.base_model.set_requires_grad(list(ADAPTERS))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _losses(model, inputs, NAMES).sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["pyfastpeft::segmented_lora"] == counts["pyfastpeft::segmented_lora_backward"] == 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """A block that the backward runs again runs with the batch's names, not with the active adapter."""
    model, inputs = _model("llama").train(), _inputs("llama")
    model.base_model.set_requires_grad(list(ADAPTERS))
    model.enable_input_require_grads()

    def gradients():
        model.zero_grad()
        _losses(model, inputs, NAMES).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    blocks = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    functions = [m._gradient_checkpointing_func for m in blocks]
    got = gradients()
    assert blocks and [m._gradient_checkpointing_func for m in blocks] == functions
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_dropout_is_each_adapters_own():
    """p = 1 leaves the base's answer, p = 0 the whole update, p between them a mean that is right."""
    base = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    model = pf.get_peft_model(base, pf.LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5), adapter_name="dropped")
    for name, p in (("whole", 0.0), ("gone", 1.0 - 1e-9)):
        model.add_adapter(name, pf.LoraConfig(r=4, target_modules=["0"], lora_dropout=p))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    x, names = torch.randn(4, 2000, 64), ["dropped", "whole", "gone", "__base__"]
    model.train()
    got = model(x, adapter_names=names).detach()
    model.eval()
    whole, plain = model(x, adapter_names=names).detach(), base[0].base_layer(x).detach()
    torch.testing.assert_close(got[1], whole[1])
    assert torch.equal(got[3], plain[3]) and torch.equal(got[2], plain[2])
    update, dropped = whole[0] - plain[0], got[0] - plain[0]
    assert (dropped - update).norm() > 0.5 * update.norm()
    # E[dropped] = update over many rows: regress one on the other
    assert abs((dropped * update).sum() / update.square().sum() - 1) < 0.05
    same = model(x.requires_grad_(), adapter_names=["dropped"] * 4)
    model.train()
    assert not torch.equal(model(x, adapter_names=["dropped"] * 4), same)


def test_compiled_training_step():
    model, inputs = _model("llama").train(), _inputs("llama")
    model.base_model.set_requires_grad(list(ADAPTERS))
    _losses(model, inputs, NAMES).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    _losses(compiled, inputs, NAMES).sum().backward()
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], atol=1e-4, rtol=1e-3, msg=name)
