"""EVA: A from the data's directions, ranks by explained variance; beside PEFT's, with its names, arguments and files."""

import copy

import peft
import pytest
import torch

import pyfastpeft as pf
from pyfastpeft.methods.lora.eva import IncrementalDirections
from tests.methods import eva_process
from tests.methods.models import VOCAB, build

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def _data(batches=3, rows=8, length=20, masked=True, seed=3):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
        ids[:, ::2] = ids[:, ::2] % 5  # some tokens are more frequent than others
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        if masked:
            batch["attention_mask"][:, -4:] = 0
            batch["labels"][::2, :6] = -100
        found.append(batch)
    return found


def _model(library=pf, kind="llama", quantised=False, eva=None, **options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    config = library.LoraConfig(init_lora_weights="eva", eva_config=library.EvaConfig(**(eva or {})), **options)
    base = build(kind)
    return library.get_peft_model(pf.quantize_model(base) if quantised else base, config)


def _initialise(library, model, data, **options):
    library.initialize_lora_eva_weights(model, data, show_progress_bar=False, **options)


def _layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(
    "eva, options",
    [
        ({}, {}),
        ({"rho": 1.0}, {}),
        ({"whiten": True, "adjust_scaling_factors": False}, {}),
        ({"use_label_mask": False, "tau": 0.9}, {"use_rslora": True}),
        ({"rho": 1.5}, {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"k_proj": 3}}),
    ],
)
def test_parity_with_peft(eva, options, tmp_path):
    """Ranks, directions, scalings; the files fit both ways."""
    ours, theirs = _model(eva=eva, **options), _model(peft, eva=eva, **options)
    data = _data()
    _initialise(pf, ours, data), _initialise(peft, theirs, data)
    mine, other = _layers(ours), _layers(theirs)
    assert mine.keys() == other.keys()
    for path, layer in mine.items():
        a, b = (each.lora_A["default"].weight.detach() for each in (layer, other[path]))
        assert a.shape == b.shape, path
        assert (torch.cosine_similarity(a, b) > 0.999).all(), path
        if not (eva or {}).get("whiten"):  # PEFT's own whitens in place, once for each layer that shares the input
            torch.testing.assert_close(a.norm(dim=1), torch.ones(len(a)), atol=1e-5, rtol=0)
        assert not layer.lora_B["default"].weight.any() and layer.lora_A["default"].weight.requires_grad
        assert layer.scaling["default"] == pytest.approx(other[path].scaling["default"])
    assert sum(layer.r["default"] for layer in mine.values()) == sum(
        {"v_proj": 6}.get(t, 4) if "rank_pattern" in options else 4 for t in TARGETS for _ in range(2)
    )
    with torch.no_grad():
        for path in mine:
            b = torch.randn(mine[path].lora_B["default"].weight.shape)
            mine[path].lora_B["default"].weight.copy_(b), other[path].lora_B["default"].weight.copy_(b)
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    inputs = {"input_ids": data[0]["input_ids"]}
    with torch.no_grad():
        for folder, model in (("ours", ours), ("theirs", theirs)):
            expected = model.eval()(**inputs).logits
            for library in (pf, peft):
                loaded = library.PeftModel.from_pretrained(build("llama"), tmp_path / folder).eval()
                torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_directions_are_those_of_all_rows():
    """Beside one decomposition of all rows at once, in fp64."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator) * 2.0 ** -torch.arange(12)
    x = torch.randn(600, 12, generator=generator) @ mix + torch.randn(12, generator=generator)
    found = IncrementalDirections(4, 0.99)
    for part in x.split([100, 200, 50, 250]):
        found.add(part)
    centred = x.double() - x.double().mean(0)
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    assert (torch.cosine_similarity(found.directions.double(), v[:4]).abs() > 0.99).all()
    torch.testing.assert_close(found.ratio, s[:4].square() / s.square().sum(), atol=1e-3, rtol=1e-2)
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("quantised", [False, True])
def test_identity_ranks_and_training(quantised):
    """The model answers as before, a layer that gets no rank is bare again, and what is left trains."""
    model, data = _model(quantised=quantised, r=2, eva={"rho": 4.0}), _data()
    plain = build("llama")
    plain = pf.quantize_model(plain) if quantised else plain
    model.train()
    state = pf.get_eva_state_dict(model, data, show_progress_bar=False)
    name = "base_model.model.model.layers.0.self_attn.v_proj"
    pf.initialize_lora_eva_weights(model, eva_state_dict=state | {name: state[name][:0]})
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    layers = _layers(model)
    config = model.peft_config["default"]
    assert len(layers) == 7 and config.target_modules == set(layers)
    assert all(config.rank_for(path) == layer.r["default"] for path, layer in layers.items())
    assert type(model.get_submodule(name)) is (pf.nn.NF4Linear if quantised else torch.nn.Linear)
    with torch.no_grad():
        got, expected = (m.eval()(data[0]["input_ids"]).logits for m in (model, plain))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    model(**data[0]).loss.backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in layers.values())


def test_whitening():
    """Rows over the square root of their singular values, also where several layers share an input."""
    data = _data()
    plain, white = (
        pf.get_eva_state_dict(_model(eva={"whiten": whiten}), data, show_progress_bar=False) for whiten in (False, True)
    )
    names = [f"base_model.model.model.layers.0.self_attn.{part}_proj" for part in "qk"]
    gains = [(white[name] / plain[name]).mean(1) for name in names]
    rank = min(map(len, gains))
    torch.testing.assert_close(gains[0][:rank], gains[1][:rank])
    assert (gains[0].diff() > 0).all()  # smaller singular values, longer rows


def test_state_dict_of_a_plain_model_and_of_one_with_adapters():
    data, model = _data(), _model()
    options = {"show_progress_bar": False}
    state = pf.get_eva_state_dict(model, data, **options)
    plain = pf.get_eva_state_dict(build("llama"), data, model.peft_config["default"], **options)
    assert set(state) == {f"base_model.model.{name}" for name in plain}
    assert all(torch.equal(rows, plain[name.removeprefix("base_model.model.")]) for name, rows in state.items())
    theirs = peft.get_eva_state_dict(_model(peft), data, **options)
    assert {name: len(rows) for name, rows in state.items()} == {name: len(rows) for name, rows in theirs.items()}
    pf.initialize_lora_eva_weights(model, eva_state_dict=theirs)
    again = _model()
    _initialise(pf, again, data)
    assert model.peft_config["default"] == again.peft_config["default"]


def test_without_masks_and_with_functions_of_ones_own():
    data = [batch["input_ids"] for batch in _data(masked=False)]
    model = _model()
    options = {"forward_fn": lambda m, ids: m(ids), "prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    got = pf.get_eva_state_dict(model, data, show_progress_bar=False, **options)
    expected = pf.get_eva_state_dict(model, _data(masked=False), show_progress_bar=False)
    assert all(torch.equal(got[name], rows) for name, rows in expected.items())


def test_dora_and_rows_for_some_layers():
    model = _model(use_dora=True)
    path = "model.layers.0.self_attn.q_proj"
    rows = torch.randn(3, 32)
    with pytest.warns(UserWarning, match="are not in eva_state_dict and keep their random A"):
        pf.initialize_lora_eva_weights(model, eva_state_dict={f"base_model.model.{path}": rows})
    layer = _layers(model)[path]
    assert torch.equal(layer.lora_A["default"].weight, rows) and layer.r["default"] == 3
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, layer.base.get_weight().norm(dim=1))
    assert layer.scaling["default"] == 2 and model.peft_config["default"].alpha_pattern == {path: 6.0}


def test_an_embedding_keeps_its_own(tmp_path):
    model = _model(target_modules=[*TARGETS, "embed_tokens"])
    state, _ = pf.get_eva_state_dict(model, _data(), show_progress_bar=False), model.eval()
    with pytest.warns(UserWarning, match=r"\['model.embed_tokens'\] are not in eva_state_dict"):
        pf.initialize_lora_eva_weights(model, eva_state_dict=state)
    assert "model.embed_tokens" in model.peft_config["default"].target_modules
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": _data()[0]["input_ids"]}
    with torch.no_grad():
        loaded = pf.PeftModel.from_pretrained(build("llama"), tmp_path)
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
        pf.hotswap_adapter(model, tmp_path, "default")
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_bad_input():
    model, data = _model(), _data()
    state = copy.deepcopy(model.state_dict())

    def refused(kind, match, m=None, **options):
        with pytest.raises(kind, match=match):
            pf.initialize_lora_eva_weights(model if m is None else m, show_progress_bar=False, **options)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())

    refused(ValueError, "either a dataloader or an eva_state_dict")
    refused(ValueError, "the dataloader is empty", dataloader=[])
    refused(TypeError, "only once; give a DataLoader", dataloader=iter(data))
    refused(TypeError, "expected a PeftModel", build("llama"), dataloader=data)
    plain = pf.get_peft_model(build("llama"), pf.LoraConfig(target_modules=TARGETS))
    refused(ValueError, "init_lora_weights=True, expected 'eva'", plain, dataloader=data)
    refused(ValueError, "no batch has the 8 tokens", dataloader=_data(rows=1, length=9))
    refused(TypeError, "a batch is a Tensor, expected a dict", dataloader=[data[0]["input_ids"]])
    refused(ValueError, "do not have the batch's positions", dataloader=data,
            prepare_model_inputs_fn=lambda batch, config: torch.tensor([[99, 0]]))  # fmt: skip
    refused(ValueError, "have NaN or infinities", dataloader=data,
            prepare_layer_inputs_fn=lambda x, given, name: x[0].reshape(-1, x[0].shape[-1]) * torch.nan)  # fmt: skip
    refused(ValueError, r"names \['nothing'\], which are no target", dataloader=data,
            prepare_layer_inputs_fn={"nothing": None})  # fmt: skip
    refused(ValueError, "does not reach", dataloader=data, forward_fn=lambda m, batch: None)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    refused(ValueError, "which the adapter does not adapt", eva_state_dict={"x": torch.ones(2, 32)})
    refused(ValueError, r"has shape \(2, 31\), expected finite", eva_state_dict={name: torch.ones(2, 31)})
    refused(ValueError, "every layer has rank 0",
            eva_state_dict={f"base_model.model.{path}": torch.ones(0, layer.in_features) for path, layer in _layers(model).items()})  # fmt: skip
    for error, match, options in (
        (ValueError, "rho is 0.5, expected at least 1", {"rho": 0.5}),
        (ValueError, "tau is 2, expected 0 to 1", {"tau": 2}),
    ):
        with pytest.raises(error, match=match):
            pf.EvaConfig(**options)
    with pytest.raises(ValueError, match="eva_config goes with init_lora_weights='eva'"):
        pf.LoraConfig(eva_config={"rho": 2.0})
    with pytest.raises(TypeError, match="unexpected keyword argument 'roh'"):
        pf.LoraConfig(init_lora_weights="eva", eva_config={"roh": 2.0})
    assert pf.LoraConfig(init_lora_weights="eva").eva_config == pf.EvaConfig()


def test_two_processes_are_given_the_same(tmp_path):
    """What one process finds in the batches of both, put together; an error in one stops the other too."""
    torch.multiprocessing.spawn(eva_process.run, (2, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["failed"] == "RuntimeError: EVA: process 1 failed with ValueError: EVA: the dataloader is empty"
    assert second["failed"] == "ValueError: EVA: the dataloader is empty"
    alone, first, second = second["alone"], first["found"], second["found"]
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    halves = [eva_process.batches(rank, 2) for rank in (0, 1)]
    whole = [
        {key: torch.cat([half[i][key] for half in halves if i < len(half)]) for key in each}
        for i, each in enumerate(halves[0])
    ]
    expected = eva_process.find(whole)
    assert expected.keys() == first.keys()
    for name, a in expected.items():
        assert a.shape == first[name].shape and (torch.cosine_similarity(a, first[name]) > 0.999).all(), name
    assert any(a.shape != first[name].shape or not torch.allclose(a, first[name]) for name, a in alone.items())
