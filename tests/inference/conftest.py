"""Models and folders shared by the tests of inference."""

import pytest
import torch

from tests.support.exported import random_reference, write_folder
from tide_mega.model.reference import ReferenceShape

VOCABULARY = 270


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def references():
    """Return models by (K, tied): grouped queries, two layers."""
    return {
        (K, tied): random_reference(ReferenceShape(2, 64, 96, 4, 2, VOCABULARY, K, tie_embeddings=tied))
        for K, tied in ((0, True), (3, True), (3, False))
    }


@pytest.fixture(scope="session")
def folders(references, tmp_path_factory):
    """Return a folder of each of `references`, of two shards and with the rows among the weights."""
    root = tmp_path_factory.mktemp("exported")
    return {
        key: write_folder(root / f"k{key[0]}-{key[1]}", model, shards=2) for key, model in references.items()
    }


@pytest.fixture(scope="session")
def sidecar_folder(references, tmp_path_factory):
    """Return a folder of K = 3 with the rows in a file of their own, in fp32."""
    return write_folder(tmp_path_factory.mktemp("sidecar") / "hf", references[3, True], sidecar=True)
