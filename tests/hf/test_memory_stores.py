"""Stores against the rows themselves, and a cache on disk against a list that forgets the id used longest ago."""

import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tide_mega.hf.memory_tide import (
    DiskStore,
    MemoryStore,
    RowFormat,
    SidecarError,
    SidecarFile,
    TableStore,
    TensorStore,
    finished,
    open_store,
    rows_of_parts,
    verify_sidecar,
    write_sidecar,
)

K, D, V = 2, 40, 60
PLACES = ["device", "host", "disk"]
FORMAT = RowFormat("int8", K, D)


def some_rows() -> Tensor:
    return torch.randn(V, K, D, generator=torch.Generator().manual_seed(0))


EXPECTED_VKD = FORMAT.decode(FORMAT.encode(some_rows()), torch.float32)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a file that no test changes, and its fingerprint."""
    path = tmp_path_factory.mktemp("rows") / "memory.tide"
    return path, write_sidecar(path, FORMAT, V, [some_rows()])


Opening = Callable[..., MemoryStore]


@pytest.fixture
def opened(written: tuple[Path, str]) -> Iterator[Opening]:
    """Return what opens the file, or another, as a store that is closed at the end."""
    stores: list[MemoryStore] = []

    def open_it(place: str = "disk", path: Path = written[0], **options: object) -> MemoryStore:
        fields = {"rows": V, "fingerprint": written[1], "place": place, **options}
        stores.append(open_store(path, FORMAT, **fields))
        return stores[-1]

    yield open_it
    for store in stores:
        store.close()


@pytest.fixture
def own(written: tuple[Path, str], tmp_path: Path) -> Path:
    """Return a copy of the file that may be changed."""
    (tmp_path / "memory.tide").write_bytes(written[0].read_bytes())
    return tmp_path / "memory.tide"


def check(store: MemoryStore, ids: list[int]) -> None:
    """Compare a store's rows with the expected ones."""
    ids_N = torch.tensor(ids, dtype=torch.int64)
    assert torch.equal(store.rows(ids_N, torch.float32), EXPECTED_VKD[ids_N])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ids", [[], [0], [59], [5, 3, 5, 59, 0, 3, 5], list(range(V))])
def test_rows_of_ids(opened: Opening, place: str, ids: list[int]) -> None:
    store = opened(place)
    check(store, ids)
    check(store, ids[::-1])
    store.prefetch(torch.tensor(ids, dtype=torch.int64))
    check(store, ids)
    ids_N = torch.tensor(ids, dtype=torch.int32)
    assert torch.equal(store.rows(ids_N, torch.bfloat16), EXPECTED_VKD[ids_N.long()].bfloat16())


@pytest.mark.parametrize("place", PLACES)
def test_rows_of_a_low_rank(place: str, tmp_path: Path) -> None:
    format = RowFormat("rank", K, D, 30)
    basis = torch.linalg.qr(torch.randn(K * D, 30))[0].T
    write_sidecar(tmp_path / "a", format, V, some_rows().split(7), basis)
    basis = basis.bfloat16()
    records_VR = format.encode(some_rows(), basis)
    store = open_store(tmp_path / "a", format, rows=V, fingerprint=None, place=place)
    ids_N = torch.tensor([4, 4, 59])
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        found_NKD = store.rows(ids_N, dtype)
        assert torch.equal(found_NKD, format.decode(records_VR[ids_N], dtype, basis.to(dtype)))
    store.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("row", [-1, V, 2**40])
def test_an_id_without_a_row(opened: Opening, place: str, row: int) -> None:
    store = opened(place)
    message = (
        "index out of range" if place == "device" else f"token id {row} has no row in .*: its rows are 0..59"
    )
    with pytest.raises(IndexError, match=message):
        store.rows(torch.tensor([3, row]), torch.float32)
    check(store, [3])


@pytest.mark.parametrize("parts", [1, 7, 30, 60, 100])
def test_parts_are_one_table(parts: int) -> None:
    store = TensorStore(FORMAT.encode(some_rows()).split(parts), FORMAT)
    check(store, [0, 59, 30, 29, 29, 6, 7])
    torch.compiler.reset()
    traced = torch.compile(store.rows, backend="aot_eager", fullgraph=True)
    ids_N = torch.tensor([59, 0, 31])
    assert torch.equal(traced(ids_N, torch.float32), EXPECTED_VKD[ids_N])


def test_trained_tables() -> None:
    gains_KD = torch.rand(K, D)
    store = TableStore(some_rows().split(25), gains_KD, 1e-6)
    ids_N = torch.tensor([0, 59, 25, 24, 24])
    expected = finished(some_rows()[ids_N], gains_KD, 1e-6, torch.bfloat16)
    assert torch.equal(store.rows(ids_N, torch.bfloat16), expected)
    with pytest.raises(SidecarError, match="was not opened from a file"):
        store.copy_file(Path("anywhere"))
    store.close()


def test_gradients_reach_parts() -> None:
    parts = [part.clone().requires_grad_() for part in some_rows().split(25)]
    rows_of_parts(parts, torch.tensor([3, 30, 30])).sum().backward()
    grads = [part.grad for part in parts]
    assert [0.0 if grad is None else float(grad.sum()) for grad in grads] == [K * D, 2 * K * D, 0]


class TestOpening:
    """Another model's file is refused, whatever the place."""

    @pytest.mark.parametrize("place", PLACES)
    def test_another_models(self, opened: Opening, place: str) -> None:
        with pytest.raises(SidecarError, match=r"fingerprint .* the model needs 0000.*another model's"):
            opened(place, fingerprint="0" * 64)
        with pytest.raises(SidecarError, match=r"holds 60 rows of .* the model needs 61 rows"):
            opened(place, rows=61)
        with pytest.raises(SidecarError, match="another model's"):
            open_store(opened().file.path, RowFormat("int4", K, D), rows=V, fingerprint=None, place=place)
        opened(place, fingerprint=None)

    @pytest.mark.parametrize("place", PLACES)
    def test_no_file(self, opened: Opening, place: str, tmp_path: Path) -> None:
        with pytest.raises(SidecarError, match="cannot be opened: No such file"):
            opened(place, tmp_path / "none")

    @pytest.mark.parametrize("place", ["device", "host"])
    def test_damaged_rows_are_noticed_when_all_are_read(self, opened: Opening, place: str, own: Path) -> None:
        damage(own, 44)
        with pytest.raises(SidecarError, match=r"row 44 of .* is damaged"):
            opened(place, own)

    def test_options_out_of_range(self, opened: Opening) -> None:
        with pytest.raises(ValueError, match="memory_store is 'tape'; it is one of device, host, disk"):
            opened("tape")
        with pytest.raises(ValueError, match=r"cache is a part of its rows, 0 to 1, not 1\.5"):
            opened(cache=1.5)
        with pytest.raises(ValueError, match="1 thread or more, not 0"):
            opened(threads=0)


def damage(path: Path, row: int) -> None:
    """Change one bit of a row's record."""
    with SidecarFile(path).path.open("r+b") as file:
        file.seek(SidecarFile(path).header.layout.offset(row) + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("place", PLACES)
def test_copies_what_was_opened(opened: Opening, place: str, own: Path, tmp_path: Path) -> None:
    """Even if another file has its name by now; and onto itself it does nothing."""
    store = opened(place, own)
    before = own.read_bytes()
    store.copy_file(own)
    assert own.read_bytes() == before
    write_sidecar(own, FORMAT, V, [some_rows() * 2])
    check(store, [0, 59])
    store.copy_file(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == before
    verify_sidecar(tmp_path / "copy")


class TestDisk:
    """Reads, the cache and threads."""

    @pytest.mark.parametrize("capacity", [1, 2, 7, 60])
    def test_cache_forgets_the_id_used_longest_ago(self, opened: Opening, capacity: int) -> None:
        store = opened(cache=capacity / V)
        assert isinstance(store, DiskStore)
        assert store.capacity == capacity
        kept: list[int] = []
        read = asked = 0
        draw = random.Random(capacity)
        for _ in range(300):
            ids = [min(int(draw.expovariate(0.1)), V - 1) for _ in range(draw.choice([1, 1, 1, 3, 12]))]
            check(store, ids)
            different = list(dict.fromkeys(ids))
            read += len(set(different) - set(kept))
            asked += len(ids)
            kept = ([row for row in kept if row not in different] + different)[-capacity:]
            assert list(store._slots) == kept
        assert store.stats.misses == read
        assert store.stats.hits == asked - read
        assert store.stats.bytes_read == read * FORMAT.record_bytes

    def test_rows_read_in_advance_are_not_read_again(self, opened: Opening) -> None:
        store = opened(cache=1.0)
        ids_N = torch.tensor([7, 8, 9, 8])
        store.prefetch(ids_N)
        store.prefetch(ids_N)
        check(store, [7, 8, 9, 8])
        assert (store.stats.misses, store.stats.hits) == (3, 1)
        check(store, [7, 8])
        assert (store.stats.misses, store.stats.hits) == (3, 3)

    def test_no_more_is_read_in_advance_than_is_kept(self, opened: Opening) -> None:
        store = opened(cache=5 / V)
        store.prefetch(torch.arange(20))
        check(store, list(range(5)))
        assert store.stats.misses == 5

    def test_a_row_is_read_once_however_many_wait(
        self, opened: Opening, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = opened(cache=1.0)
        reading, go_on = threading.Event(), threading.Event()
        read_row = SidecarFile.read_row

        def slow(file: SidecarFile, row: int, into: memoryview) -> None:
            reading.set()
            assert go_on.wait(60)
            read_row(file, row, into)

        monkeypatch.setattr(SidecarFile, "read_row", slow)
        store.prefetch(torch.tensor([7]))
        assert reading.wait(60)
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(check, store, [7]) for _ in range(3)]
            go_on.set()
            for done in waiting:
                done.result(60)
        assert store.stats.misses == 1

    def test_many_threads(self, opened: Opening) -> None:
        """Each gets its own rows while all of them push each other's out."""
        store = opened(cache=4 / V, threads=3)

        def serve(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(150):
                ids = [draw.randrange(V) for _ in range(draw.choice([1, 2, 9]))]
                if draw.random() < 0.3:
                    store.prefetch(torch.tensor(ids))
                check(store, ids)

        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(serve, seed) for seed in range(6)]:
                done.result(60)
        assert not store._reads
        assert len(store._slots) == 4

    def test_short_reads_are_continued(self, opened: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
        store = opened()
        preadv = os.preadv

        def short(descriptor: int, buffers: list, offset: int) -> int:
            return preadv(descriptor, [buffers[0][:5]], offset)

        monkeypatch.setattr(os, "preadv", short)
        check(store, [3, 59])

    @pytest.mark.parametrize("ids", [[44], [1, 44, 2, 3]])
    @pytest.mark.parametrize("ahead", [False, True])
    def test_a_damaged_row_is_never_handed_out(
        self, opened: Opening, own: Path, ids: list[int], ahead: bool
    ) -> None:
        store = opened(path=own)
        damage(own, 44)
        for _ in range(2):
            if ahead:
                store.prefetch(torch.tensor(ids))
            with pytest.raises(SidecarError, match=r"row 44 of .* is damaged: copy it again"):
                store.rows(torch.tensor(ids), torch.float32)
        check(store, [1, 2, 3])

    def test_a_file_cut_off_while_serving(self, opened: Opening, own: Path) -> None:
        store = opened(path=own, cache=1.0)
        check(store, [3])
        own.open("r+b").truncate(5000)
        with pytest.raises(SidecarError, match=r"ends before byte [0-9,]+, which is needed"):
            store.rows(torch.arange(V), torch.float32)
        check(store, [3])

    def test_a_file_deleted_while_serving(self, opened: Opening, own: Path) -> None:
        store = opened(path=own)
        own.unlink()
        check(store, list(range(V)))

    def test_a_disk_that_fails(self, opened: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
        store = opened()

        def failing(*_: object) -> int:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", failing)
            with pytest.raises(SidecarError, match="cannot be read: Input/output error"):
                store.rows(torch.arange(20), torch.float32)
        check(store, list(range(20)))

    def test_interrupted_reads_can_be_asked_for_again(
        self, opened: Opening, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = opened()

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(SidecarFile, "read_row", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.rows(torch.tensor([8]), torch.float32)
        check(store, [8])

    def test_closed(self, opened: Opening) -> None:
        store = opened()
        store.prefetch(torch.arange(30))
        store.close()
        for use in (
            lambda: store.prefetch(torch.tensor([1])),
            lambda: store.rows(torch.tensor([1]), torch.float32),
        ):
            with pytest.raises(SidecarError, match="is closed: open the model again"):
                use()
