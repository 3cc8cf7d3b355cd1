"""The contract of test_contract.py for every kind of layer that LoRA adapts, one at a time in a small model."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch

import pyfastpeft as pf
from pyfastpeft.methods.base import AdapterHolder
from pyfastpeft.methods.lora import LoraAttention, attention
from tests.methods.contract import scatter
from tests.methods.every import IDS, LAYERS, PARAMETERS, Every
from tests.methods.test_targets import assert_unchanged, snapshot

CASES = {name: {"target_modules": [name]} for name in LAYERS}
CASES |= {f"{name}-dora": {"target_modules": [name], "use_dora": True} for name in LAYERS if name != "grouped"}
CASES |= {f"{name}-bias": {"target_modules": [name], "lora_bias": True} for name in LAYERS if name != "table"}
CASES |= {parameter: {"target_parameters": [parameter]} for parameter in PARAMETERS}
CASES["parameters"] = {"target_modules": [], "target_parameters": PARAMETERS}
CASES["tied"] = {"target_modules": ["table"], "ensure_weight_tying": True}
CASES["all"] = {"target_modules": LAYERS, "target_parameters": PARAMETERS}
MERGES = {name: "grouped" not in name and name != "all" for name in CASES}
MIXES = {name: not options.get("target_parameters") for name, options in CASES.items()}
EACH = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def build(case, dtype=torch.float32):
    torch.manual_seed(0)
    model = Every().eval()
    if case == "tied":
        model.head.weight = model.table.weight
    return model.to(dtype)


def config(case, **more):
    return pf.LoraConfig(**({"r": 4, "target_modules": []} | CASES[case] | more))


def adapted(case, dtype=torch.float32, **more):
    return pf.get_peft_model(build(case, dtype), config(case, **more)).eval()


@torch.no_grad()
def answer(model):
    return model(IDS)


@EACH
def test_life_of_an_adapter(case, tmp_path):
    """bf16: new, trained a step, disabled, saved, loaded, loaded once more beside itself, taken out."""
    plain_model = build(case, torch.bfloat16)
    plain, keys = answer(plain_model), list(plain_model.state_dict())
    model = pf.get_peft_model(plain_model, config(case)).eval()
    assert torch.equal(answer(model), plain)
    scatter(model, scale=0.2)
    tensors = model.base_model.tensors("default")
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert 0 < len(trained) == len(tensors)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    y = model.train()(IDS)
    y.float().square().mean().backward()
    optimizer.step()
    assert y.dtype == torch.bfloat16
    parameters = dict(model.named_parameters())
    assert all(p.grad is None and torch.equal(p, frozen[n]) for n, p in parameters.items() if n in frozen)
    still = [
        n for n, value in trained.items() if torch.equal(parameters[n], value) and "k_lora_B.default.bias" not in n
    ]
    assert not still, f"not trained: {still}"

    changed = answer(model.eval())
    assert changed.dtype == torch.bfloat16 and not torch.equal(changed, plain)
    with model.disable_adapter():
        assert torch.equal(answer(model), plain)
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(build(case, torch.bfloat16), tmp_path)
    for key, tensor in again.base_model.tensors("default").items():
        assert torch.equal(tensor, tensors[key]), key
    assert not any(p.requires_grad for p in again.parameters()) and torch.equal(answer(again), changed)
    again.load_adapter(tmp_path, "second", is_trainable=True)
    again.set_adapter("second")
    again.delete_adapter("default")
    assert torch.equal(answer(again), changed)
    left = model.unload()
    assert torch.equal(answer(left), plain) and list(left.state_dict()) == keys


def _hold_norms(model, monkeypatch):
    """DoRA's norms as they are now: they have no gradient."""
    for _, layer in model.base_model.holders():
        if isinstance(layer, LoraAttention):
            norms = [attention._row_norms(layer._whole(p, "default", layer._weight(p))) for p in layer.projections]
            cycle = itertools.cycle(norms)  # a case has one such layer
            monkeypatch.setattr(attention, "_row_norms", lambda whole, cycle=cycle: next(cycle))
        else:
            norms = layer.row_norms("default")
            monkeypatch.setattr(layer, "row_norms", lambda name, norms=norms: norms)


@EACH
def test_gradients(case, monkeypatch):
    """Every parameter's gradient in fp32 against fp64's, and fp64's against finite differences."""
    model, twin = scatter(adapted(case), scale=0.2), adapted(case, torch.float64)
    with torch.no_grad():
        for key, tensor in twin.base_model.tensors("default").items():
            tensor.copy_(model.base_model.tensors("default")[key])
    for each in (model, twin):
        each(IDS).square().sum().backward()
    truth = twin.base_model.tensors("default")
    if "dora" in case:
        _hold_norms(twin, monkeypatch)
    for key, tensor in model.base_model.tensors("default").items():
        right = truth[key].grad
        if key.endswith("k_proj.lora_B.bias"):  # a key's bias changes nothing behind a softmax
            assert right.norm() < 1e-9
            continue
        assert right.norm() > 0 and (tensor.grad.double() - right).norm() <= 2e-4 * right.norm(), key
        parameter, step, ends = truth[key], 1e-6, []
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
        with torch.no_grad():
            for sign in (1, -2):
                parameter.add_(direction, alpha=sign * step)
                ends.append(twin(IDS).square().sum().item())
            parameter.add_(direction, alpha=step)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx((right * direction).sum().item(), rel=1e-4, abs=1e-5 * right.norm().item()), key


@EACH
def test_merging(case):
    model = scatter(adapted(case), scale=0.2)
    before, weights = answer(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    if not MERGES[case]:
        with pytest.raises(ValueError, match="groups=2 cannot be merged"):
            model.merge_adapter()
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        return
    model.merge_adapter()
    merged = answer(model)
    torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert not torch.equal(answer(model), merged)
    assert torch.equal(answer(model), merged)
    model.unmerge_adapter()
    assert torch.equal(answer(model), before)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    plain = model.merge_and_unload(safe_merge=True)
    assert torch.equal(answer(plain), merged)
    assert [type(m) for m in plain.modules()] == [type(m) for m in build(case).modules()]
    assert list(plain.state_dict()) == list(build(case).state_dict())


@pytest.mark.parametrize("case", [name for name in CASES if MERGES[name]])
def test_safe_merging_writes_nothing_that_is_not_finite(case):
    model = scatter(adapted(case), scale=0.2)
    tensors = model.base_model.tensors("default")
    with torch.no_grad():  # finite each, but not their product; DoRA's lengths but not their quotient
        for key, tensor in tensors.items():
            if "lora_A" in key or "lora_B" in key or "lora_embedding" in key:
                tensor.fill_(1e25)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN or infinities in torch.float32"):
            call(safe_merge=True)
    next(iter(tensors.values())).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="adapter 'default' has NaN"):
        model.merge_adapter()
    parameters = dict(model.named_parameters())
    changed = [n for n, p in parameters.items() if not torch.equal(p, before[n])]
    assert (
        len(changed) == 1
        and "lora_" in changed[0]
        and not any(h.merged_adapters for _, h in model.base_model.holders())
    )


@EACH
def test_copies_pickles_status_and_mixed_batches(case):
    model = scatter(adapted(case), scale=0.2)
    before, plain = answer(model), answer(build(case))
    for clone in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = clone(model)
        assert torch.equal(answer(twin), before) and list(twin.state_dict()) == list(model.state_dict())
        scatter(twin, seed=9)
        assert torch.equal(answer(model), before) and not torch.equal(answer(twin), before)
    status = model.get_model_status()
    assert status.enabled is True and status.active_adapters == ["default"] and status.requires_grad["default"] is True
    assert status.num_adapter_layers == len(model.get_layer_status()) == len(list(model.base_model.holders()))
    if MIXES[case]:
        with torch.no_grad():
            mixed = model(IDS, adapter_names=["default", "__base__"])
        torch.testing.assert_close(mixed, torch.stack([before[0], plain[1]]), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="cannot share a batch"):
            model(IDS, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("case", [*LAYERS, "plane-dora", "attn-dora", "parameters", "tied", "all"])
def test_compiled(case):
    """One graph, and its gradients."""
    model = scatter(adapted(case), scale=0.2)
    gradients = []
    torch._dynamo.reset()
    for each in (
        model,
        torch.compile(model, backend="aot_eager" if case in ("table", "up") else "eager", fullgraph=True),
    ):
        model.zero_grad()
        y = each(IDS)
        y.square().sum().backward()
        gradients.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
    for expected, got in zip(*gradients, strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm()


@EACH
def test_a_failure_half_way_leaves_the_model_as_it_was(case, monkeypatch):
    models = [build(case).train() for _ in range(2)]
    before = snapshot(models[1])
    calls, limit = [], None
    register = torch.nn.Module.register_parameter

    def counting(self, name, parameter):
        calls.append(name)
        if len(calls) == limit:
            raise MemoryError("no memory")
        return register(self, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", counting)
    pf.get_peft_model(models[0], config(case))
    limit = len(calls)
    calls.clear()
    with pytest.raises(MemoryError):
        pf.get_peft_model(models[1], config(case))
    monkeypatch.undo()
    assert limit and not any(isinstance(module, AdapterHolder) for module in models[1].modules())
    assert_unchanged(models[1], before)
