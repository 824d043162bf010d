import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from tide_mega.metrics.deciles import DecileLoss

BINS = torch.tensor([0, 3, 9, -1, -2], dtype=torch.int8)


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    deciles = DecileLoss(BINS)
    labels_BT = (
        torch.tensor([[0, 1, 2], [3, 4, -1]]) if rank == 0 else torch.tensor([[0, 0, 2], [-1, -1, -1]])
    )
    deciles.update(labels_BT.float() + rank, labels_BT)
    result = deciles.reduce(dist.all_reduce)
    torch.save((result.loss_by_bin, result.count_by_bin, result.loss), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_sums_of_both(tmp_path: Path) -> None:
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert results[0] == results[1]
    loss_by_bin, count_by_bin, loss = results[0]
    counted = {slot: count for slot, count in count_by_bin.items() if count}
    assert counted == {"0": 3, "3": 1, "9": 2, "dropped": 1, "unseen": 1}
    assert loss_by_bin["0"] == 2 / 3
    assert (loss_by_bin["3"], loss_by_bin["9"], loss_by_bin["1"]) == (1.0, 2.5, None)
    assert loss == (0 + 1 + 2 + 3 + 4 + 1 + 1 + 3) / 8


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
