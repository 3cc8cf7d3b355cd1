"""Which layers a config names: against PEFT's matching, near misses, and errors that leave the model as it was."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyfastpeft as pf
from pyfastpeft.inject import find_targets
from pyfastpeft.methods.lora import LoraLinear
from pyfastpeft.saved_modules import ModulesToSaveWrapper
from tests.methods.models import TASK, batch, build

MODEL = build("llama")
NAMES = [n for n, m in MODEL.named_modules() if isinstance(m, nn.Linear)]
ENDS = sorted({".".join(n.split(".")[-k:]) for n in NAMES for k in (1, 2, 3, 5)})
PATTERNS = [r".*\.(q|v)_proj", r".*\.layers\.1\..*_proj", r"model\.layers\.\d\.mlp\.\w+_proj", r".*down_proj|lm_head"]


def snapshot(model):
    return {
        "modules": {n: id(m) for n, m in model.named_modules()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "values": {n: p.detach().clone() for n, p in model.named_parameters()},
        "training": model.training,
    }


def assert_unchanged(model, before):
    now = snapshot(model)
    for key in ("modules", "flags", "training"):
        assert now[key] == before[key]
    assert all(torch.equal(now["values"][n], v) for n, v in before["values"].items())


@settings(max_examples=120, deadline=None)
@given(
    target=st.one_of(
        st.lists(st.sampled_from(ENDS), min_size=1, max_size=4), st.sampled_from([*PATTERNS, "all-linear"])
    ),
    exclude=st.one_of(st.none(), st.lists(st.sampled_from(ENDS), max_size=2), st.sampled_from(PATTERNS)),
    saved=st.one_of(st.none(), st.sampled_from([["lm_head"], ["mlp"], ["embed_tokens"]])),
    layers=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 2), max_size=2)),
    pattern=st.sampled_from([None, "layers", ["h", "layers"], []]),
)
def test_the_same_layers_as_peft(target, exclude, saved, layers, pattern):
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    import peft

    if isinstance(target, str):
        layers = pattern = None
    if layers is None:
        pattern = None
    config = {"target_modules": target, "exclude_modules": exclude, "modules_to_save": saved}
    config |= {"layers_to_transform": layers, "layers_pattern": pattern}
    theirs = peft.LoraConfig(**config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = tuners._maybe_include_all_linear_layers(theirs, MODEL)
        expected = [n for n, _ in MODEL.named_modules() if n and tuners.check_target_module_exists(theirs, n)]
        if expected:
            assert list(find_targets(MODEL, pf.LoraConfig(**config))) == expected
        else:
            with pytest.raises(ValueError, match=r"matches no module|leaves none of them"):
                find_targets(MODEL, pf.LoraConfig(**config))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "opt", "bloom"])
def test_default_targets_and_all_linear(kind):
    peft = pytest.importorskip("peft")
    for target in (None, "all-linear"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(build(kind), peft.LoraConfig(task_type=TASK[kind], target_modules=target))
            ours = pf.get_peft_model(build(kind), pf.LoraConfig(task_type=TASK[kind], target_modules=target))
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        # what the file says means the same layers again
        again = build(kind)
        assert list(find_targets(again, ours.peft_config["default"])) == theirs.base_model.targeted_module_names


def test_patterns_of_rank_and_alpha():
    config = pf.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "o_proj"], use_rslora=True,
        rank_pattern={r"layers\.1\..*q_proj": 2, "v_proj": 3}, alpha_pattern={"v_proj": 5, "up_proj": 1},
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"alpha_pattern has \['up_proj'\]"):
        model = pf.get_peft_model(build("llama"), config).get_base_model()
    ranks = [
        [getattr(layer.self_attn, n).r["default"] for n in ("q_proj", "v_proj", "o_proj")]
        for layer in model.model.layers
    ]
    assert ranks == [[4, 3, 4], [2, 3, 4]]
    assert model.model.layers[0].self_attn.v_proj.scaling["default"] == pytest.approx(5 / 3**0.5)


BAD = {
    "a typo": ({"target_modules": ["q_porj"]}, r"\['q_porj'\] match no module.*near misses:.*q_proj"),
    "one typo among several": ({"target_modules": ["q_proj", "dwn_proj"]}, r"\['dwn_proj'\] match.*near misses:.*down_proj"),
    "a regex": ({"target_modules": r"model\.layrs\..*"}, r"matches no module.*regular expression for the whole path"),
    "a name as a string": ({"target_modules": "q_proj"}, r"matches no module.*near misses: q_proj.*a list names layers"),
    "another architecture": ({"target_modules": ["query_key_value"]}, r"the layers it can adapt end in: down_proj, embed_tokens"),
    "not linear": ({"target_modules": ["input_layernorm"]}, r"input_layernorm \(LlamaRMSNorm\)"),
    "a norm": ({"target_modules": ["norm"]}, r"norm \(LlamaRMSNorm\); expected nn.Linear"),
    "a container": ({"target_modules": r".*self_attn.*"}, r"take the others out with exclude_modules"),
    "everything excluded": ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, r"leaves none of them"),
    "no such layer": ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"layers_to_transform=\[7\] leaves none"),
    "modules_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, r"'lm_haed' matches.*lm_head"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), BAD.values(), ids=BAD)
def test_bad_targets_leave_the_model_as_it_was(config, message):
    model = build("llama").train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pf.get_peft_model(model, pf.LoraConfig(**config))
    assert_unchanged(model, before)
    adapted = pf.get_peft_model(model, pf.LoraConfig(target_modules=["v_proj"]))
    before = snapshot(adapted)
    with pytest.raises(ValueError, match=message):
        adapted.add_adapter("second", pf.LoraConfig(**config))
    assert_unchanged(adapted, before)
    assert list(adapted.peft_config) == ["default"]


@pytest.mark.parametrize(("cls", "at"), [(LoraLinear, 3), (ModulesToSaveWrapper, 2)], ids=["a layer", "a saved module"])
@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch, cls, at, second):
    config = pf.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["pooler"])
    model = build("bert")
    adapted = pf.get_peft_model(model, config) if second else None
    before = snapshot(model)
    calls = []
    real = cls.add_adapter

    def fails(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == at:
            raise MemoryError("no more")
        real(self, *args, **kwargs)

    monkeypatch.setattr(cls, "add_adapter", fails)
    with pytest.raises(MemoryError):
        adapted.add_adapter("b", config) if second else pf.get_peft_model(model, config)
    assert_unchanged(model, before)


def test_models_without_a_default_and_quantised_heads():
    with pytest.raises(ValueError, match="Sequential, which has no config.model_type.*all-linear"):
        pf.get_peft_model(nn.Sequential(nn.Linear(2, 2)), pf.LoraConfig())
    model = pf.quantize_model(build("llama"), skip=())
    with pytest.raises(ValueError, match="lm_head is quantised and cannot be trained"):
        pf.get_peft_model(model, pf.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_attention_with_an_output_layer_that_is_never_called():
    with pytest.raises(ValueError, match="out_proj"):
        pf.get_peft_model(nn.TransformerEncoderLayer(8, 2), pf.LoraConfig(target_modules=["out_proj"]))


UNSUPPORTED = {
    "init_lora_weights": "corda",
    "use_qalora": True, "qalora_group_size": 8, "megatron_core": "other",
    "runtime_config": {"ephemeral_gpu_offload": True}, "corda_config": {"rho": 2.0}, "alora_invocation_tokens": [1],
}  # fmt: skip


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_fields_not_yet_supported_are_named(field):
    with pytest.raises(NotImplementedError, match=f"{field}=.* is not supported yet"):
        pf.LoraConfig(**{field: UNSUPPORTED[field]})


BAD_FIELDS = [
    ({"r": 0}, ValueError, "r is 0"), ({"r": 1.5}, TypeError, "r is 1.5"), ({"r": "8"}, TypeError, "r is '8'"),
    ({"lora_dropout": 1.0}, ValueError, "0 <= p < 1"), ({"lora_dropout": float("nan")}, ValueError, "finite"),
    ({"lora_alpha": "a"}, TypeError, "expected a number"), ({"bias": "some"}, ValueError, "none, all, lora_only"),
    ({"task_type": "CHAT"}, ValueError, "SEQ_CLS"), ({"target_modules": "(("}, ValueError, "regular expression"),
    ({"target_modules": [3]}, TypeError, "list of strings"), ({"target_modules": [""]}, ValueError, "empty name"),
    ({"rank_pattern": {"q": -1}}, ValueError, r"rank_pattern\['q'\] is -1"),
    ({"rank_pattern": {"(": 2}}, ValueError, "regular expression"), ({"rank_pattern": [1]}, TypeError, "expected a dict"),
    ({"target_modules": "x", "layers_to_transform": 1}, ValueError, "goes with a list"),
    ({"target_modules": ["x"], "layers_pattern": "h"}, ValueError, "without layers_to_transform"),
    ({"layers_to_transform": "1"}, TypeError, "expected an integer"), ({"use_rslora": 1}, TypeError, "True or False"),
    ({"no_such_field": 1}, TypeError, "no_such_field"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "error", "words"), BAD_FIELDS, ids=str)
def test_bad_fields_are_named(fields, error, words):
    with pytest.raises(error, match=words):
        pf.LoraConfig(**fields)


def test_fields_and_defaults_are_pefts():
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(r=3, target_modules=["a"], task_type="CAUSAL_LM", rank_pattern={"a": 2}, use_rslora=True)
    ours = pf.LoraConfig(**theirs.to_dict())
    assert ours.to_dict() == theirs.to_dict()
    assert peft.LoraConfig(**ours.to_dict()).to_dict() == theirs.to_dict()
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    assert pf.LoraConfig().to_dict() == peft.LoraConfig().to_dict()
    assert set(pf.TaskType.__members__) == set(peft.TaskType.__members__)
    assert set(pf.PeftType.__members__) - {"BITFIT"} <= set(peft.PeftType.__members__)


def test_the_config_is_not_changed():
    config = pf.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    before = config.to_dict()
    model = pf.get_peft_model(build("bert"), config)
    assert config.to_dict() == before
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    model(**batch("bert"))
