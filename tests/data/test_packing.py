import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_mega.data.index import ShardRecord
from tide_mega.data.prepare.worker import SplitWriter, dtype_for
from tide_mega.errors import DataError


def pack(
    folder: Path, documents: list[np.ndarray], vocab_size: int = 1000, **sizes: int
) -> list[ShardRecord]:
    writer = SplitWriter(folder, "train", 3, vocab_size=vocab_size, eos_id=0, **sizes)
    for ids in documents:
        writer.add(ids)
    return writer.close()


def unpack(folder: Path, shards: list[ShardRecord]) -> tuple[list[int], list[int]]:
    """Tokens and document ends, by the byte offsets of the records and by the tar's members alike."""
    tokens: list[int] = []
    ends: list[int] = []
    for shard in shards:
        content = (folder / shard.file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            arrays = [np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar.getmembers()]
        before = len(tokens), len(ends)
        for (offset, n), sample_ends, sample in zip(shard.samples, arrays[::2], arrays[1::2], strict=True):
            assert np.array_equal(np.frombuffer(content, sample.dtype, n, offset), sample)
            assert sample_ends.dtype == np.uint32
            ends += [len(tokens) + int(end) for end in sample_ends]
            tokens += sample.tolist()
        assert (len(tokens) - before[0], len(ends) - before[1]) == (shard.tokens, shard.documents)
    return tokens, ends


@given(
    lengths=st.lists(st.integers(1, 70), max_size=15),
    sample_tokens=st.integers(1, 40),
    samples_per_shard=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_the_stream_is_the_documents_each_with_eos(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    sample_tokens: int,
    samples_per_shard: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, 1000, n) for n in lengths]
    shard_tokens = sample_tokens * samples_per_shard
    shards = pack(folder, documents, sample_tokens=sample_tokens, shard_tokens=shard_tokens)
    tokens, ends = unpack(folder, shards)
    assert tokens == [token for ids in documents for token in [*ids.tolist(), 0]]
    assert ends == np.cumsum([n + 1 for n in lengths]).tolist()
    assert all(shard.tokens == shard_tokens for shard in shards[:-1])
    assert sorted(path.name for path in folder.iterdir()) == [shard.file for shard in shards]


def test_a_document_longer_than_a_shard_goes_on_in_the_next(tmp_path: Path) -> None:
    ids = np.arange(1, 101)
    shards = pack(tmp_path, [ids], sample_tokens=10, shard_tokens=30)
    assert [shard.tokens for shard in shards] == [30, 30, 30, 11]
    assert [shard.documents for shard in shards] == [0, 0, 0, 1]
    assert unpack(tmp_path, shards) == ([*ids.tolist(), 0], [101])


def test_shards_are_webdataset_tars_with_the_same_bytes_every_time(tmp_path: Path) -> None:
    documents = [np.arange(1, 50)] * 3
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = pack(tmp_path / "one", documents, sample_tokens=64, shard_tokens=640)
    assert pack(tmp_path / "two", documents, sample_tokens=64, shard_tokens=640) == first
    samples = list(
        webdataset.WebDataset(
            str(tmp_path / "one" / first[0].file), shardshuffle=False, empty_check=False
        ).decode()
    )
    assert [sample["__key__"] for sample in samples] == [
        "train-000003-000000",
        "train-000003-000001",
        "train-000003-000002",
    ]
    assert np.concatenate([sample["tokens.npy"] for sample in samples]).tolist() == ([*range(1, 50), 0] * 3)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (2**32, "uint32")]
)
def test_the_smallest_type_that_holds_the_vocabulary_is_chosen(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    assert dtype_for(vocab_size).name == dtype
    largest = np.array([vocab_size - 1])
    shards = pack(tmp_path, [largest], vocab_size, sample_tokens=8, shard_tokens=8)
    assert unpack(tmp_path, shards)[0] == [vocab_size - 1, 0]


def test_a_vocabulary_beyond_the_type_never_wraps(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not fit the shards' uint32"):
        dtype_for(2**32 + 1)
    with pytest.raises(DataError, match="70000 does not fit tokens of type uint16"):
        SplitWriter(
            tmp_path,
            "train",
            0,
            vocab_size=70_000,
            eos_id=0,
            sample_tokens=4,
            shard_tokens=4,
            dtype=np.dtype("<u2"),
        )


@pytest.mark.parametrize("token", [1000, 70_000, -1])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, token: int) -> None:
    with pytest.raises(DataError, match=f"gave id {token}, outside its vocabulary of 1000"):
        pack(tmp_path, [np.array([5, token])], sample_tokens=4, shard_tokens=4)


def test_no_document_gives_no_shard(tmp_path: Path) -> None:
    assert pack(tmp_path, [], sample_tokens=4, shard_tokens=4) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lengths", [[], [3], [3, 30]])
def test_an_abandoned_shard_leaves_no_file(tmp_path: Path, lengths: list[int]) -> None:
    writer = SplitWriter(tmp_path, "train", 3, vocab_size=1000, eos_id=0, sample_tokens=4, shard_tokens=400)
    for length in lengths:
        writer.add(np.ones(length, np.int64))
    writer.abandon(RuntimeError("the worker fails"))
    assert list(tmp_path.iterdir()) == []
