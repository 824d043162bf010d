import pytest
import torch

from tide_mega.hf.memory_tide import open_store
from tide_mega.hf.rows_tide import RowFormat
from tide_mega.hf.sidecar_tide import write_sidecar


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_a_store_opened_in_inference_mode_serves_threads_and_callers_outside_of_it(tmp_path, place) -> None:
    rows_VKD = torch.randn(12, 2, 8)
    row_format = RowFormat("fp32", 2, 8)
    path = tmp_path / "memory.tide"
    fingerprint = write_sidecar(path, row_format, 12, [rows_VKD])
    with torch.inference_mode():
        store = open_store(path, row_format, rows=12, fingerprint=fingerprint, place=place, cache=0.5)
        ids_N = torch.tensor([3, 11, 3, 0])
        store.prefetch(ids_N)
        assert torch.equal(store.rows(ids_N, torch.float32), rows_VKD[ids_N])
    for ids_N in (torch.tensor([5, 4, 3]), torch.arange(12)):
        assert torch.equal(store.rows(ids_N, torch.float32), rows_VKD[ids_N])
    store.close()
