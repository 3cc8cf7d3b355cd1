"""AdaLoRA against installed Hugging Face PEFT: defaults, initial values, a training with allocation by hand, files."""

import json
import warnings

import pytest
import torch

import pyfastpeft as pf
from pyfastpeft.methods.adalora import budget_at
from tests.methods.models import TASK, batch, build

peft = pytest.importorskip("peft")
OPTIONS = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 3, "deltaT": 2, "total_step": 12, "lora_alpha": 8}


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_training_with_allocation_by_hand(kind, tmp_path):
    results = []
    for library in (peft, pf):
        base = build(kind)
        torch.manual_seed(5)
        model = library.get_peft_model(base, library.AdaLoraConfig(task_type=TASK[kind], **OPTIONS)).train()
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        losses = []
        for step in range(12):
            loss = model(**batch(kind, seed=step)).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        model.save_pretrained(tmp_path / library.__name__)
        end = {n: p.detach() for n, p in model.named_parameters() if n in start}
        results.append((start, losses, end))
    (start, losses, end), (my_start, my_losses, my_end) = results
    assert set(my_start) == set(start) and all(torch.equal(my_start[n], p) for n, p in start.items())
    assert my_losses == pytest.approx(losses, rel=1e-4)
    for name, expected in end.items():
        torch.testing.assert_close(my_end[name], expected, rtol=1e-2, atol=1e-4, msg=name)
    configs = [json.loads((tmp_path / lib / "adapter_config.json").read_text()) for lib in ("peft", "pyfastpeft")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[1] == configs[0] and sum(map(sum, configs[0]["rank_pattern"].values())) > 0
    inputs = batch(kind)
    labels = inputs.pop("labels")
    if kind == "t5":
        inputs["decoder_input_ids"] = labels
    outputs = [
        library.PeftModel.from_pretrained(build(kind), tmp_path / folder).eval()(**inputs).logits
        for library, folder in ((peft, "peft"), (pf, "peft"), (peft, "pyfastpeft"), (pf, "pyfastpeft"))
    ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(outputs[3], outputs[2], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(outputs[3], outputs[0], rtol=1e-2, atol=1e-3)


def test_the_budget():
    from peft.tuners.adalora.layer import RankAllocator

    model = peft.get_peft_model(build("llama"), peft.AdaLoraConfig(task_type="CAUSAL_LM", **OPTIONS))
    theirs = RankAllocator(model.base_model.model, model.peft_config["default"], "default")
    config = pf.AdaLoraConfig(**OPTIONS)
    assert [theirs.budget_schedule(t)[0] for t in range(14)] == [budget_at(t, config, 4) for t in range(14)]


def test_defaults_of_every_architecture():
    from peft.utils import constants

    from pyfastpeft.methods.adalora.targets import TARGET_MODULES, TARGET_PATTERNS

    theirs = constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
    assert TARGET_MODULES | TARGET_PATTERNS == {k: v if isinstance(v, str) else set(v) for k, v in theirs.items()}
