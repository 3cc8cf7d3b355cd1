"""State of small tensors lies side by side, and is otherwise what it was."""

import copy
import io

import pytest
import torch
from torch import nn

import pyfastpeft as pf

KINDS = {
    "AdamW": pf.optim.AdamW,
    "AdamW 8-bit": lambda params: pf.optim.AdamW(params, state_bits=8, min_8bit_numel=200),
    "SGD": pf.optim.SGD,
}


def _step(params, optimizer, t):
    generator = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def _params(count=300):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(8, 32), (5,)] * (count // 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_few_pieces_of_memory_and_files_no_larger(kind):
    params = _params()
    optimizer = KINDS[kind](params)
    _step(params, optimizer, 0)

    def shared(optimizer):
        tensors = [t for state in optimizer.state.values() for key, t in state.items() if "map" not in key]
        small = [t for t in tensors if t.numel() in (1, 5, 256)]
        begins = [t.data_ptr() for t in small]
        assert len(set(begins)) == len(begins)
        ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in small)
        assert all(end <= begin for (_, end), (begin, _) in zip(ranges, ranges[1:], strict=False)), "nothing overlaps"
        return len({t.untyped_storage().data_ptr() for t in small}), tensors

    storages, tensors = shared(optimizer)
    alone = sum(t.nbytes for t in tensors)
    assert storages < len(tensors) / 2
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    padding = 64 * len(tensors)  # each begins at a line of its own
    assert len(saved.getvalue()) < 2 * (alone + padding) + 600 * len(params), "little room is handed out in advance"
    saved.seek(0)
    again = _params()
    for p, q in zip(again, params, strict=True):
        p.data.copy_(q)
    loaded = KINDS[kind](again)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    assert shared(loaded)[0] < len(tensors) / 2
    third, copied = copy.deepcopy((params, optimizer))
    for t in range(1, 4):
        for list_, each in ((params, optimizer), (again, loaded), (third, copied)):
            _step(list_, each, t)
    for p, q, r in zip(params, again, third, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


def test_one_small_tensor_is_not_given_a_chunk():
    p = nn.Parameter(torch.randn(4))
    optimizer = pf.optim.AdamW([p])
    _step([p], optimizer, 0)
    assert sum(t.untyped_storage().nbytes() for t in optimizer.state[p].values()) < 1000
