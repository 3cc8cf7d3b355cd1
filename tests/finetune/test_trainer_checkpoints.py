"""transformers' Trainer with checkpoints of the adapter alone: every method trains, is saved, goes on, and loads."""

import math

import pytest
import torch

import pyfastpeft as pf
from pyfastpeft.integrations import AdapterCheckpoints

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

V = 4
METHODS = {
    "prompt": pf.PromptTuningConfig(num_virtual_tokens=V, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM"),
    "p_tuning": pf.PromptEncoderConfig(
        num_virtual_tokens=V, encoder_reparameterization_type="LSTM", encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
    "prefix": pf.PrefixTuningConfig(num_virtual_tokens=V, prefix_projection=True, task_type="CAUSAL_LM"),
    "lora": pf.LoraConfig(target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM"),
    "p_tuning_v2": pf.PrefixTuningConfig(num_virtual_tokens=V, task_type="CAUSAL_LM"),
}


class Mixed(AdapterCheckpoints, transformers.Trainer):
    pass


def base(tiny_model):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def trainer_of(model, folder, kind=transformers.Trainer, **arguments):
    text = b"the quick brown fox jumps over the lazy dog. " * 20
    rows = [{"input_ids": (ids := [b + 3 for b in text[i : i + 32]]), "labels": ids} for i in range(0, 640, 32)]
    settings = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=2e-2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="steps", save_steps=3, eval_strategy="steps",
        eval_steps=3, **arguments,
    )  # fmt: skip
    return kind(model=model, args=settings, train_dataset=rows, eval_dataset=rows[:4])


def values(trainer, key):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


@pytest.mark.parametrize("method, kind", [*((m, transformers.Trainer) for m in METHODS), ("lora", Mixed)])
def test_training_saving_resuming_loading(method, kind, tiny_model, tmp_path):
    torch.manual_seed(0)
    model = pf.get_peft_model(base(tiny_model), METHODS[method])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(model, tmp_path / "run", kind)
    trainer.train()
    losses = values(trainer, "loss")
    assert len(losses) == 6 and all(map(math.isfinite, losses.values())) and losses[6] < losses[1]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name

    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    torch.manual_seed(1)  # other initial values: the checkpoint's must replace them
    again = pf.get_peft_model(base(tiny_model), METHODS[method])
    resumed = trainer_of(again, tmp_path / "run", kind)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert values(resumed, "loss") == losses and values(resumed, "eval_loss") == values(trainer, "eval_loss")
    for (name, parameter), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(parameter, other), name

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = pf.PeftModel.from_pretrained(base(tiny_model), str(tmp_path / "adapter")).eval()
    ids = torch.arange(3, 35).reshape(1, 32)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_the_best_checkpoint_is_loaded(tiny_model, tmp_path):
    model = pf.get_peft_model(base(tiny_model), METHODS["prefix"])
    model.add_adapter("other", METHODS["lora"])
    trainer = trainer_of(
        model, tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    before = {key: t.detach().clone() for key, t in model.base_model.tensors("other").items()}
    trainer.train()
    losses = values(trainer, "eval_loss")
    assert losses[3] > losses[6] and trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert trainer.evaluate()["eval_loss"] == losses[3]
    assert all(torch.equal(t, before[key]) for key, t in model.base_model.tensors("other").items())
    assert model.active_adapters == ["default"] and sum(p.requires_grad for p in model.parameters()) == 5
    model.add_adapter("third", METHODS["lora"])
    with pytest.raises(ValueError, match="no checkpoint of adapter 'third'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_models_without_adapters_are_the_trainers_affair(tiny_model, tmp_path):
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_config(config)
    trainer = trainer_of(model, tmp_path, load_best_model_at_end=True)
    trainer.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()
    trainer_of(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
