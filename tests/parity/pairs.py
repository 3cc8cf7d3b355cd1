"""The same adapted model twice: PEFT's and ours."""

import torch

import pyfastpeft as pf
from tests.methods.models import TASK, build


def pair(base, config="LoraConfig", **options):
    """[PEFT's, ours]: two models with the same weights and the same draws for their adapters.

    base      one of tests.methods.models' kinds, whose task is the config's then, or a function that builds the model
    config    the class's name in both libraries
    options   its arguments
    """
    import peft

    make = base if callable(base) else lambda: build(base)
    task = {"task_type": TASK[base]} if base in TASK else {}
    models = []
    for library in (peft, pf):
        model = make()
        torch.manual_seed(5)
        models.append(library.get_peft_model(model, getattr(library, config)(**(task | options))))
    return models


def run(model, inputs):
    """Loss's gradients by name, and the logits under the name "logits"."""
    output = model(**inputs)
    output.loss.backward()
    return {"logits": output.logits} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
