"""ReLoRA: merging and starting again, the jagged schedule, the optimizer's state, one call and one callback."""

import math
import warnings

import pytest
import torch

import pyfastpeft as pf
from pyfastpeft.methods.relora import (
    JaggedCosine,
    JaggedCosineLR,
    ReLora,
    merge_and_reinit,
    relora_callback,
    reset_optimizer_state,
)
from tests.methods.contract import scatter
from tests.methods.models import TASK, batch, build
from tests.methods.test_targets import assert_unchanged, snapshot


def adapted(kind="llama", quantize=False, dtype=torch.float32, **config):
    base = build(kind, dtype=dtype)
    if quantize:
        base = pf.quantize_model(base)
    config = {"target_modules": "all-linear", "r": 4, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pf.get_peft_model(base, pf.LoraConfig(task_type=TASK[kind], **config))


def logits(model, kind="llama"):
    with torch.no_grad():
        return model.eval()(**batch(kind)).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_merging_and_starting_again_changes_nothing_on_dense(kind):
    model = scatter(adapted(kind))
    before, (_, layer) = logits(model, kind), model.base_model.layers()[0]
    parameters, a = [id(p) for p in model.parameters()], layer.lora_A["default"].weight.clone()
    expected = layer.base.get_weight() + layer.get_delta_weight("default")
    errors = merge_and_reinit(model)
    assert set(errors) == {path for path, _ in model.base_model.layers()} and set(errors.values()) == {0.0}
    assert torch.equal(layer.base.get_weight(), expected)
    torch.testing.assert_close(logits(model, kind), before, rtol=1e-4, atol=1e-5)
    assert [id(p) for p in model.parameters()] == parameters
    assert not layer.lora_B["default"].weight.any() and not torch.equal(layer.lora_A["default"].weight, a)
    assert layer.lora_A["default"].weight.abs().max() <= 1 / math.sqrt(layer.in_features)
    with model.disable_adapter():  # the update is in the base now
        torch.testing.assert_close(logits(model, kind), before, rtol=1e-4, atol=1e-5)


def test_the_errors_of_16_and_4_bit_bases():
    sixteen, four = scatter(adapted(dtype=torch.bfloat16)), scatter(adapted(quantize=True))
    wanted = {path: layer.merged_weights(["default"])[0] for path, layer in four.base_model.layers()}
    assert all(0 < error < 4e-3 for error in merge_and_reinit(sixteen).values())
    errors = merge_and_reinit(four)
    for path, layer in four.base_model.layers():
        true = (layer.base.get_weight(torch.float32) - wanted[path]).norm() / wanted[path].norm()
        assert errors[path] == pytest.approx(true.item(), rel=1e-4) and 0.02 < errors[path] < 0.2


def test_several_adapters_and_chosen_ones():
    model = scatter(adapted(target_modules=["q_proj"]))
    model.add_adapter("b", pf.LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    model.set_adapter(["default", "b"])
    scatter(model, seed=4)
    before = logits(model)
    errors = merge_and_reinit(model, ["b"])
    assert len(errors) == 4
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    layer = dict(model.base_model.layers())["model.layers.0.self_attn.q_proj"]
    assert layer.lora_B["default"].weight.any() and not layer.lora_B["b"].weight.any()


def test_what_cannot_be_merged_is_named_and_nothing_changed():
    model = scatter(adapted())
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: adapter 'default' has NaN"):
        merge_and_reinit(model)
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = 0.0
        before["values"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="there is no adapter 'x'"):
        merge_and_reinit(model, ["x"])
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        merge_and_reinit(model)
    with pytest.raises(TypeError, match="expected a PeftModel"):
        merge_and_reinit(build("llama"))
    for config in (pf.IA3Config(), pf.AdaLoraConfig(total_step=3)):
        other = pf.get_peft_model(build("llama"), config)
        with pytest.raises(ValueError, match="expected adapters of LoraConfig"):
            merge_and_reinit(other)


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
def test_files_carry_the_changed_base(quantize, tmp_path):
    model = scatter(adapted(quantize=quantize, target_modules=["q_proj", "down_proj"]))
    merge_and_reinit(model)
    scatter(model, seed=6)
    expected = logits(model)
    with pytest.warns(UserWarning, match="base_weights.safetensors; pyfastpeft reads it"):
        model.save_pretrained(tmp_path)

    def base():
        return pf.quantize_model(build("llama")) if quantize else build("llama")

    again = pf.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again), expected)
    with pytest.warns(UserWarning, match="base_weights"):
        again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(pf.PeftModel.from_pretrained(base(), tmp_path / "again")), expected)
    other = build("llama") if quantize else pf.quantize_model(build("llama"))
    before = snapshot(other)
    with pytest.raises(
        ValueError, match="base_weights.safetensors does not fit the model, nothing was loaded: 4 layers"
    ):
        pf.PeftModel.from_pretrained(other, tmp_path)
    assert_unchanged(other, before)
    scatter(adapted(target_modules=["q_proj"])).save_pretrained(tmp_path)  # an ordinary adapter over it
    assert not (tmp_path / "base_weights.safetensors").exists()


def test_the_schedule():
    n, r, warm, restart_warm, m = 40, 10, 4, 3, 0.1
    schedule = JaggedCosine(n, r, warm, restart_warm, m)

    def c(u):
        return m + (1 - m) * 0.5 * (1 + math.cos(math.pi * (u - warm) / (n - warm)))

    got = [schedule(t) for t in range(n + 3)]
    assert got[:4] == [0.0, 0.25, 0.5, 0.75]
    for t in range(4, 40):
        k = t % r
        expected = k / restart_warm * c(t - k + restart_warm) if t >= r and k < restart_warm else c(t)
        assert got[t] == pytest.approx(expected), t
    assert got[10] == got[20] == got[30] == 0.0 and got[13] == pytest.approx(c(13)) and got[4] == 1.0
    assert got[40:] == [0.0, pytest.approx(0.1 / 3), pytest.approx(0.2 / 3)]  # beyond the end it stays at the minimum
    early = JaggedCosine(n, r, warm, restart_warm, m, adjust_step=2)
    assert early(18) == 0.0 and early(8) == pytest.approx(c(10))
    assert JaggedCosine(10, 4)(4) == JaggedCosine(10, 100)(4)  # no warm-up after restarts: no jags
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = JaggedCosineLR(optimizer, n, r, warm, restart_warm, min_lr_ratio=m)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), scheduler.step()
    assert rates == pytest.approx([2 * x for x in got[:12]])
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    resumed = JaggedCosineLR(other, n, r, warm, restart_warm, min_lr_ratio=m)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_last_lr() == scheduler.get_last_lr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0, 1), "total_steps is 0"), ((10, 2.5), "restart_every is 2.5"), ((10, 5, 10), "must be below total_steps"),
     ((10, 5, 0, 5), "below restart_every 5"), ((10, 5, 0, 0, 2.0), "min_lr_ratio is 2.0")],
)  # fmt: skip
def test_schedules_that_make_no_sense(arguments, words):
    with pytest.raises(ValueError, match=words):
        JaggedCosine(*arguments)


def optimizers(tmp_path):
    return {
        "torch": lambda p: torch.optim.AdamW(p, lr=0.01),
        "ours": lambda p: pf.optim.AdamW(p, lr=0.01),
        "8 bits": lambda p: pf.optim.AdamW(p, lr=0.01, state_bits=8),
        "paged": lambda p: pf.optim.PagedAdamW(p, lr=0.01, spill_dir=str(tmp_path)),
    }


@pytest.mark.parametrize("name", ["torch", "ours", "8 bits", "paged"])
@pytest.mark.parametrize("mode", ["reset", "random", "magnitude"])
def test_the_optimizers_state(name, mode, tmp_path):
    torch.manual_seed(0)
    mine, others = (torch.nn.Parameter(torch.randn(80, 64)) for _ in range(2))
    optimizer = optimizers(tmp_path)[name]([mine, others])
    for _ in range(3):
        for p in (mine, others):
            p.grad = torch.randn_like(p)
        optimizer.step()

    def moments(p):
        state = optimizer.state[p]
        if "exp_avg" in state:
            return [state["exp_avg"].clone(), state["exp_avg_sq"].clone()]
        from pyfastpeft.reference.adamw import dequantize_moment

        parts = ((state[f"state{i}"].flatten(), state[f"absmax{i}"], state[f"qmap{i}"]) for i in (1, 2))
        return [dequantize_moment(*part).view(p.shape) for part in parts]

    before, untouched = moments(mine), moments(others)
    reset_optimizer_state(optimizer, [mine, torch.nn.Parameter(torch.zeros(1))], mode, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(moments(others), untouched, strict=True))
    after = moments(mine)
    kept = after[0] != 0
    share = kept.float().mean().item()
    assert share == 0.0 if mode == "reset" else abs(share - 0.1) < (0.02 if mode == "random" else 2e-3)
    assert not after[1][~kept].any()  # a second moment that went with its first
    assert all(torch.equal(new[kept], old[kept]) for old, new in zip(before, after, strict=True))
    if mode == "magnitude":
        assert before[0][kept].abs().min() >= before[0][~kept].abs().max()
    mine.grad = torch.randn_like(mine)
    optimizer.step()  # and it goes on


def test_optimizers_it_cannot_thin_out():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(ValueError, match="expected exp_avg and exp_avg_sq"):
        reset_optimizer_state(optimizer, [p])
    for arguments, words in ((("all",), "mode is 'all'"), (("random", 1.5), "fraction is 1.5")):
        with pytest.raises(ValueError, match=words):
            reset_optimizer_state(optimizer, [p], *arguments)


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
def test_one_call_in_a_loop_reaches_a_higher_rank(quantize):
    model = adapted(quantize=quantize, target_modules=["up_proj"], r=2).train()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    start = layer.base.get_weight(torch.float32).clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    relora = ReLora(model, optimizer, 5, total_steps=20, warmup_steps=2, restart_warmup_steps=2, reset="random")
    restarts, losses = [], []
    for step in range(20):
        loss = model(**batch("llama")).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
        if relora.step():
            restarts.append(step + 1)
            assert len(relora.errors) == 2 and all((e > 0) is quantize for e in relora.errors.values())
            assert optimizer.param_groups[0]["lr"] == 0.0
    assert restarts == [5, 10, 15] and relora.restarts == 3 and losses[-1] < losses[0]
    if not quantize:
        change = layer.merged_weights(["default"])[0] - start
        assert change.norm() < 10 * start.norm()
        assert torch.linalg.matrix_rank(change, rtol=1e-4).item() == 8
    resumed = ReLora(model, optimizer, 5, total_steps=20, warmup_steps=2, restart_warmup_steps=2)
    resumed.load_state_dict(relora.state_dict())
    assert resumed.steps == 20 and resumed.scheduler.last_epoch == 20
    with pytest.raises(ValueError, match="restart_every is 0"):
        ReLora(model, optimizer, 0)


def test_one_callback_for_the_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = adapted(target_modules=["up_proj"], r=2)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    start, rates = layer.base.get_weight().clone(), []
    data = [{k: v[0] for k, v in batch("llama", seed=i, rows=1).items()} for i in range(6)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, max_steps=6, report_to=[], use_cpu=True, learning_rate=0.02,
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    callback = relora_callback(2, restart_warmup_steps=1, reset="reset")
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback, Watch()])
    trainer.train()
    schedule = JaggedCosine(6, 2, 0, 1)
    assert rates == pytest.approx([0.02 * schedule(t) for t in range(6)])
    assert set(callback.errors) == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    assert not torch.equal(layer.base.get_weight(), start) and layer.lora_B["default"].weight.any()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ConstantLR(optimizer)
    other = transformers.Trainer(
        model, arguments, train_dataset=data, callbacks=[relora_callback(2)], optimizers=(optimizer, plateau)
    )
    with pytest.raises(ValueError, match="is a ConstantLR, expected a LambdaLR"):
        other.train()
