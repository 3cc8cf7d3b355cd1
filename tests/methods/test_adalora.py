"""AdaLoRA: the schedule, the allocation (by itself and by hand), its share of the loss, files, bad input."""

import copy
import gc
import json
import warnings
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyfastpeft as pf
from pyfastpeft.methods.adalora import AdaLoraLinear, allocation, budget_at
from tests.methods.contract import scatter
from tests.methods.models import TASK, batch, build

OPTIONS = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 14, "lora_alpha": 8}


def adapted(kind="llama", **options):
    torch.manual_seed(7)
    return pf.get_peft_model(build(kind), pf.AdaLoraConfig(task_type=TASK[kind], **(OPTIONS | options))).train()


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaLoraLinear)}


def alive(model):
    """How many triplets have a singular value."""
    return sum(int((layer.lora_E["default"] != 0).sum()) for layer in layers(model).values())


def train(model, steps, by_hand=None, optimizer=None, first=0):
    """by_hand: what to add to the steps counted from 0, or None for the allocation that happens by itself."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=0.05)
    counts, losses = [], []
    for step in range(first, first + steps):
        loss = model(**batch("llama", seed=step)).loss
        loss.backward()
        optimizer.step()
        if by_hand is not None:
            model.base_model.update_and_allocate(step + by_hand)
        optimizer.zero_grad()
        counts.append(alive(model))
        losses.append(loss.item())
    return counts, losses


def test_the_schedule():
    config = pf.AdaLoraConfig(**OPTIONS)
    budgets = [budget_at(step, config, 5) for step in range(17)]
    cubic = [int(10 * (1 - (t - 2) / 9) ** 3 + 10) for t in range(3, 11)]
    assert budgets == [20, 20, 20, *cubic, 10, 10, 10, 10, 10, 10]
    assert budget_at(1, pf.AdaLoraConfig(init_r=3, target_r=3, total_step=1), 2) == 6


def test_the_allocation_keeps_to_the_schedule_and_ends_at_the_target():
    model = adapted()
    counts, _ = train(model, 14)
    config = model.peft_config["default"]
    budgets = [budget_at(step, config, 4) for step in range(1, 15)]
    masked = [step % 2 == 0 and step > 2 or step >= 11 for step in range(1, 15)]
    assert all(count == budget for count, budget, m in zip(counts, budgets, masked, strict=True) if m)
    assert counts[:3] == [16] * 3 and counts[-4:] == [8] * 4
    pattern = config.rank_pattern
    assert len(pattern) == 4 and sum(map(sum, pattern.values())) == 8
    for path, layer in layers(model).items():
        kept = torch.tensor(pattern[path.removeprefix("base_model.model.") + ".lora_E"])
        assert torch.equal(layer.lora_E["default"][:, 0] != 0, kept)
        assert not layer.allocators["default"].averages
    assert alive(copy.deepcopy(model)) == 8
    ranks = {sum(kept) for kept in pattern.values()}
    assert len(ranks) > 1, "the ranks differ between layers"


def test_importance_by_its_definition():
    model = adapted(tinit=100, total_step=200)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    layer = next(iter(layers(model).values()))
    mean = uncertainty = torch.zeros_like(layer.lora_B["default"])
    for step in range(3):
        model(**batch("llama", seed=step)).loss.backward()
        optimizer.step()
        sensitivity = (layer.lora_B["default"] * layer.lora_B["default"].grad).abs().detach()
        mean = 0.85 * mean + 0.15 * sensitivity
        uncertainty = 0.85 * uncertainty + 0.15 * (sensitivity - mean).abs()
        optimizer.zero_grad()
    allocator = layer.allocators["default"]
    (path,) = [p for p, each in allocator.layers.items() if each is layer]
    for got, expected in zip(allocator.averages[f"{path}.lora_B"], (mean, uncertainty), strict=True):
        torch.testing.assert_close(got, expected)
    scores = allocator._score(path)
    parts = {p: a * u for p, (a, u) in ((p, allocator.averages[f"{path}.{p}"]) for p in allocation.PARTS)}
    for i in range(4):
        expected = parts["lora_E"][i, 0] + parts["lora_A"][i].mean() + parts["lora_B"][:, i].mean()
        torch.testing.assert_close(scores[i], expected)


def test_by_itself_is_by_hand_from_step_one_and_the_call_by_hand_takes_over():
    results = []
    for by_hand in (None, 1, 0):
        model = adapted()
        results.append((*train(model, 14, by_hand), model.peft_config["default"].rank_pattern))
    assert results[0] == results[1]
    assert results[2][0] != results[0][0]  # counted from 0 everything comes a step later: it took over at the first one
    model = adapted(tinit=0, deltaT=1, total_step=30)
    e = [layer.lora_E["default"] for layer in layers(model).values()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(**batch("llama")).loss.backward()
    optimizer.step()
    assert alive(model) < 16 and model.peft_config["default"].rank_pattern
    model.base_model.update_and_allocate(0)  # of the same step: as if nothing had been done
    assert alive(model) == 16 and model.peft_config["default"].rank_pattern is None
    allocator = next(iter(layers(model).values())).allocators["default"]
    mean, _ = allocator.averages[next(iter(allocator.layers)) + ".lora_E"]
    torch.testing.assert_close(mean, 0.15 * (e[0] * e[0].grad).abs().detach())


@pytest.mark.parametrize("equal", [1, 3])
def test_target_r_equal_to_init_r(equal):
    model = adapted(init_r=equal, target_r=equal, tinit=0, tfinal=0, deltaT=1, total_step=4)
    counts, _ = train(model, 5)
    assert counts == [4 * equal] * 5


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, pf.optim.AdamW], ids=["torch", "ours"])
def test_optimizers_that_train_something_else_do_not_count(optimizer):
    model, other = adapted(tfinal=0, total_step=4, tinit=0, deltaT=1), torch.nn.Linear(2, 2)
    for module in (other, adapted()):
        elsewhere = optimizer([p for p in module.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            elsewhere.step()
    allocator = next(iter(layers(model).values())).allocators["default"]
    assert allocator.step == 0
    train(model, 4, optimizer=optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1))
    assert allocator.step == 4 and alive(model) == 8


def test_a_copy_allocates_for_itself_and_what_is_deleted_for_nothing():
    model = adapted(tinit=0, deltaT=1)
    twin = copy.deepcopy(model)
    train(twin, 6)
    assert alive(model) == 0 and model.peft_config["default"].rank_pattern is None
    assert 8 <= alive(twin) < 16 and twin.peft_config["default"].rank_pattern
    allocator = next(iter(layers(model).values())).allocators["default"]
    assert allocator.step == 0 and next(iter(layers(twin).values())).allocators["default"].step == 6
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.add_adapter("b", pf.LoraConfig(target_modules=["up_proj"]))
    model.delete_adapter("default")
    torch.optim.SGD(parameters, lr=0.1).step()
    assert allocator.step == 0
    watched = weakref.ref(allocator)
    assert watched() in allocation._ALLOCATORS
    del model, twin, allocator
    gc.collect()
    assert watched() is None


def test_the_orthogonality_term_is_in_the_loss_in_training_only():
    model = adapted()
    with torch.no_grad():
        training, evaluation = model(**batch("llama")).loss, model.eval()(**batch("llama")).loss
        expected = 0.0
        for layer in layers(model).values():
            for m in (layer.lora_A["default"].double(), layer.lora_B["default"].double().T):
                expected += ((m @ m.T - torch.eye(4)) ** 2).sum() ** 0.5 / 8
    assert (training - evaluation).item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    torch.testing.assert_close(evaluation, build("llama")(**batch("llama")).loss)
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    assert model.train()(**inputs).loss is None
    assert model.base_model.penalty().item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    with model.disable_adapter():
        assert model.base_model.penalty() is None
    model.set_adapter("default", inference_mode=True)
    torch.testing.assert_close(model(**batch("llama")).loss, evaluation)
    assert adapted(orth_reg_weight=0.0).base_model.penalty() is None
    one, zero = adapted(), adapted(orth_reg_weight=0.0)
    for each in (one, zero):
        scatter(each)
        each(**batch("llama")).loss.backward()
    e, b = ([dict(m.named_parameters())[n].grad for m in (one, zero)] for n in _names(one))
    assert torch.allclose(*e) and not torch.allclose(*b)


def _names(model):
    path = next(iter(layers(model)))
    return f"{path}.lora_E.default", f"{path}.lora_B.default"


@pytest.mark.parametrize("steps", [7, 14])
def test_files_hold_the_kept_triplets_and_load_for_inference_and_for_training(steps, tmp_path):
    model = adapted()
    train(model, steps)
    model.eval().save_pretrained(tmp_path)
    expected = model(**batch("llama"))
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert (pattern == model.peft_config["default"].rank_pattern) is (steps == 14)  # some came back since the last mask
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, kept in pattern.items():
        path = "base_model.model." + name.removesuffix(".lora_E")
        assert tensors[f"{path}.lora_A"].shape == (sum(kept), 32) and tensors[f"{path}.lora_E"].shape == (sum(kept), 1)
    close = {"rtol": 1e-4, "atol": 1e-5}
    loaded = pf.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert loaded.get_nb_trainable_parameters()[0] == 0
    output = loaded(**batch("llama"))  # with labels
    torch.testing.assert_close((output.logits, output.loss), (expected.logits, expected.loss), **close)
    again = pf.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(again(**batch("llama")).logits, expected.logits, **close)
    assert {len(layer.lora_E["default"]) for layer in layers(again).values()} == {4}
    assert again.peft_config["default"].rank_pattern == pattern
    train(again.train(), 3, by_hand=1, first=steps)
    assert alive(again) == (8 if steps == 14 else alive(again)) and alive(again) >= 8
    again.save_pretrained(tmp_path / "again")
    after = again.eval()(**batch("llama")).logits
    reread = pf.PeftModel.from_pretrained(build("llama"), tmp_path / "again")
    torch.testing.assert_close(reread(**batch("llama")).logits, after, **close)
    again.load_adapter(tmp_path, "default")  # the former values, into the adapter that is there
    torch.testing.assert_close(again(**batch("llama")).logits, expected.logits, **close)


@pytest.mark.parametrize("until", [7, 12])
def test_a_training_that_is_resumed_is_the_same_training(until, tmp_path):
    def optimizer(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)

    whole = adapted()
    train(whole, 14, optimizer=optimizer(whole))
    part = adapted()
    train(part, until, optimizer=optimizer(part))
    part.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).train()
    train(again, 14 - until, optimizer=optimizer(again), first=until)
    assert again.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern
    for (name, mine), other in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other), name
    state = load_file(tmp_path / "adalora_state.safetensors")
    assert any(key.endswith(".mean") for key in state) is (until == 7)
    del state["step"]
    save_file(state, tmp_path / "adalora_state.safetensors")
    with pytest.raises(ValueError, match="adalora_state.safetensors does not fit the model, nothing was loaded"):
        pf.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    loaded = pf.PeftModel.from_pretrained(build("llama"), tmp_path)
    loaded.save_pretrained(tmp_path)  # one that was never trained has nothing to resume
    assert not (tmp_path / "adalora_state.safetensors").exists()


def test_a_layer_may_lose_all_its_triplets(tmp_path):
    model = adapted()
    scatter(model)
    config, (first, *_) = model.peft_config["default"], layers(model).values()
    names = [p.removeprefix("base_model.model.") + ".lora_E" for p in layers(model)]
    config.rank_pattern = {
        names[0]: [False] * 4,
        names[1]: [True] * 4,
        names[2]: [True] + [False] * 3,
        names[3]: [True] * 4,
    }
    first.allocators["default"].step = 100
    first.allocators["default"].after_optimizer_step()
    model.eval().save_pretrained(tmp_path)
    expected = model(**batch("llama")).logits
    loaded = pf.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert [layer.r["default"] for layer in layers(loaded).values()] == [0, 4, 1, 4]
    torch.testing.assert_close(loaded(**batch("llama")).logits, expected, rtol=1e-4, atol=1e-5)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(**batch("llama")).logits, expected, rtol=1e-4, atol=1e-5)


def test_trainer_needs_no_callback(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = adapted(tfinal=1, total_step=6, tinit=1, deltaT=1)
    data = [{k: v[0] for k, v in batch("llama", seed=i, rows=1).items()} for i in range(12)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=6, report_to=[], use_cpu=True, learning_rate=0.05,
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert alive(model) == 8


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"total_step": None}, ValueError, "total_step is None"),
        ({"total_step": 0}, ValueError, "total_step is 0"),
        ({"init_r": 0}, ValueError, "init_r is 0, expected a positive integer"),
        ({"target_r": 5}, ValueError, "expected at most init_r = 4"),
        ({"tinit": 11}, ValueError, "leave no step"),
        ({"deltaT": 0}, ValueError, "deltaT is 0"),
        ({"beta1": 1.0}, ValueError, "0 < beta1 < 1"),
        ({"orth_reg_weight": -1.0}, ValueError, "orth_reg_weight is -1"),
        ({"orth_reg_weight": "x"}, TypeError, "expected a number"),
        ({"rank_pattern": {"a": [1, 0]}}, TypeError, "a list of booleans"),
        ({"use_dora": True}, NotImplementedError, "AdaLoraConfig: use_dora=True"),
    ],
)
def test_bad_configs(options, error, words):
    with pytest.raises(error, match=words):
        pf.AdaLoraConfig(**(OPTIONS | options))


def test_what_counts_for_nothing_is_said_and_patterns_of_another_rank_refused():
    with pytest.warns(UserWarning, match="r counts for nothing in AdaLoRA; the initial rank is init_r"):
        pf.AdaLoraConfig(r=3, **OPTIONS)
    with pytest.raises(ValueError, match="has 2 entries, expected init_r = 4"):
        adapted(rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [True, False]})
    with pytest.raises(ValueError, match="no default for Sequential"):
        pf.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), pf.AdaLoraConfig(**OPTIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted()
