"""The decode path against the reference: prompts, steps, ragged batches, formats and places of the memory."""

import pytest
import torch

from tests.support.exported import finished_rows, write_folder
from tide_mega.errors import GenerationError
from tide_mega.inference import decoder as decoder_module
from tide_mega.inference.decoder import Decoder

CASES = [(0, True), (3, True), (3, False)]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def ids_of(B, T):
    return torch.randint(0, 270, (B, T), generator=torch.Generator().manual_seed(1))


def steps_against(decoder, ids_BT, lengths, wanted_BTV, count):
    """Feed what follows each prompt, token by token, and compare all logits."""
    found_BV = decoder.prefill(ids_BT, lengths)
    for t in range(count):
        for b, length in enumerate(lengths):
            torch.testing.assert_close(found_BV[b], wanted_BTV[b, length + t - 1], **TOLERANCE)
        found_BV = decoder.step(torch.stack([ids_BT[b, length + t] for b, length in enumerate(lengths)]))


@pytest.mark.parametrize("case", CASES)
def test_every_position_of_a_prompt_in_one_go(case, references, folders):
    ids_1T = ids_of(1, 20)
    found_TV = Decoder.open(folders[case], batch=20).prefill(ids_1T.expand(20, -1), range(1, 21))
    torch.testing.assert_close(found_TV, references[case].logits(ids_1T)[0][0], **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_token_by_token(case, references, folders):
    ids_BT = ids_of(1, 24)
    steps_against(Decoder.open(folders[case]), ids_BT, [1], references[case].logits(ids_BT)[0], 23)


@pytest.mark.parametrize("case", CASES)
def test_prompts_of_several_lengths_grow_side_by_side(case, references, folders):
    ids_BT = ids_of(3, 24)
    wanted_BTV = references[case].logits(ids_BT)[0]
    steps_against(Decoder.open(folders[case], batch=3), ids_BT, [3, 9, 4], wanted_BTV, 14)


def test_a_prompt_in_several_passes(references, folders, monkeypatch):
    monkeypatch.setattr(decoder_module, "_PASS_TOKENS", 5)
    ids_BT = ids_of(3, 24)
    decoder = Decoder.open(folders[3, True], batch=3)
    steps_against(decoder, ids_BT, [5, 17, 11], references[3, True].logits(ids_BT)[0], 6)


def test_a_decoder_forgets_the_prompts_before(references, folders):
    ids_BT = ids_of(2, 20)
    decoder = Decoder.open(folders[3, True], batch=2)
    decoder.prefill(ids_of(2, 30))
    decoder.finish(0)
    steps_against(decoder, ids_BT[:1], [2], references[3, True].logits(ids_BT)[0], 10)


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_that_of_computing_everything_anew(case, references, folders):
    prompts = [[5], [7, 99, 3, 12], [200, 201]]
    decoder = Decoder.open(folders[case], batch=3)
    logits_BV = decoder.prefill(prompts)
    texts = [list(prompt) for prompt in prompts]
    for _ in range(20):
        ids_B = logits_BV.argmax(-1)
        for text, i in zip(texts, ids_B.tolist(), strict=True):
            text.append(i)
        logits_BV = decoder.step(ids_B)
    for prompt, text in zip(prompts, texts, strict=True):
        anew = list(prompt)
        for _ in range(20):
            anew.append(int(references[case].logits(torch.tensor([anew]))[0][0, -1].argmax()))
        assert text == anew


def test_one_that_has_finished_leaves_the_others_alone(references, folders):
    ids_BT = ids_of(2, 64)
    decoder = Decoder.open(folders[3, True], batch=2)
    wanted_BTV = references[3, True].logits(ids_BT)[0]
    decoder.prefill(ids_BT, [64, 50])
    decoder.finish(0)
    for t in range(50, 64):
        found_BV = decoder.step(ids_BT[:, t])
        torch.testing.assert_close(found_BV[1], wanted_BTV[1, t], **TOLERANCE)
    assert decoder.lengths == [64, 64] and decoder.stats.tokens == 14


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_rows_from_every_place(place, references, sidecar_folder):
    ids_BT = ids_of(2, 24)
    decoder = Decoder.open(sidecar_folder, batch=2, memory=place, cache=0.2)
    steps_against(decoder, ids_BT, [4, 9], references[3, True].logits(ids_BT)[0], 14)
    store = decoder.weights.memory
    assert (store.stats.bytes_read > 0) is (place == "disk")
    decoder.close()


FORMATS = [("int8", None), ("int4", None), ("nf4", None), ("rank", 96)]


@pytest.mark.parametrize(
    ("kind", "rank", "sidecar"),
    [("bf16", None, True), *((*kind, s) for kind in FORMATS for s in (False, True))],
)
def test_rows_of_every_format_reach_the_layers_as_they_are_decoded(kind, rank, sidecar, references, tmp_path):
    model = references[3, True]
    folder = write_folder(tmp_path / "hf", model, kind=kind, rank=rank, sidecar=sidecar)
    decoder = Decoder.open(folder)
    store = decoder.weights.memory
    rows_VKD = store.rows(torch.arange(270), torch.float32)
    assert 0 < (rows_VKD - finished_rows(model)).abs().max() < 6
    ids_BT = ids_of(1, 12)

    class Decoded(torch.nn.Module):
        def forward(self, tokens_BT):
            return rows_VKD[tokens_BT]

    trained, model.memory = model.memory, Decoded()
    try:
        wanted_BTV = model.logits(ids_BT)[0]
    finally:
        model.memory = trained
    steps_against(decoder, ids_BT, [3], wanted_BTV, 8)


def test_weights_in_16_bits_run_in_either_precision(references, folders, tmp_path):
    folder = write_folder(tmp_path / "hf", references[3, True], dtype="bf16")
    ids_BT = ids_of(2, 16)
    wanted_BV = references[3, True].logits(ids_BT)[0][:, -1]
    for dtype in ("fp32", "bf16"):
        found_BV = Decoder.open(folder, batch=2, dtype=dtype).prefill(ids_BT)
        assert found_BV.dtype == decoder_module.DTYPES[dtype]
        assert (found_BV.float() - wanted_BV).abs().max() < 0.3
    found_BV = Decoder.open(folders[3, True], batch=2, dtype="bf16").prefill(ids_BT)
    assert (found_BV.float() - wanted_BV).abs().max() < 0.3


def test_weights_in_8_bits_come_near(references, folders):
    ids_BT = ids_of(2, 16)
    wanted_BV = references[3, True].logits(ids_BT)[0][:, -1]
    decoder = Decoder.open(folders[3, True], batch=2, weights="int8")
    found_BV = decoder.prefill(ids_BT)
    assert 0 < (found_BV - wanted_BV).abs().max() < 0.1 * wanted_BV.abs().max()
    # Whatever else is in the batch, to the rounding of what is not a matrix product.
    torch.testing.assert_close(decoder.prefill(ids_BT[1:])[0], found_BV[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("ids", "lengths", "said"),
    [
        ([[1], [2], [3]], None, "3 prompts"),
        ([[1], []], None, "0 to 1"),
        ([[1] * 65], None, "1 to 64"),
        ([[270]], None, "0..269"),
        ([[-1]], None, "0..269"),
        ([[1, 2]], [3], "3 to 3"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(ids, lengths, said, folders):
    decoder = Decoder.open(folders[0, True], batch=2)
    given = ids if lengths is None else torch.tensor(ids)
    with pytest.raises(ValueError, match=said):
        decoder.prefill(given, lengths)


def test_a_full_sequence_is_refused(folders):
    decoder = Decoder.open(folders[0, True], max_length=8)
    decoder.prefill([list(range(8))])
    with pytest.raises(ValueError, match="8 tokens, all that there is room for"):
        decoder.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="ids of shape"):
        decoder.step(torch.tensor([1, 2]))


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"max_length": 65}, {"weights": "int3"}])
def test_arguments_that_are_none_are_refused(wrong, folders):
    with pytest.raises(ValueError, match=r"batch|weights"):
        Decoder.open(folders[0, True], **wrong)


def test_a_memory_file_that_loses_rows_ends_in_a_sentence(references, tmp_path):
    folder = write_folder(tmp_path / "hf", references[3, True], sidecar=True)
    decoder = Decoder.open(folder, memory="disk", cache=0.01)
    logits_BV = decoder.prefill([[1, 2, 3]])
    with (folder / "memory.tide").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(GenerationError, match=r"memory\.tide"):
        for _ in range(20):
            logits_BV = decoder.step(logits_BV.argmax(-1) + 100)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step(case, references, folders, monkeypatch):
    monkeypatch.setattr(decoder_module, "_SMALLEST_EXTENT", 16)
    ids_BT = ids_of(2, 40)
    decoder = Decoder.open(folders[case], batch=2, compile=True)
    steps_against(decoder, ids_BT, [3, 9], references[case].logits(ids_BT)[0], 20)
