import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tide_mega.data.index import DatasetIndex
from tide_mega.data.prepare.options import PrepareOptions
from tide_mega.data.prepare.pipeline import prepare
from tide_mega.data.prepare.vocabulary import train_bpe
from tide_mega.data.tokenizer import HFTokenizer

SENTENCE = (
    "the quick brown fox jumps over lazy dogs while seventeen engineers measure token frequency and "
    "memory tables grow; rare words such as ibuprofen, acetaminophen or 1849 appear once."
)


def make_text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(SENTENCE.split(), words)) + "\n"


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    letters = np.array(list("etaoinshrdlu"))
    syllables = ["".join(rng.choice(letters, 4)) for _ in range(300)]
    texts = [make_text(rng, 50) + " ".join(rng.choice(syllables, 50)) for _ in range(40)]
    path.write_text(train_bpe(texts, 512), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> HFTokenizer:
    return HFTokenizer(tokenizer_path)


@pytest.fixture
def options(tmp_path: Path, tokenizer_path: Path) -> PrepareOptions:
    """Small samples and shards, so that a few documents span several; reads tmp_path/in."""
    (tmp_path / "in").mkdir()
    return PrepareOptions(
        inputs=[str(tmp_path / "in")],
        out=str(tmp_path / "out"),
        tokenizer=str(tokenizer_path),
        validation_fraction=0.25,
        sample_tokens=64,
        shard_tokens=192,
        workers=1,
    )


@pytest.fixture
def run() -> Callable[[PrepareOptions], DatasetIndex]:
    return lambda options: prepare(options, log=lambda line: None, progress=False)


@pytest.fixture
def documents(tmp_path: Path, options: PrepareOptions) -> list[str]:
    """40 documents of 5 to 150 words in as many files of tmp_path/in, in the order they are read."""
    rng = np.random.default_rng(1)
    texts = [f"{i} {make_text(rng, int(rng.integers(5, 150)))}" for i in range(40)]
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    return texts


def read_split(folder: Path, split: str) -> tuple[np.ndarray, list[int]]:
    """Tokens and document ends of a split, read with tarfile and np.load alone."""
    tokens: list[np.ndarray] = []
    ends: list[int] = []
    position = 0
    for shard in DatasetIndex.load(folder).splits[split].shards:
        with tarfile.open(folder / shard.file) as tar:
            arrays = {m.name: np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar.getmembers()}
        for key in sorted({name.split(".", 1)[0] for name in arrays}):
            ends += [position + int(end) for end in arrays[f"{key}.ends.npy"]]
            tokens.append(arrays[f"{key}.tokens.npy"])
            position += len(tokens[-1])
    return (np.concatenate(tokens) if tokens else np.empty(0, np.uint16)), ends


@pytest.fixture(name="read_split")
def read_split_fixture() -> Callable[[Path, str], tuple[np.ndarray, list[int]]]:
    return read_split
