"""Messages between ranks during the check, over rank 0's key-value store, which works where collectives fail."""

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class StoreRendezvous:
    """All ranks that have connected to rank 0's store.

    `other_store` is a second connection to it for another thread, since a waiting thread blocks its connection.
    """

    def __init__(self, address: str, port: int, rank: int, size: int, patience: float) -> None:
        """Open (rank 0) or join the store.

        Args:
            address: of rank 0.
            port: of the store.
            rank: of this process.
            size: number of processes.
            patience: seconds that rank 0 waits for the others in each round.

        Raises:
            ConnectionError: rank 0 could not be reached.
        """
        self.rank, self.size, self._patience = rank, size, patience
        try:
            self.store = _connect(address, port, size, patience, is_master=rank == 0)
            self.other_store = _connect(address, self.store.port, size, patience, is_master=False)
        except RuntimeError as error:  # torch's network errors derive from it
            raise ConnectionError(f"rank 0 at {address}:{port} was not reached: {error}") from error

    def has(self, key: str) -> bool:
        """Return whether some rank has set a key of the store."""
        return bool(self.store.check([key]))

    def collect(self, round_name: str, value: Any, expected: set[int]) -> dict[int, Any]:
        """Send `value` to rank 0, which gets those of expected ranks that arrive in time; others get nothing."""
        self.store.set(f"{round_name}/{self.rank}", json.dumps(value))
        if self.rank != 0:
            return {}
        deadline = time.monotonic() + self._patience
        missing = set(expected)
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not self.store.check([f"{round_name}/{rank}"])}
            if missing:
                time.sleep(0.05)
        present = sorted(expected - missing)
        return {rank: json.loads(self.store.get(f"{round_name}/{rank}")) for rank in present}

    def announce(self, name: str, value: Any = None) -> Any:
        """Broadcast rank 0's value; the others wait for it."""
        if self.rank == 0:
            self.store.set(name, json.dumps(value))
            return value
        return json.loads(self.store.get(name))


def _connect(address: str, port: int, size: int, patience: float, *, is_master: bool) -> dist.TCPStore:
    timeout = timedelta(seconds=3 * patience)
    return dist.TCPStore(address, port, size, is_master=is_master, wait_for_workers=False, timeout=timeout)
