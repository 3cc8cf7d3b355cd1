"""LoRA on Parameters: stacked experts computed without a second stack, several adapters, merging, files, errors."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyfastpeft as pf
from pyfastpeft.methods.lora import added_weight
from pyfastpeft.methods.lora.added_weight import AddedWeight
from tests.methods.contract import scatter
from tests.methods.mixtures import EXPERTS, KINDS, mixture, tokens
from tests.methods.models import build
from tests.methods.test_targets import assert_unchanged, snapshot


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def config(**more):
    return pf.LoraConfig(
        **{"target_modules": [], "target_parameters": EXPERTS, "r": 3, "task_type": "CAUSAL_LM"} | more
    )


def parts(*shape, rank=2):
    *stack, rows, columns = shape
    return [torch.randn(*size, dtype=torch.float64) for size in (shape, (*stack, rows, rank), (*stack, rank, columns))]


OPERATIONS = {
    "matmul": lambda w, x: x @ w,
    "left": lambda w, x: w @ x.mT if w.ndim == 2 else torch.matmul(w, x.mT),
    "linear": lambda w, x: F.linear(x, w.mT),
    "expert": lambda w, x: x @ w[1] if w.ndim == 3 else x @ w,
    "tensor expert": lambda w, x: F.linear(x, w[torch.tensor(1)].t()) if w.ndim == 3 else x @ w,
    "experts": lambda w, x: torch.bmm(x, w[torch.tensor([1, 1, 0])]) if w.ndim == 3 else x.mm(w),
    "turned": lambda w, x: w.transpose(-2, -1).transpose(-1, -2)[0:2] * 2,
    "sum": lambda w, x: w + 1.0,
    "view": lambda w, x: w.reshape(-1).float(),
    "mask": lambda w, x: w[torch.arange(w.shape[0]) != 1],
    "chunk": lambda w, x: torch.cat([part.exp() for part in w.chunk(2, dim=-1)], dim=0),
    "size": lambda w, x: torch.tensor([*w.shape, w.ndim, w.numel(), len(w), w.size(0)]).double() * x.sum() + 0 * w.sum(),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4)])
def test_a_stand_in_is_the_sum_in_every_operation(operation, shape):
    torch.manual_seed(0)
    if operation is OPERATIONS["linear"] and len(shape) == 3:
        pytest.skip("F.linear takes matrices")
    tensors = parts(*shape)
    x = torch.randn(*((3,) if len(shape) == 3 else ()), 5, 6, dtype=torch.float64)
    if operation in (OPERATIONS["expert"], OPERATIONS["tensor expert"]):
        x = x.reshape(-1, 6)
    if operation is OPERATIONS["left"]:
        x = torch.randn(*shape[:-2], 5, 4, dtype=torch.float64)
    results = []
    for lazy in (False, True):
        weight, left, right, source = (t.clone().requires_grad_() for t in (*tensors, x))
        whole = AddedWeight(weight, left, right) if lazy else weight + left @ right
        y = operation(whole, source)
        assert type(y) is torch.Tensor
        y.square().sum().backward()
        results.append([y, weight.grad, left.grad, right.grad, source.grad])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_no_second_stack_is_made_and_merging_agrees(kind, implementation, monkeypatch):
    model = scatter(pf.get_peft_model(mixture(kind, implementation), config(r=5, lora_alpha=7)))
    summed, real = [], added_weight._summed
    monkeypatch.setattr(
        added_weight, "_summed", lambda value: (isinstance(value, AddedWeight) and summed.append(1), real(value))[1]
    )
    output = model(**tokens())
    output.loss.backward()
    assert not summed
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(**tokens()).logits, output.logits, rtol=1e-4, atol=2e-5)
    assert not any(isinstance(module, pf.methods.lora.parameters.LoraParameters) for module in merged.modules())


def test_gradients_are_those_of_the_sum_in_fp64():
    base = mixture("gpt_oss", dtype=torch.float64)
    model = scatter(pf.get_peft_model(base, config(init_lora_weights=False)))
    holder = model.get_base_model().model.layers[1].mlp.experts
    torch.manual_seed(0)
    x, chosen = torch.randn(10, 32, dtype=torch.float64), torch.randint(0, 4, (10, 2))

    def loss():
        return holder(x, chosen, torch.ones(10, 2, dtype=torch.float64)).square().mean()

    loss().backward()
    a, b = holder.lora_A["default"]["down_proj"], holder.lora_B["default"]["down_proj"]
    assert a.dtype == torch.float64 and a.shape == (4 * 3, 24) and b.shape == (32, 4 * 3)
    with torch.no_grad():
        for tensor, place in ((a, (7, 3)), (b, (5, 10)), (a, (0, 0)), (b, (31, 11))):
            losses = []
            for step in (1e-5, -2e-5):
                tensor[place] += step
                losses.append(loss())
            tensor[place] += 1e-5
            assert tensor.grad[place].item() == pytest.approx(
                ((losses[0] - losses[1]) / 2e-5).item(), rel=1e-5, abs=1e-10
            )


def test_several_adapters_disabling_and_merging():
    model = mixture("qwen3_moe")
    inputs = {"input_ids": tokens()["input_ids"]}
    before = model(**inputs).logits.detach()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = pf.get_peft_model(model, config())
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-6)
    scatter(model)
    first = model(**inputs).logits
    model.add_adapter("b", config(r=2, target_parameters=["experts.down_proj"], target_modules=["q_proj"]))
    assert torch.equal(model(**inputs).logits, first)
    model.set_adapter("b")
    scatter(model, seed=3)
    second = model(**inputs).logits
    model.base_model.set_adapter(["default", "b"])
    both = model(**inputs).logits
    assert len({t.sum().item() for t in (before, first, second, both)}) == 4
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, before)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(**inputs).logits, both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(**inputs).logits, both)
    model.eval()
    with pytest.raises(ValueError, match="cannot share a batch with others.*experts"):
        model(**inputs, adapter_names=["default", "b"])
    with pytest.raises(ValueError, match="target_parameters cannot be combined"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum", "linear")
    model.delete_adapter("default")
    assert torch.equal(model(**inputs).logits, second)
    bare = model.unload()
    assert all(torch.equal(weights[name], p) for name, p in bare.named_parameters())
    assert torch.equal(bare(**inputs).logits, before)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_bf16_stays_bf16_and_adapters_are_fp32(implementation):
    model = scatter(pf.get_peft_model(mixture("mixtral", implementation, torch.bfloat16), config()))
    holder = model.get_base_model().model.layers[0].mlp.experts
    assert all(p.dtype == torch.float32 for p in holder.adapter_parameters("default"))
    output = model(**tokens())
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in holder.adapter_parameters("default"))
    exact = scatter(pf.get_peft_model(mixture("mixtral", implementation, torch.bfloat16).float(), config()))
    assert (output.logits - exact(**tokens()).logits).abs().max() < 0.1


def test_files_copies_generation_checkpointing_and_compiling(tmp_path):
    model = scatter(pf.get_peft_model(mixture("mixtral"), config(modules_to_save=["lm_head"])))
    inputs = tokens()
    output = model(**inputs)
    output.loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(plain) == 2 * 2 * 2 + 1
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(mixture("mixtral"), tmp_path, is_trainable=True)
    assert torch.equal(again(**inputs).logits, output.logits)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, output.logits)
    assert "model.layers.0.mlp.experts" in {layer.name for layer in model.get_layer_status()}
    made = model.generate(input_ids=inputs["input_ids"][:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(model(input_ids=made).logits[0, -4:-1].argmax(-1), made[0, -3:])
    compiled = torch.compile(model.get_base_model().model.layers[0].mlp, backend="eager")
    x = torch.randn(1, 5, 32)
    torch.testing.assert_close(compiled(x), model.get_base_model().model.layers[0].mlp(x), rtol=1e-4, atol=1e-5)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()(**inputs).loss.backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
    assert not {"gate_up_proj", "down_proj"} & set(vars(model.get_base_model().model.layers[0].mlp.experts.base_layer))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.randn(3, 4))
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        (lambda: mixture("mixtral"), {"target_parameters": ["experts.down_prj"]}, "match no parameter.*experts.down_proj"),
        (lambda: mixture("mixtral"), {"target_parameters": ["input_layernorm.weight"]}, r"\(32,\).*expected 2 or 3"),
        (lambda: mixture("mixtral"), {"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, "adapted already"),
        (lambda: pf.quantize_model(build("llama")), {"target_parameters": ["q_proj.weight"]}, "uint8.*floating-point"),
        (Tied, {"target_parameters": ["own"], "task_type": None}, "a parameter of the model itself"),
        (Tied, {"target_parameters": ["two.weight"], "task_type": None}, "two.weight is one.weight too"),
    ],
)  # fmt: skip
def test_errors_leave_the_model_as_it_was(base, fields, message):
    model = base()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pf.get_peft_model(model, config(**fields))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "field", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"fan_in_fan_out": True}, {"init_lora_weights": "pissa"}]
)  # fmt: skip
def test_what_target_parameters_goes_without(field):
    with pytest.raises(ValueError, match=f"target_parameters goes without {next(iter(field))}="):
        config(**field)
    with pytest.raises(TypeError, match="target_parameters"):
        config(target_parameters="experts.down_proj")


def test_a_failure_half_way_and_nan(monkeypatch):
    from pyfastpeft.methods.lora.parameters import LoraParameters

    model = mixture("mixtral")
    before, real = snapshot(model), LoraParameters.add_adapter

    def fails(self, name, parameters, config, path, **how):
        if "layers.1" in path:
            raise MemoryError("no more")
        real(self, name, parameters, config, path, **how)

    monkeypatch.setattr(LoraParameters, "add_adapter", fails)
    with pytest.raises(MemoryError):
        pf.get_peft_model(model, config())
    assert_unchanged(model, before)
    monkeypatch.undo()
    model = pf.get_peft_model(model, config())
    model.get_base_model().model.layers[1].mlp.experts.lora_A["default"]["down_proj"].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="layers.1.mlp.experts: adapter 'default' has NaN or infinities for down_proj"):
        model.merge_adapter()
