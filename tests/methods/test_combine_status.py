"""add_weighted_adapter, against its formulas and against PEFT; get_layer_status and get_model_status."""

import dataclasses
import warnings

import pytest
import torch

import pyfastpeft as pf
from tests.methods.contract import scatter
from tests.methods.models import batch, build
from tests.methods.test_targets import assert_unchanged, snapshot

# those without random draws, which the libraries make for the layers in different orders
ALL = ["linear", "cat", "svd", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]


def two(library=pf, second=4, **config):
    """A model with adapters "default" (q, v, rank 4) and "b" (q, down, rank `second`), of random values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 12}
        model = library.get_peft_model(build("llama"), library.LoraConfig(**(first | config))).eval()
        scatter(model)
        other = library.LoraConfig(target_modules=["q_proj", "down_proj"], r=second, lora_alpha=6)
        model.add_adapter("b", other)
        model.set_adapter("b")
        scatter(model, seed=4)
    model.set_adapter("default")
    return model


def delta(model, path, name):
    layer = model.get_base_model().get_submodule(path)
    return layer.get_delta_weight(name)


Q, V, DOWN = (f"model.layers.1.{p}" for p in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))


def test_cat_is_the_sum_and_svd_its_best_approximation():
    model = two(second=2)
    inputs = batch("llama")
    model.add_weighted_adapter(["default", "b"], [0.7, -1.5], "cat", combination_type="cat")
    model.add_weighted_adapter(["default", "b"], [0.7, -1.5], "svd", svd_rank=3)
    for path, terms in ((Q, (0.7, -1.5)), (V, (0.7, None)), (DOWN, (None, -1.5))):
        whole = sum(w * delta(model, path, n) for n, w in zip(("default", "b"), terms, strict=True) if w is not None)
        torch.testing.assert_close(delta(model, path, "cat"), whole, rtol=1e-4, atol=1e-6)
        tail = (torch.linalg.svdvals(whole)[3:] ** 2).sum().sqrt()
        assert (delta(model, path, "svd") - whole).norm().item() == pytest.approx(tail.item(), rel=1e-3, abs=1e-5)
    assert model.peft_config["cat"].r == 6 and model.peft_config["svd"].r == 3
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".cat." in n or ".svd." in n)
    model.set_adapter("cat")
    got = model(**inputs).logits
    reference = two(second=2)
    with torch.no_grad():
        for _, layer in reference.base_model.layers():
            for name, w in (("default", 0.7), ("b", -1.5)):
                if name in layer.lora_B:
                    layer.lora_B[name].weight.mul_(w)
    reference.set_adapter(["default", "b"])
    torch.testing.assert_close(got, reference(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_it_is_saved_and_loaded(tmp_path):
    model = two(modules_to_save=["lm_head"])
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    expected = model(**batch("llama")).logits
    head = model.get_base_model().lm_head.modules_to_save
    assert torch.equal(head["sum"].weight, head["default"].weight)
    assert not torch.equal(head["sum"].weight, build("llama").lm_head.weight)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = pf.PeftModel.from_pretrained(build("llama"), tmp_path / "sum")
    assert torch.equal(loaded(**batch("llama")).logits, expected)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "sum").eval()
    torch.testing.assert_close(theirs(**batch("llama")).logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "sign"),
    [(kind, sign) for kind in ALL for sign in ("total", "frequency") if sign == "total" or "ties" in kind],
)
@pytest.mark.parametrize("weights", [(0.6, 1.3), (0.6, -1.3)], ids=str)
def test_the_same_as_peft(kind, sign, weights):
    peft = pytest.importorskip("peft")
    results = []
    for library in (peft, pf):
        model = two(library)
        model.base_model.add_weighted_adapter(
            ["default", "b"], list(weights), "new", kind, density=0.4, majority_sign_method=sign
        )
        model.set_adapter("new")
        results.append((model(**batch("llama")).logits, {p: delta(model, p, "new") for p in (Q, V, DOWN)}))
    for path, expected in results[0][1].items():
        torch.testing.assert_close(results[1][1][path], expected, rtol=1e-3, atol=1e-5, msg=path)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
@pytest.mark.parametrize("weights", [(0.6, 1.3), (0.6, -1.3)], ids=str)
def test_dropping_at_random_as_peft(kind, weights, monkeypatch):
    """Both libraries drop by torch.bernoulli, in other orders of the layers: here a draw depends on its shape alone."""
    peft = pytest.importorskip("peft")

    def drawn(probabilities):
        generator = torch.Generator().manual_seed(sum(probabilities.shape))
        return (torch.rand(probabilities.shape, generator=generator) < probabilities).to(probabilities.dtype)

    monkeypatch.setattr(torch, "bernoulli", drawn)
    deltas = []
    for library in (peft, pf):
        model = two(library)
        model.base_model.add_weighted_adapter(["default", "b"], list(weights), "new", kind, density=0.6)
        deltas.append({path: delta(model, path, "new") for path in (Q, V, DOWN)})
    for path, expected in deltas[0].items():
        assert expected.norm() > 0
        torch.testing.assert_close(deltas[1][path], expected, rtol=1e-3, atol=1e-5, msg=path)


class Tables(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.plane = torch.nn.Embedding(11, 8), torch.nn.Conv2d(1, 4, 3, padding=1)
        self.attn, self.line = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.nn.Linear(8, 8)

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.plane(x[:, None]).mean(1)
        return self.line(x + self.attn(x, x, x)[0])


TABLES = ["table", "plane", "line", "attn"]


def fill(model, seed):
    """Random values, the same in both libraries, which have other names for the attention's output."""
    generator = torch.Generator().manual_seed(seed)
    trained = {
        n.replace("out_lora", "base_layer.out_proj.lora"): p for n, p in model.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        for _, parameter in sorted(trained.items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def tables(library, names=TABLES):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 2, "target_modules": names}
        model = library.get_peft_model(Tables().eval(), library.LoraConfig(lora_alpha=3, **options))
        fill(model, 2)
        model.add_adapter("b", library.LoraConfig(lora_alpha=5, **options))
        model.set_adapter("b")
        fill(model, 4)
        model.set_adapter("default")
    return model


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "magnitude_prune"])
def test_other_layers_combined(kind):
    """cat and svd by their definition; of PEFT's kinds, those that it has for such layers give the same."""
    peft, results = pytest.importorskip("peft"), []
    for library in (pf, peft):
        model = tables(library)
        how = {"combination_type": kind, "density": 0.5, "svd_rank": 4}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.base_model.add_weighted_adapter(["default", "b"], [0.7, -1.2], "new", **how)
        except (NotImplementedError, ValueError, RuntimeError, IndexError):  # PEFT has no svd of an embedding
            assert library is peft and kind == "svd"
            return
        results.append(deltas_of(model, "new"))
        if library is pf and kind in ("cat", "svd"):  # four ranks hold the sum
            parts = deltas_of(model, "default"), deltas_of(model, "b")
            for name, got in results[0].items():
                torch.testing.assert_close(got, 0.7 * parts[0][name] - 1.2 * parts[1][name], rtol=1e-3, atol=1e-4)
    for name, theirs in results[1].items():
        torch.testing.assert_close(results[0][name], theirs, rtol=1e-3, atol=1e-4, msg=name)


def deltas_of(model, adapter):
    """s B A of every product, by the names that either library has."""
    found = {}
    for name in TABLES:
        layer = model.get_base_model().get_submodule(name)
        scaling = layer.scaling[adapter]
        if name == "table":
            found[name] = scaling * layer.lora_embedding_B[adapter] @ layer.lora_embedding_A[adapter]
            continue
        pairs = {name: (layer.lora_A, layer.lora_B)}
        if name == "attn":
            inner = layer.base_layer.out_proj
            ours = hasattr(layer, "out_lora_A")
            pairs["out"] = (layer.out_lora_A, layer.out_lora_B) if ours else (inner.lora_A, inner.lora_B)
            if not ours:
                assert inner.scaling[adapter] == scaling
        for key, (a, b) in pairs.items():
            found[key] = scaling * b[adapter].weight.flatten(1) @ a[adapter].weight.flatten(1)
    return found


def test_status_as_peft():
    peft, pairs = pytest.importorskip("peft"), []
    for library in (pf, peft):
        model = tables(library)
        pairs.append([])
        for step in ("get_model_status", "merge_adapter", "unmerge_adapter", "set_adapter"):
            getattr(model, step)(*(["b"] if step == "set_adapter" else []))
            # theirs have the path in their own LoraModel
            layers = {s.name.removeprefix("model."): dataclasses.asdict(s) for s in model.get_layer_status()}
            whole = dataclasses.asdict(model.get_model_status())
            whole["devices"] = {name: sorted(set(kinds)) for name, kinds in whole["devices"].items()}
            pairs[-1].append((layers, whole))
    for mine, theirs in zip(*pairs, strict=True):
        # theirs lists the attention's inner projection as a layer of its own
        inner = [name for name in theirs[0] if name.startswith("attn.")]
        assert [name for name in theirs[0] if name not in inner] == list(mine[0])
        for name, status in mine[0].items():
            fields = set(status) & set(theirs[0][name]) - {"module_type", "name"}
            assert {"enabled", "active_adapters", "merged_adapters", "requires_grad", "available_adapters"} <= fields
            assert {f: status[f] for f in fields} == {f: theirs[0][name][f] for f in fields}, name
        fields = set(mine[1]) & set(theirs[1]) - {"num_adapter_layers", "adapter_model_type"}
        if mine[1]["merged_adapters"]:
            fields -= {"trainable_params"}  # theirs makes the attention's own weights trainable by merging
        assert {f: mine[1][f] for f in fields} == {f: theirs[1][f] for f in fields}
        assert theirs[1]["num_adapter_layers"] == mine[1]["num_adapter_layers"] + len(inner)


def test_dropping_at_random_keeps_the_mean():
    from pyfastpeft.methods.lora.combine import combine_factors

    torch.manual_seed(0)
    factors = [(torch.ones(40, 50), torch.ones(60, 40), 1.0)] * 2
    a, b = combine_factors(factors, [1.0, 1.0], "dare_linear", 40, density=0.25)
    for tensor in (a, b):
        assert set(tensor.unique().tolist()) <= {0.0, 4.0, 8.0} and abs(tensor.mean().item() - 2.0) < 0.15
    a, _ = combine_factors(factors, [1.0, 1.0], "dare_ties", 40, density=0.25)
    assert set(a.unique().tolist()) <= {0.0, 4.0} and abs((a > 0).float().mean().item() - (1 - 0.75**2)) < 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["default", "x"], [1, 1], "n"), "there is no adapter 'x'"),
        ((["default", "b"], [1], "n"), "2 adapters and 1 weights"),
        ((["default", "b"], [1, float("nan")], "n"), "expected finite numbers"),
        ((["default", "b"], [1, 1], "b"), "there is an adapter 'b' already"),
        ((["default", "b"], [1, 1], "n", "sum"), "combination_type is 'sum'"),
        ((["default", "b"], [1, 1], "n", "linear"), "linear needs adapters of equal ranks"),
        ((["default", "b"], [1, 1], "n", "ties_svd"), "density is None"),
        (([], [], "n"), "expected one method"),
    ],
)
def test_what_does_not_go_together_is_named(arguments, words):
    model = two(second=2).train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        model.add_weighted_adapter(*arguments)
    assert_unchanged(model, before)


def test_other_methods_and_dora():
    model = two()
    model.add_adapter("ia3", pf.IA3Config(target_modules=["up_proj"]))
    model.add_adapter("ada", pf.AdaLoraConfig(target_modules=["k_proj"], total_step=3))
    model.add_adapter("dora", pf.LoraConfig(target_modules=["q_proj"], r=4, use_dora=True))
    for names, words in ((["default", "ia3"], "expected one method"), (["ada"], "of ADALORA cannot be combined"),
                         (["default", "dora"], "DoRA adapters have no sum")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model.add_weighted_adapter(names, [1.0] * len(names), "new")


def test_ia3_vectors_are_summed_as_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    results = []
    for library in (peft, pf):
        model = library.get_peft_model(build("llama"), library.IA3Config(task_type="CAUSAL_LM")).eval()
        scatter(model)
        model.add_adapter("b", library.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]))
        model.set_adapter("b")
        scatter(model, seed=4)
        model.base_model.add_weighted_adapter(["default", "b"], [0.7, -0.4], "new")
        model.set_adapter("new")
        results.append(model(**batch("llama")).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=2e-5)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "new").eval()
    torch.testing.assert_close(theirs(**batch("llama")).logits, results[1], rtol=1e-4, atol=2e-5)
    model.add_adapter("c", pf.IA3Config(target_modules=["q_proj"], feedforward_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj is a feed-forward layer in one adapter and not in another"):
        model.add_weighted_adapter(["b", "c"], [1, 1], "mixed")


def test_status():
    model = two()
    layers = pf.get_layer_status(model)
    assert [s.name for s in layers] == [path for path, _ in model.base_model.layers()]
    q = next(s for s in layers if s.name == Q)
    assert q == model.get_layer_status()[layers.index(q)]
    assert (q.module_type, q.enabled, q.active_adapters, q.merged_adapters) == ("LoraLinear", True, ["default"], [])
    assert q.requires_grad == {"default": True, "b": False} and q.available_adapters == ["b", "default"]
    assert q.devices == {"default": ["cpu"], "b": ["cpu"]} and q.quantization_backend is None
    status = pf.get_model_status(model)
    assert status == model.get_model_status() and status.adapter_model_type == "PeftModel"
    assert (status.base_model_type, status.peft_types) == ("LlamaForCausalLM", {"default": "LORA", "b": "LORA"})
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.num_adapter_layers == 6 and status.enabled is True
    assert status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.requires_grad == {"default": True, "b": False} and status.available_adapters == ["b", "default"]
    model.merge_adapter()
    assert pf.get_model_status(model).merged_adapters == ["default"]
    model.unmerge_adapter()
    layer = model.get_base_model().get_submodule(Q)
    layer.enabled = False
    layer.lora_A["default"].weight.requires_grad_(False)
    layer.active = ("b",)
    status = pf.get_model_status(model)
    assert status.enabled == status.active_adapters == status.requires_grad["default"] == "irregular"
    assert next(s for s in pf.get_layer_status(model) if s.name == Q).requires_grad["default"] == "irregular"
    with pytest.raises(ValueError, match="has no adapted layers"):
        pf.get_layer_status(build("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        four = pf.get_peft_model(pf.quantize_model(build("llama")), pf.IA3Config())
    assert pf.get_model_status(four).quantization_backend == "nf4"
    assert {s.module_type for s in pf.get_layer_status(four)} == {"IA3Linear"}
