"""transformers' Trainer as it is, without a class of ours: models with tied weights, other tasks, and no peft installed."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import pyfastpeft as pf
from tests.methods.models import TASK, batch, build

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def rows_of(kind, count=24):
    samples = batch(kind, rows=count)
    return [{name: values[i] for name, values in samples.items()} for i in range(count)]


def trainer_of(model, folder, rows, **arguments):
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        **({"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "logging_steps": 1, "report_to": [],
            "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
            "eval_steps": 2} | arguments),
    )  # fmt: skip
    return transformers.Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows[:4])


def values(trainer, key):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


@pytest.mark.parametrize("method", ["lora", "bitfit"])
@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert"])
def test_tied_models(kind, method, tmp_path):
    """Evaluation has a loss, checkpoints hold adapters (and BERT's head) alone, resuming gives the same bits, and the best
    checkpoint comes back at the end."""
    options = {"lora": pf.LoraConfig(r=4, target_modules="all-linear", task_type=TASK[kind], lora_dropout=0.1),
               "bitfit": pf.BitFitConfig(task_type=TASK[kind])}  # fmt: skip
    rows = rows_of(kind)

    def run(folder, seed, **arguments):
        torch.manual_seed(seed)
        model = pf.get_peft_model(build(kind), options[method])
        return trainer_of(model, folder, rows, gradient_accumulation_steps=2, label_names=["labels"], **arguments)

    # a rate as this makes the loss of the last step the worst
    trainer = run(tmp_path, 0, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    names = {file.name for file in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    losses, evaluated = values(trainer, "loss"), values(trainer, "eval_loss")
    assert set(losses) == {1, 2, 3, 4} and set(evaluated) >= {2, 4}
    best = max((2, 4), key=evaluated.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == evaluated[best]

    resumed = run(tmp_path / "again", 1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert values(resumed, "loss") == losses and values(resumed, "eval_loss") == evaluated


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_smoothed_loss_has_its_labels_shifted(kind, tmp_path):
    """The Trainer shifts them if it knows the model below the adapters as a causal one."""
    rows = rows_of(kind, 4)
    arguments = {"label_smoothing_factor": 0.1, "save_strategy": "no"}
    model = pf.get_peft_model(build(kind), pf.LoraConfig(r=4, target_modules="all-linear", task_type=TASK[kind]))
    adapted = trainer_of(model, tmp_path, rows, **arguments).evaluate()
    assert adapted["eval_loss"] == trainer_of(build(kind), tmp_path, rows, **arguments).evaluate()["eval_loss"]


def test_a_checkpoint_of_the_whole_model_can_be_resumed(tmp_path):
    """As a Trainer that did not know PeftModel has written it."""
    rows, config = rows_of("llama"), pf.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_of(pf.get_peft_model(build("llama"), config), tmp_path, rows)
    trainer.train()
    import safetensors.torch

    checkpoint = tmp_path / "checkpoint-4"
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (checkpoint / file).unlink()
    safetensors.torch.save_file(trainer.model.state_dict(), checkpoint / "model.safetensors")
    again = trainer_of(pf.get_peft_model(build("llama"), config), tmp_path, rows, max_steps=5)
    again._load_from_checkpoint(str(checkpoint))
    for (name, parameter), (_, other) in zip(
        trainer.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(parameter, other), name


def test_the_card_of_a_pushed_adapter(tmp_path):
    model = pf.get_peft_model(build("llama"), pf.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = trainer_of(model, tmp_path, rows_of("llama"))
    trainer.save_model()
    trainer.create_model_card(model_name="a test", tags="trainer")
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and "- lora" in card and "a test" in card


def test_without_peft(tmp_path):
    """In a process where no package peft is, and the Trainer is imported after the adapter was made."""
    code = f"""
        import sys
        sys.modules["peft"] = None
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        import torch
        import pyfastpeft as pf
        from tests.methods.models import build
        model = pf.get_peft_model(build("gpt2"), pf.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        assert "transformers.trainer" not in sys.modules
        from tests.finetune.test_plain_trainer import rows_of, trainer_of, values
        run = trainer_of(model, {str(tmp_path)!r}, rows_of("gpt2"), load_best_model_at_end=True)
        from transformers.utils import is_peft_available
        assert not is_peft_available()
        run.train()
        model = pf.get_peft_model(build("gpt2"), pf.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        again = trainer_of(model, {str(tmp_path)!r}, rows_of("gpt2"))
        again.train(resume_from_checkpoint={str(tmp_path / "checkpoint-2")!r})
        assert values(run, "loss") == values(again, "loss")
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    names = {file.name for file in (tmp_path / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
