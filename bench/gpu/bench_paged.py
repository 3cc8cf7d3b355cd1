"""A step of PagedAdamW whose state is four times its budget on the GPU: pages copied by streams beside the kernels', and
pages that the kernels reach over the link in place; what both should come to is counted in csrc/paged_memory/README.md.
The floor is the link alone, moving the same bytes in both directions at once. And: a state that fits, plain and in unified
memory. `transfer="auto"` follows the first table: where "in_place" wins on a machine, pass it.
"""

import warnings

import torch
from _gpu import GpuBench

import pyfastpeft as pf

VALUES = 1 << 28  # fp32 state: 2 GiB
TENSORS = 16


def parameters():
    params = [torch.nn.Parameter(torch.randn(VALUES // TENSORS, device="cuda")) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def link_seconds(nbytes: int) -> float:
    """To move `nbytes` from pinned memory to the GPU and as many back, by two streams at once."""
    host = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    here = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    taken = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for stream, (target, source) in zip(streams, ((here[0], host[0]), (host[1], here[1])), strict=True):
            stream.wait_event(begin)
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            torch.cuda.current_stream().wait_stream(stream)
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return min(taken)


def check(bits: int) -> None:
    """Each way ends in AdamW's bits."""
    generator = torch.Generator("cuda").manual_seed(0)
    start = torch.randn(3_000_000, device="cuda", generator=generator)
    grads = [torch.randn(start.shape, device="cuda", generator=generator) for _ in range(3)]
    ends = []
    for options in (None, {"transfer": "copied"}, {"transfer": "in_place"}, {"unified_memory": True}):
        p = torch.nn.Parameter(start.clone())
        optimizer = (
            pf.optim.AdamW([p], state_bits=bits)
            if options is None
            else pf.optim.PagedAdamW([p], state_bits=bits, resident_bytes="4MiB", host_bytes="1GiB", **options)
        )
        for grad in grads:
            p.grad = grad
            optimizer.step()
        ends.append(p.detach())
    assert all(torch.equal(ends[0], end) for end in ends[1:]), f"{bits}-bit paged state ends in other bits than unpaged"


def main() -> None:
    bench = GpuBench("paged", __doc__)
    params = parameters()
    for bits, state in ((32, 8 * VALUES), (8, 2 * VALUES + VALUES // 32)):
        budget, every = state // 4, {}
        for name in ("copied", "in_place"):
            optimizer = every[name] = pf.optim.PagedAdamW(
                params, state_bits=bits, resident_bytes=budget, host_bytes="6GiB", transfer=name
            )
            optimizer.step()
        every["AdamW resident"] = pf.optim.AdamW(params, state_bits=bits)
        on_host = max(every[name].memory_report()["host_bytes"] for name in ("copied", "in_place"))
        bench.compare(
            f"{bits}-bit state of {state / 2**30:.2f} GiB, a quarter on the GPU",
            {name: [optimizer.step] for name, optimizer in every.items()},
            floor_seconds=link_seconds(on_host),
            check=lambda bits=bits: check(bits),
            eager=True,
        )
        every.clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fits = {
                "plain": pf.optim.PagedAdamW(params, state_bits=bits, resident_bytes=state * 5 // 4),
                "unified": pf.optim.PagedAdamW(
                    params, state_bits=bits, resident_bytes=state * 5 // 4, unified_memory=True
                ),
            }
            for optimizer in fits.values():
                optimizer.step()
        for warning in said:
            print(f"  {warning.message}")
        bench.compare(
            f"{bits}-bit state of {state / 2**30:.2f} GiB, all on the GPU",
            {name: [optimizer.step] for name, optimizer in fits.items()},
            moved_bytes=12 * VALUES + 2 * state,
            eager=True,
        )
        fits.clear()
    bench.finish()


if __name__ == "__main__":
    main()
