"""One of the processes of test_eva.py; imports what it needs and no more, since it is started anew."""

import torch

import pyfastpeft as pf


def model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Embedding(50, 24), torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8)
    )
    config = pf.LoraConfig(r=4, target_modules=["1", "3"], init_lora_weights="eva", eva_config={"rho": 1.5})
    return pf.get_peft_model(net, config)


def batches(rank, count):
    """This process's share of six batches; the last process has one less."""
    generator = torch.Generator().manual_seed(3)
    found = [{"input": torch.randint(0, 50, (8, 20), generator=generator)} for _ in range(6)]
    mine = [{key: value[rank::count] for key, value in each.items()} for each in found]
    return mine[: 6 - rank]


def find(data, **more):
    return pf.get_eva_state_dict(
        model(), data, forward_fn=lambda net, batch: net(batch["input"]), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False, **more,
    )  # fmt: skip


def run(rank, count, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), count)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        data = batches(rank, count)
        result = {"found": find(data), "alone": find(data, gather_distributed_inputs=False)}
        try:
            find([] if rank == 1 else data)
        except (ValueError, RuntimeError) as error:
            result["failed"] = f"{type(error).__name__}: {error}"
        torch.save(result, folder / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
