"""A job that torchrun started again: its processes meet at a fresh place in torchrun's store."""

import os

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy


def meet_again(trainer: L.Trainer) -> None:
    """Set up the process group of a restarted job; otherwise, or on one process, nothing.

    torchrun's store outlives the processes, and torch 2.14 puts the addresses of each start under
    the same keys: a process that reads before the other has written finds the address of a dead
    one, and the restart fails. Here each restart has keys of its own. Lightning uses a group that
    is there.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True"
    strategy = trainer.strategy
    if count == "0" or not kept or not isinstance(strategy, DDPStrategy) or dist.is_initialized():
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=strategy._timeout)
    if strategy.root_device.type == "cuda":  # not run: there was no GPU
        torch.cuda.set_device(strategy.root_device)
    dist.init_process_group(
        strategy._get_process_group_backend(),
        store=dist.PrefixStore(f"beit/restart-{count}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=strategy._timeout,
    )
