from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tide_mega.data.frequency import UNSEEN
from tide_mega.lab.figures import neighbours as cosine_search
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.neighbours import (
    NOBODY,
    chance,
    choose_words,
    draw_overlaps,
    jaccard,
    nearest,
    readable,
    run,
    sample,
    search,
)
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.parallel.device import choose_device
from tide_mega.trained.run import TrainedRun


def tables(rows_VAD: Tensor, size: int) -> Callable[[], Iterator[tuple[int, Tensor]]]:
    def start() -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(rows_VAD), size):
            yield first, rows_VAD[first : first + size].clone()

    return start


def everyone(V: int) -> np.ndarray:
    return np.ones(V, bool)


def brute_force(
    rows_VAD: Tensor, queries: np.ndarray, candidates_V: np.ndarray, neighbours: int
) -> np.ndarray:
    unit = torch.nn.functional.normalize(rows_VAD.double(), dim=-1)
    cosine_QAV = torch.einsum("qad,vad->qav", unit[torch.from_numpy(queries)], unit)
    cosine_QAV[:, :, torch.from_numpy(~candidates_V)] = -torch.inf
    for q, v in enumerate(queries):
        cosine_QAV[q, :, v] = -torch.inf
    return cosine_QAV.argsort(dim=-1, descending=True, stable=True)[..., :neighbours].numpy()


@pytest.mark.parametrize("size", [1, 37, 500, 1000])
@pytest.mark.parametrize("piece", [50, 8192])
def test_streaming_equals_brute_force(size: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosine_search, "PIECE", piece)
    rows_VAD = torch.randn(500, 3, 16, generator=torch.Generator().manual_seed(1))
    random = np.random.default_rng(2)
    queries, candidates_V = random.choice(500, 23, replace=False), random.uniform(size=500) < 0.7
    found = nearest(tables(rows_VAD, size), queries, candidates_V, 10)
    np.testing.assert_array_equal(found, brute_force(rows_VAD, queries, candidates_V, 10))


def test_planted_neighbours_are_found_in_the_order_of_their_angles() -> None:
    rows_VAD = torch.randn(300, 2, 64, generator=torch.Generator().manual_seed(3))
    query, near = 150, [299, 3, 77, 151]
    for a in range(2):
        for i, v in enumerate(near[:: 1 - 2 * a]):  # the other way round in the second table
            noise = torch.nn.functional.normalize(torch.randn(64), dim=0) * rows_VAD[query, a].norm()
            rows_VAD[v, a] = (rows_VAD[query, a] + 0.1 * (i + 1) * noise) * 5.0**i
    found = nearest(tables(rows_VAD, 64), np.array([query]), everyone(300), 4)
    assert found[0].tolist() == [near, near[::-1]]


@pytest.mark.parametrize("size", [1, 8, 40])
def test_equally_near_ones_come_by_id(size: int) -> None:
    rows_VAD = torch.randn(40, 1, 24, generator=torch.Generator().manual_seed(4))
    same = [38, 30, 21, 20, 9, 2]
    rows_VAD[same] = rows_VAD[5].clone()
    found = nearest(tables(rows_VAD, size), np.array([5, 21]), everyone(40), 5)
    assert found[:, 0].tolist() == [[2, 9, 20, 21, 30], [2, 5, 9, 20, 30]]


@pytest.mark.parametrize("size", [1, 7, 64, 130, 400])
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("piece", [33, 8192])
def test_near_ties_are_in_the_exact_order(
    size: int, spread: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds lie as near as fp32 can tell, or nearly."""
    monkeypatch.setattr(cosine_search, "PIECE", piece)
    generator = torch.Generator().manual_seed(7)
    rows_VAD = torch.randn(1, 2, 48, generator=generator).repeat(400, 1, 1)
    rows_VAD += spread * torch.randn(400, 2, 48, generator=generator)
    rows_VAD[::5] = torch.randn(80, 2, 48, generator=generator)
    rows_VAD[300:, 1] = rows_VAD[:100, 1]
    queries = np.array([3, 5, 120, 303, 399])
    unit_VAD = cosine_search.to_unit(rows_VAD.clone(), range(400))
    expected = exact_order(unit_VAD, queries, everyone(400), 10)
    np.testing.assert_array_equal(nearest(tables(rows_VAD, size), queries, everyone(400), 10), expected)


def exact_order(
    unit_VAD: Tensor, queries: np.ndarray, candidates_V: np.ndarray, neighbours: int
) -> np.ndarray:
    """By the cosines of directions rounded to fp32, as they are searched."""
    found = []
    for v in queries.tolist():
        cosine_VA = (unit_VAD.double() * unit_VAD[v].double()).sum(-1)
        cosine_VA[v] = cosine_VA[torch.from_numpy(~candidates_V)] = -torch.inf
        found.append(cosine_VA.argsort(dim=0, descending=True, stable=True)[:neighbours].T.numpy())
    return np.stack(found)


def test_only_rows_that_can_be_nearer_are_looked_at_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    exact = cosine_search._exact

    def counted(query_OD: Tensor, unit_ND: Tensor, is_near_ON: Tensor) -> object:
        looked_at.append(int(is_near_ON.sum()))
        return exact(query_OD, unit_ND, is_near_ON)

    monkeypatch.setattr(cosine_search, "_exact", counted)
    rows_VAD = torch.randn(2_000, 1, 32, generator=torch.Generator().manual_seed(8))
    queries = np.arange(20)
    found = nearest(tables(rows_VAD, 100), queries, everyone(2_000), 10)
    np.testing.assert_array_equal(found, brute_force(rows_VAD, queries, everyone(2_000), 10))
    assert looked_at[0] == 20 * 10
    assert sum(looked_at[1:]) < 20 * 10 * np.log(20) * 1.3  # of the n-th hundred, one in n of the nearest


def test_neither_the_query_nor_what_is_no_candidate_is_a_neighbour() -> None:
    rows_VAD = torch.ones(30, 2, 4)
    candidates_V = np.arange(30) % 3 == 0
    found = nearest(tables(rows_VAD, 11), np.array([0, 1, 9]), candidates_V, 9)
    assert found[0, 0].tolist() == [3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert found[1, 1].tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert found[2, 1].tolist() == [0, 3, 6, 12, 15, 18, 21, 24, 27]


def test_rows_of_zeros_neither_have_nor_are_neighbours() -> None:
    rows_VAD = torch.randn(6, 2, 4)
    rows_VAD[[1, 2], 0] = 0
    found = nearest(tables(rows_VAD, 4), np.array([0, 1]), everyone(6), 5)
    assert sorted(found[0, 0].tolist()) == [NOBODY, NOBODY, 3, 4, 5]
    assert found[1, 0].tolist() == [NOBODY] * 5
    assert sorted(found[0, 1].tolist()) == [1, 2, 3, 4, 5]


def test_a_query_beyond_the_tables_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no rows \[30\]"):
        nearest(tables(torch.ones(30, 1, 4), 7), np.array([3, 30]), everyone(30))


def test_a_damaged_query_is_named_by_its_id() -> None:
    rows_VAD = torch.ones(30, 2, 4)
    rows_VAD[17, 1, 0] = torch.nan
    with pytest.raises(SkippedError, match="row 17 of E_1"):
        nearest(tables(rows_VAD, 7), np.array([3, 17]), everyone(30))


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ([1, 2, 3, 4], [4, 3, 2, 1], 1.0),
        ([1, 2, 3, 4], [3, 4, 5, 6], 2 / 6),
        ([1, 2], [3, 4], 0.0),
        ([1, 2, NOBODY, NOBODY], [2, 3, 4, NOBODY], 1 / 4),
        ([1, 2], [NOBODY, NOBODY], None),
    ],
)
def test_jaccard_by_hand(one: list[int], other: list[int], overlap: float | None) -> None:
    assert jaccard(np.array(one), np.array(other)) == overlap


def test_random_lists_overlap_by_chance() -> None:
    random = np.random.default_rng(5)
    drawn = [
        jaccard(random.choice(200, 10, replace=False), random.choice(200, 10, replace=False))
        for _ in range(4000)
    ]
    assert np.mean([overlap or 0.0 for overlap in drawn]) == pytest.approx(chance(200), rel=0.1)


def test_samples_are_drawn_once_and_again_the_same() -> None:
    ids = np.arange(1000, 2000)
    drawn = sample(ids, 200, 7)
    assert len(set(drawn.tolist())) == 200 and np.array_equal(drawn, sample(ids, 200, 7))
    assert not np.array_equal(drawn, sample(ids, 200, 8))
    assert sample(ids, 5000, 7).tolist() == ids.tolist()


class Words:
    """A tokenizer of given pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def token_text(self, token_id: int) -> str:
        return self.pieces[token_id].decode("utf-8", errors="replace")


def test_tokens_are_written_so_that_they_can_be_told_apart() -> None:
    words = Words(b" fred", b"fred", b"a\n\t", b"\xe3\x81", "für".encode(), b"")
    written = [readable(words, v) for v in range(6)]  # type: ignore[arg-type]
    assert written == ["␣fred", "fred", r"a\n\t", "<e3><81>", "für", "<id 5>"]


def test_whole_lower_case_words_are_chosen_first() -> None:
    words = Words(b" seldom", b"seldom", b" Seldom", b" a", b" x_long", b" hardly", b" na\xc3\xafvely")
    ids = np.arange(len(words.pieces))
    assert choose_words(words, ids, 2, 0).tolist() == [0, 5]  # type: ignore[arg-type]
    assert choose_words(words, ids, 9, 0).tolist() == [0, 2, 5]  # type: ignore[arg-type]
    assert choose_words(words, ids[1:2], 9, 0).tolist() == [1]  # type: ignore[arg-type]
    assert choose_words(words, ids[:0], 9, 0).tolist() == []  # type: ignore[arg-type]


def test_boxes_of_rare_and_common_stand_beside_each_other() -> None:
    overlaps = {"rare": [[0.1, 0.2, 0.3]] * 3, "common": [[0.5, 0.6, 0.7]] * 3}
    axis = draw_overlaps("tide", 10, overlaps).axes[0]
    legend = axis.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == [
        "rare types",
        "common types",
    ]
    assert len(axis.patches) == 6
    assert axis.get_ylim()[1] > 0.7
    assert draw_overlaps("tide", 10, {"rare": [[0.0] * 3], "common": [[]]}).axes[0].get_ylim()[1] > 0


def test_section_lists_neighbours_that_occur_in_training(tiny_runs: dict[int, Path]) -> None:
    trained = TrainedRun.open(tiny_runs[2])
    found = search(trained, seed=0)
    rows_VAD = torch.cat(
        (trained.weights.tensor("embedding.weight")[:, None], trained.weights.tensor("memory.tables")), dim=1
    )
    queries = np.array(sorted(found.neighbours))
    unit_VAD = cosine_search.to_unit(
        rows_VAD, range(len(rows_VAD))
    )  # near ties depend on the text: this package's
    expected = exact_order(unit_VAD, queries, trained.bins != UNSEEN, 10)
    np.testing.assert_array_equal(np.stack([found.neighbours[int(v)] for v in queries]), expected)

    options = AnalyzeOptions(run=[f"base={tiny_runs[0]}", f"tide={tiny_runs[2]}"])
    section = run(Analysis.open(options, choose_device("cpu", 0)))
    overlap = section.tables["overlap"].rows
    assert [row[1:3] for row in overlap] == [(1, "rare"), (2, "rare"), (1, "common"), (2, "common")]
    assert all(isinstance(row[4], float) and 0 <= row[4] <= 1 for row in overlap)
    listed = section.tables["neighbours"].rows
    assert [row[4] for row in listed[:3]] == ["E", "E_1", "E_2"]
    assert all(len(str(row[5]).split("  ")) == 10 for row in listed)
    assert listed[0][6] is None and isinstance(listed[1][6], float)
    assert (
        section.tables["neighbours"]
        == run(Analysis.open(options, choose_device("cpu", 0))).tables["neighbours"]
    )
