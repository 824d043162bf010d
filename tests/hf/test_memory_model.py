"""A model whose memory is a file, by transformers: the same logits wherever the rows stay, and after any copy."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.exported import random_reference, write_folder
from tide_mega.hf.memory_tide import SidecarError, TensorStore, verify_sidecar
from tide_mega.model.reference import ReferenceShape, ReferenceTide

pytest.importorskip("transformers", reason="the model's code is for transformers")

V = 97
IDS = torch.tensor([[3, 96, 0, 3, 40, 39, 41]])


@pytest.fixture(scope="module")
def reference() -> ReferenceTide:
    return random_reference(ReferenceShape(2, 32, 48, 4, 2, V, 3, tie_embeddings=True))


@pytest.fixture(scope="module", params=["int8", "bf16"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(reference: ReferenceTide, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the memory in a file."""
    return write_folder(tmp_path_factory.mktemp("model") / kind, reference, kind=kind, sidecar=True)


def load(folder: Path, **config: object) -> torch.nn.Module:
    from tide_mega.hf.modeling_tide import TideForCausalLM

    return TideForCausalLM.from_pretrained(folder, **config)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def expected(reference: ReferenceTide, kind: str, folder: Path) -> Iterator[Tensor]:
    """Return the logits of the model on disk, which are near the reference's."""
    found = logits(load(folder, memory_store="disk", memory_cache=0.02))
    torch.testing.assert_close(found, reference.logits(IDS)[0], rtol=0, atol=0.05)
    return found


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_the_same_wherever_rows_stay(folder: Path, expected: Tensor, place: str) -> None:
    model = load(folder, memory_store=place)
    assert torch.equal(logits(model), expected)
    assert not any("memory" in name for name in model.state_dict())


def test_copies_open_the_file_themselves(folder: Path, expected: Tensor) -> None:
    model = load(folder)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), expected)
    assert again.tide_memory.store is not model.tide_memory.store


def test_saved_with_its_file(folder: Path, expected: Tensor, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path)
    verify_sidecar(tmp_path / "memory.tide")
    assert torch.equal(logits(load(tmp_path)), expected)


def test_rows_on_the_device_move_with_the_model(folder: Path) -> None:
    model = load(folder, memory_store="device")
    store = model.tide_memory.store
    assert isinstance(store, TensorStore)
    model.to("meta")
    assert store.parts[0].device.type == "meta"


def test_refused_before_the_first_token(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    memory = tmp_path / "memory.tide"
    memory.write_bytes(memory.read_bytes()[:-1])
    with pytest.raises(SidecarError, match="bytes instead of"):
        load(tmp_path)
    memory.unlink()
    with pytest.raises(SidecarError, match=r"has no memory\.tide"):
        load(tmp_path)


def test_an_id_beyond_the_rows(folder: Path) -> None:
    with pytest.raises(IndexError, match="token id 97 has no row"):
        load(folder)(torch.tensor([[V]]))
