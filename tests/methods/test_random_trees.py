"""Any tree of modules with any targets: adapters go in, train, merge, and come out without a trace."""

import copy
import re
import tempfile
import warnings

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn

import pyfastpeft as pf
from pyfastpeft.methods.base import AdapterHolder
from tests.methods.contract import scatter

WIDTH, WORDS = 4, 5
KINDS = ("linear", "embedding", "conv1d", "conv2d", "transposed", "attention", "norm")


def leaf(kind, bias):
    if kind == "linear":
        return nn.Linear(WIDTH, WIDTH, bias=bias)
    if kind == "embedding":
        return nn.Embedding(WORDS, WIDTH)
    if kind == "conv1d":
        return nn.Conv1d(WIDTH, WIDTH, 3, padding=1, bias=bias)
    if kind == "conv2d":
        return nn.Conv2d(1, 1, 3, padding=1, bias=bias)
    if kind == "transposed":
        return nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1, groups=2, bias=bias)
    return nn.MultiheadAttention(WIDTH, 2, bias=bias, batch_first=True) if kind == "attention" else nn.LayerNorm(WIDTH)


def run(kind, module, x):
    """x [B, T, WIDTH] through a leaf."""
    if kind == "embedding":
        return module(torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % WORDS)
    if kind in ("conv1d", "transposed"):
        return module(x.mT).mT
    if kind == "conv2d":
        return module(x[:, None])[:, 0]
    return module(x, x, x)[0] if kind == "attention" else module(x)


class Branch(nn.Module):
    """Leaves and branches one after the other, in a ModuleList, a ModuleDict, or as attributes."""

    def __init__(self, form, children):
        super().__init__()
        self.form, self.kinds = form, [kind for kind, _ in children]
        modules = [module for _, module in children]
        if form == "list":
            self.layers = nn.ModuleList(modules)
        elif form == "dict":
            self.parts = nn.ModuleDict({f"{kind}_{i}": module for i, (kind, module) in enumerate(children)})
        else:
            for i, (kind, module) in enumerate(children):
                setattr(self, f"{kind}{i}", module)

    def forward(self, x):
        for i, kind in enumerate(self.kinds):
            if self.form == "list":
                module = self.layers[i]
            else:
                module = self.parts[f"{kind}_{i}"] if self.form == "dict" else getattr(self, f"{kind}{i}")
            x = x + torch.tanh(module(x) if kind == "branch" else run(kind, module, x))
        return x


leaves = st.tuples(st.sampled_from(KINDS), st.booleans())
shapes = st.recursive(
    leaves,
    lambda inner: st.tuples(st.sampled_from(["list", "dict", "plain"]), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=7,
)


@st.composite
def trees(draw):
    """A tree; some of its leaves are one module in two places, or share their weight."""
    made = []

    def build(shape):
        kind, what = shape
        if kind in ("list", "dict", "plain"):
            return "branch", Branch(kind, [build(child) for child in what])
        same = [module for other, module in made if other == kind]
        how = draw(st.sampled_from(["new", "new", "new", "same", "tied"])) if same else "new"
        module = draw(st.sampled_from(same)) if how == "same" else leaf(kind, what)
        if how == "tied" and kind in ("linear", "embedding", "conv1d"):
            module.weight = draw(st.sampled_from(same)).weight
        made.append((kind, module))
        return kind, module

    torch.manual_seed(draw(st.integers(0, 99)))
    kind, root = build(("plain", [draw(shapes), draw(leaves)]))
    return root.eval().double()


@st.composite
def configs(draw, model):
    """Options of a LoraConfig whose patterns come from the tree's own paths."""
    skipped = (Branch, nn.ModuleList, nn.ModuleDict) + ((nn.LayerNorm,) if draw(st.integers(0, 9)) else ())
    paths = [path for path, module in model.named_modules() if path and not isinstance(module, skipped)]
    paths = [path for path in paths if not path.endswith("out_proj")] or ["nothing"]
    ends = sorted({path.rpartition(".")[2] for path in paths})
    names = draw(st.lists(st.sampled_from(sorted({*paths, *ends})), min_size=1, max_size=4, unique=True))
    pattern = "|".join(rf"(.*\.)?{re.escape(name)}" for name in names)
    options = {
        "target_modules": draw(st.sampled_from([names, names, pattern, "all-linear"])),
        "r": draw(st.sampled_from([2, 4])),
        "use_dora": draw(st.booleans()),
        "use_rslora": draw(st.booleans()),
        "ensure_weight_tying": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["exclude_modules"] = [draw(st.sampled_from(paths))]
    if draw(st.booleans()):
        options["rank_pattern"] = {draw(st.sampled_from(ends)): 6}
    if draw(st.integers(0, 3)) == 0:
        options["modules_to_save"] = [draw(st.sampled_from(paths))]
    return options


def structure(model):
    """Paths, classes, and which Parameter stands where."""
    modules = [(path, type(module)) for path, module in model.named_modules(remove_duplicate=False)]
    parameters = [(path, id(p)) for path, p in model.named_parameters(remove_duplicate=False)]
    first = {}
    return modules, [(path, first.setdefault(key, path)) for path, key in parameters]


def values(model):
    return {path: p.detach().clone() for path, p in model.named_parameters()}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_adapters_leave_no_trace(data):
    model = data.draw(trees())
    options = data.draw(configs(model))
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    shape, weights = structure(model), values(model)
    with torch.no_grad():
        plain = model(x)
    flags = [p.requires_grad for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = pf.get_peft_model(model, pf.LoraConfig(**options))
        except ValueError as error:
            event(f"refused: {str(error).split(':')[0][:40]}")
            assert structure(model) == shape and [p.requires_grad for p in model.parameters()] == flags
            assert not any(isinstance(module, AdapterHolder) for module in model.modules())
            assert all(torch.equal(p, weights[path]) for path, p in model.named_parameters())
            return
        event("adapted")
        torch.testing.assert_close(adapted(x), plain, rtol=1e-9, atol=1e-9)  # DoRA's rows are multiplied by 1 + ε
        frozen = {path: p.detach().clone() for path, p in adapted.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
        scatter(adapted, scale=0.1)
        adapted(x).square().mean().backward()
        optimizer.step()
        assert all(torch.equal(p, frozen[path]) for path, p in adapted.named_parameters() if path in frozen)

        adapted.eval()
        with torch.no_grad():
            trained = adapted(x)
            with tempfile.TemporaryDirectory() as folder:
                adapted.save_pretrained(folder)
                again = pf.PeftModel.from_pretrained(copy.deepcopy(adapted).unload(), folder)
                torch.testing.assert_close(again(x), trained, rtol=1e-9, atol=1e-9)
                tensors = adapted.base_model.tensors("default")
                assert all(torch.equal(tensors[k], t) for k, t in again.base_model.tensors("default").items())
            merged = copy.deepcopy(adapted).merge_and_unload(safe_merge=True)
            adapted.merge_adapter()
            torch.testing.assert_close(adapted(x), trained, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(merged(x), adapted(x), rtol=1e-9, atol=1e-9)
            adapted.unmerge_adapter()
            assert torch.equal(adapted(x), trained)
        assert structure(merged)[0] == shape[0]
        left = adapted.unload()
        assert left is model and structure(left) == shape
        assert all(torch.equal(p, weights[path]) for path, p in left.named_parameters())
        # torch folds batches where weights need gradients, which they do not any more
        torch.testing.assert_close(left(x), plain, rtol=1e-9, atol=1e-9)
