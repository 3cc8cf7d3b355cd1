"""Our PeftModel and AdamW under transformers' own Trainer, in bf16 autocast and without."""

import math

import pytest
import torch

import pyfastpeft as pf

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def train(
    tiny_model,
    tmp_path,
    *,
    quantise,
    optimizers=(None, None),
    rank=4,
    trainer=None,
    cls=transformers.Trainer,
    **arguments,
):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    if quantise:
        pf.quantize_model(model, compute_dtype=torch.float32)
    config = pf.LoraConfig(r=rank, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = pf.get_peft_model(model, config)
    if callable(optimizers[0]):
        optimizers = (optimizers[0](model), None)
    text = b"the quick brown fox jumps over the lazy dog. " * 20
    rows = [{"input_ids": [b + 3 for b in text[i : i + 32]]} for i in range(0, 640, 32)]
    for row in rows:
        row["labels"] = row["input_ids"]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **({"save_strategy": "no"} | arguments),
    )
    trainer = cls(model=model, args=settings, train_dataset=rows, optimizers=optimizers, **(trainer or {}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    return model, losses


@pytest.mark.parametrize("quantise", [False, True], ids=["lora", "qlora"])
def test_bf16_autocast(tiny_model, tmp_path, quantise):
    model, _ = train(tiny_model, tmp_path, quantise=quantise, bf16=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("bits", [32, 8])
def test_our_optimizer(tiny_model, tmp_path, bits):
    def optimizer(model):
        return pf.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, state_bits=bits)

    train(tiny_model, tmp_path, quantise=True, optimizers=(optimizer, None), bf16=True)


def test_our_optimizer_takes_the_steps_of_torchs(tiny_model, tmp_path):
    def losses(cls):
        def optimizer(model):
            return cls([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.01)

        return train(tiny_model, tmp_path, quantise=False, optimizers=(optimizer, None))[1]

    assert losses(pf.optim.AdamW) == pytest.approx(losses(torch.optim.AdamW), rel=1e-3)


def test_gradient_checkpointing(tiny_model, tmp_path):
    train(tiny_model, tmp_path, quantise=True, bf16=True, gradient_checkpointing=True)


def test_saved_adapter_loads(tiny_model, tmp_path):
    model, _ = train(tiny_model, tmp_path, quantise=False)
    model.save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    again = pf.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.arange(3, 35).reshape(1, 32)
    torch.testing.assert_close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=0, atol=0)


def test_a_paged_optimizer(tiny_model, tmp_path):
    """Handed over as an object, or as a class with its arguments: the losses are AdamW's, with most of the state on disk."""
    import os

    losses = []
    for cls, options in (
        (pf.optim.AdamW, {}),
        (pf.optim.PagedAdamW, {"resident_bytes": 131072, "spill_dir": tmp_path}),
    ):
        made = []

        def optimizer(model, cls=cls, options=options, made=made):
            parameters = [p for p in model.parameters() if p.requires_grad]
            made.append(cls(parameters, lr=2e-2, **options))
            return made[0]

        losses.append(train(tiny_model, tmp_path / "run", quantise=True, rank=64, optimizers=(optimizer, None))[1])
    by_class = {"optimizer_cls_and_kwargs": (pf.optim.PagedAdamW, {"lr": 2e-2, "resident_bytes": "131072"})}
    losses.append(train(tiny_model, tmp_path / "run", quantise=True, rank=64, trainer=by_class, weight_decay=0.01)[1])
    assert losses[0] == losses[1] == losses[2]
    report = made[0].memory_report()
    assert report["spilled_bytes"] > report["resident_bytes"] > 0 and "run" in os.listdir(tmp_path)


def test_steps_inside_backward(tiny_model, tmp_path):
    def optimizer(model):
        return pf.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)

    def inside(model):
        made = optimizer(model)
        made.step_in_backward()
        return made

    class NoNorm(transformers.Trainer):
        def _get_grad_norm(self, model, grad_norm=None):
            return grad_norm

    plain, losses = train(tiny_model, tmp_path, quantise=False, optimizers=(optimizer, None), max_grad_norm=0)
    model, same = train(tiny_model, tmp_path, quantise=False, optimizers=(inside, None), max_grad_norm=0, cls=NoNorm)
    assert losses == same
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    for refused in ({}, {"max_grad_norm": 0, "gradient_accumulation_steps": 2}):
        with pytest.raises(pf.optim.GradientsReleasedError):
            train(tiny_model, tmp_path, quantise=False, optimizers=(inside, None), cls=NoNorm, **refused)
