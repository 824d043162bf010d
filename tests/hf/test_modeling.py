"""Exported folders in transformers: logits of the reference, and what users do with models."""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.support.exports import load
from tests.support.trained import reference_of
from tide_mega.hf import memory_tide, modeling_tide
from tide_mega.hf.configuration_tide import TideConfig

pytestmark = pytest.mark.filterwarnings("ignore")
QUANTISED = ("int8", "int4", "nf4", "rank:0.5")


def some_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 600, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.fixture(scope="module")
def model(exported):
    return load(exported("tied"))


@pytest.mark.parametrize("name", ["tied", "untied", "plain"])
def test_logits_are_the_references(name, runs, exported):
    ids = some_ids(3, 29)
    wanted = runs[name].logits(ids)
    assert float(wanted.abs().max()) > 1
    torch.testing.assert_close(logits(load(exported(name)), ids), wanted, atol=1e-5, rtol=0)


def test_the_memory_counts(model, runs):
    ids = some_ids(2, 16)
    wanted = runs["tied"].logits(ids)
    kept = model.model.memory.gains.detach().clone()
    try:
        model.model.memory.gains.data.zero_()
        assert float((logits(model, ids) - wanted).abs().max()) > 0.5
    finally:
        model.model.memory.gains.data.copy_(kept)


def test_a_model_without_memory_is_transformers_own(exported):
    from transformers import AutoModelForCausalLM

    assert type(AutoModelForCausalLM.from_pretrained(exported("plain"))).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("tables", QUANTISED)
@pytest.mark.parametrize("memory", ["inline", "sidecar"])
@torch.no_grad()
def test_logits_of_a_quantised_memory_are_the_references_with_its_rows(tables, memory, runs, exported):
    model = load(exported("tied", tables=tables, memory=memory))
    reference, ids = reference_of(runs["tied"].run), some_ids(2, 20)
    rows_BTKD = model.model.memory(ids, torch.float32)
    plain = reference.memory(ids)
    assert 0 < float((rows_BTKD - plain).abs().mean()) < 1
    reference.memory.forward = lambda tokens: rows_BTKD
    torch.testing.assert_close(logits(model, ids), reference.logits(ids)[0], atol=1e-5, rtol=0)


def test_bf16_is_the_reference_rounded(runs, exported):
    ids, wanted = some_ids(2, 20), runs["tied"].logits(some_ids(2, 20))
    model = load(exported("tied", dtype="bf16"))
    assert model.dtype == torch.bfloat16 and model.model.memory.tables[0].dtype == torch.bfloat16
    error = logits(model, ids).float() - wanted
    assert float(error.pow(2).mean().sqrt()) < 0.02 * float(wanted.pow(2).mean().sqrt())


def test_rows_lie_in_any_part(exported, monkeypatch, tmp_path, runs):
    from tide_mega.export import shards, weights

    monkeypatch.setattr(weights, "SHARD_BYTES", 50_000)
    monkeypatch.setattr(shards.plan_shards, "__defaults__", (50_000,))
    ids = torch.arange(640).view(20, 32)
    wanted = runs["tied"].logits(ids)
    for number, tables in enumerate(("fp32", "int8")):
        cut, whole = (
            runs["tied"].export(tmp_path / str(number), tables=tables),
            exported("tied", tables=tables),
        )
        model = load(cut)
        assert len(model.model.memory.parts) > 1 or tables == "int8"
        assert torch.equal(logits(model, ids), logits(load(whole), ids))
        assert tables != "fp32" or torch.allclose(logits(model, ids), wanted, atol=1e-5, rtol=0)


def test_generation_is_the_references_by_hand(model, runs):
    ids = some_ids(2, 5)
    wanted = ids
    for _ in range(12):
        wanted = torch.cat((wanted, runs["tied"].logits(wanted)[:, -1:].argmax(-1)), 1)
    for words in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        found = generate(model, ids, do_sample=False, **words)
        assert torch.equal(found, wanted), words


def generate(model, ids, new=12, **words):
    mask = words.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **words)


@pytest.mark.parametrize("memory", ["inline", "sidecar"])
def test_sampling_and_beams(exported, memory):
    model = load(exported("tied", tables="int8", memory=memory))
    ids = some_ids(2, 5)
    sampled = []
    for _ in range(2):
        torch.manual_seed(3)
        sampled.append(generate(model, ids, do_sample=True, top_k=20, temperature=0.8))
    assert torch.equal(*sampled) and not torch.equal(sampled[0], generate(model, ids, do_sample=False))
    beams = generate(model, ids, num_beams=4, do_sample=False)
    greedy = generate(model, ids, do_sample=False)
    assert beams.shape == greedy.shape
    assert likelihood(model, beams) >= likelihood(model, greedy) - 1e-4


def likelihood(model, ids):
    nats = logits(model, ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    return float(nats[:, 4:].sum())


@pytest.mark.parametrize("memory", ["inline", "sidecar"])
def test_a_left_padded_batch_is_each_text_alone(exported, memory):
    model = load(exported("tied", tables="nf4", memory=memory))
    texts = [some_ids(1, length, seed=length) for length in (3, 9, 6)]
    width, pad = 9, model.config.pad_token_id
    ids = torch.cat([torch.cat((torch.full((1, width - t.shape[1]), pad), t), 1) for t in texts])
    mask = torch.cat([torch.arange(width)[None] >= width - t.shape[1] for t in texts]).long()
    together = generate(model, ids, attention_mask=mask, do_sample=False)[:, width:]
    for row, text in zip(together, texts, strict=True):
        assert torch.equal(row, generate(model, text, do_sample=False)[0, text.shape[1] :])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tied", {}),
        ("untied", {}),
        ("plain", {}),
        *(("tied", {"tables": tables}) for tables in QUANTISED),
        ("tied", {"tables": "int4", "memory": "sidecar"}),
    ],
)
def test_saved_and_loaded_again_it_is_the_same(name, options, exported, tmp_path):
    model, ids = load(exported(name, **options)), some_ids(2, 16)
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    again = load(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert torch.equal(logits(model, ids), logits(again, ids))
    assert {n: p.dtype for n, p in model.state_dict().items()} == {
        n: p.dtype for n, p in again.state_dict().items()
    }
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)
    if "memory" in options:
        sidecar = "memory.tide"
        assert (tmp_path / "again" / sidecar).read_bytes() == (
            exported(name, **options) / sidecar
        ).read_bytes()


def test_a_sidecar_is_not_left_behind_by_an_upload(exported, tmp_path):
    model = load(exported("tied", tables="int4", memory="sidecar"))
    with pytest.raises(
        ValueError, match=r"push_to_hub would leave memory\.tide out: call model\.push_to_hub"
    ):
        model.save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize("tables", ["fp32", "int8", "rank:0.5"])
def test_the_vocabulary_grows_and_shrinks(exported, tmp_path, tables):
    folder, ids = exported("tied", tables=tables), some_ids(2, 16)
    model = load(folder)
    wanted = logits(model, ids)
    model.resize_token_embeddings(700)
    assert model.model.memory.num_rows == model.config.vocab_size == 700
    assert torch.equal(logits(model, ids)[..., :640], wanted)
    new = logits(model, torch.tensor([[650, 699]]))
    assert new.shape == (1, 2, 700) and bool(new.isfinite().all())
    if tables == "int8":
        assert float(model.model.memory(torch.tensor([[650]]), torch.float32).abs().max()) == 0
    model.save_pretrained(tmp_path / "grown")
    assert torch.equal(logits(load(tmp_path / "grown"), ids), logits(model, ids))
    model.resize_token_embeddings(610)
    assert model.model.memory.num_rows == 610
    assert torch.equal(logits(model, ids), wanted[..., :610])
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.model.memory.num_rows == model.config.vocab_size == 640


def test_a_sidecar_cannot_be_resized(exported):
    model = load(exported("tied", tables="int4", memory="sidecar"))
    model.resize_token_embeddings(640)
    with pytest.raises(
        ValueError, match=r"is a file of 640 rows, one a token, and the vocabulary cannot become 700"
    ):
        model.resize_token_embeddings(700)
    assert model.get_input_embeddings().num_embeddings == 640


def test_embeddings_without_ids_are_refused(model):
    with pytest.raises(ValueError, match=r"TIDE reads its memory by token id: give input_ids; inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 32))


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_are_the_references(exported, runs, checkpointing):
    """Also with activation checkpointing, reentrant or not."""
    model, reference, ids = load(exported("tied")).train(), reference_of(runs["tied"].run), some_ids(2, 16)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), -1)), 1)
    reference(ids, labels).loss.backward()
    model(ids, labels=ids).loss.backward()
    memory = model.model.memory
    torch.testing.assert_close(
        torch.cat([t.grad for t in memory.tables]).transpose(0, 1),
        reference.memory.tables_KVD.grad,
        atol=1e-6,
        rtol=1e-4,
    )
    gains = torch.stack([norm.weight.grad for norm in reference.memory.norms])
    torch.testing.assert_close(memory.gains.grad, gains, atol=1e-6, rtol=1e-4)
    router = reference.layers[0].router.weight.grad
    torch.testing.assert_close(model.model.layers[0].router.weight.grad, router, atol=1e-6, rtol=1e-4)


def test_a_model_made_anew_has_drawn_all_its_weights():
    torch.manual_seed(0)
    config = TideConfig(
        num_memory_blocks=3, memory_format="fp32", vocab_size=50, hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, memory_part_rows=20,
    )  # fmt: skip
    model = modeling_tide.TideForCausalLM(config)
    assert [tuple(table.shape) for table in model.model.memory.tables] == [
        (20, 3, 16),
        (20, 3, 16),
        (10, 3, 16),
    ]
    for table in model.model.memory.tables:
        assert float(table.std()) == pytest.approx(0.02, rel=0.2)
    assert float(model.model.memory.gains.min()) == 1.0
    assert float(model.model.layers[1].router.weight.std()) == pytest.approx(0.02, rel=0.5)


def test_hidden_states_and_the_model_without_output(exported, runs):
    from transformers import AutoModel

    ids = some_ids(1, 8)
    base = AutoModel.from_pretrained(exported("tied"), trust_remote_code=True)
    with torch.no_grad():
        found = base(ids, output_hidden_states=True)
    assert len(found.hidden_states) == 3
    weight = reference_of(runs["tied"].run).embedding.weight
    with torch.no_grad():
        ours = found.last_hidden_state @ weight.T
    torch.testing.assert_close(ours, runs["tied"].logits(ids), atol=1e-5, rtol=0)


def test_a_copy_of_a_model_opens_the_sidecar_itself(exported):
    import copy

    model, ids = load(exported("tied", tables="int4", memory="sidecar")), some_ids(1, 9)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    assert twin.model.memory.store is not model.model.memory.store


@pytest.mark.parametrize("place", memory_tide.PLACES)
def test_a_sidecar_stays_where_the_configuration_says(exported, place):
    folder = exported("tied", tables="int8", memory="sidecar")
    model, ids = load(folder, memory_store=place, memory_cache=0.2), some_ids(2, 16)
    kind = {"device": "TensorStore", "host": "HostStore", "disk": "DiskStore"}[place]
    assert type(model.model.memory.store).__name__ == kind
    assert torch.equal(logits(model, ids), logits(load(exported("tied", tables="int8")), ids))


@pytest.mark.slow
def test_a_compiled_forward_pass_is_the_same(model, exported):
    ids = some_ids(2, 16)
    wanted = logits(model, ids)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, ids), wanted, atol=1e-5, rtol=0)
    beside = load(exported("tied", tables="int8", memory="sidecar"))
    wanted = logits(beside, ids)
    torch.testing.assert_close(logits(torch.compile(beside), ids), wanted, atol=1e-5, rtol=0)


def damaged(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)


def refused(folder: Path, error: str, match: str) -> None:
    with pytest.raises(Exception, match=match) as caught:
        load(folder)
    assert type(caught.value).__name__ == error


def test_a_truncated_sidecar_is_refused(exported, tmp_path):
    folder = damaged(exported("tied", tables="int4", memory="sidecar"), tmp_path / "hf")
    file = folder / "memory.tide"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)
    refused(folder, "SidecarError", r"memory\.tide has [\d,]+ bytes instead of")


def test_a_sidecar_of_another_model_is_refused(exported, tmp_path):
    folder = damaged(exported("tied", tables="int4", memory="sidecar"), tmp_path / "hf")
    shutil.copyfile(
        exported("untied", tables="int4", memory="sidecar") / "memory.tide", folder / "memory.tide"
    )
    refused(folder, "SidecarError", "it is another model's")


def test_a_missing_sidecar_is_named(exported, tmp_path):
    folder = damaged(exported("tied", tables="int4", memory="sidecar"), tmp_path / "hf")
    (folder / "memory.tide").unlink()
    refused(
        folder, "SidecarError", r"has no memory\.tide, the file with this model's memory: copy it there too"
    )


def test_a_damaged_row_gives_no_text(exported, tmp_path):
    folder = damaged(exported("tied", tables="int4", memory="sidecar"), tmp_path / "hf")
    file = folder / "memory.tide"
    content = bytearray(file.read_bytes())
    content[4096 + 5] ^= 1  # of the first record
    file.write_bytes(content)
    model = load(folder)
    with pytest.raises(Exception, match=r"row 0 of .*memory\.tide is damaged"):
        logits(model, torch.tensor([[0]]))


def test_a_missing_shard_is_named(runs, tmp_path, monkeypatch):
    from tide_mega.export import shards, weights

    monkeypatch.setattr(weights, "SHARD_BYTES", 50_000)
    monkeypatch.setattr(shards.plan_shards, "__defaults__", (50_000,))
    folder = runs["tied"].export(tmp_path / "hf")
    lost = sorted(folder.glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(Exception, match=lost.name):
        load(folder)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_another_models_tokenizer_is_refused(exported, tmp_path, name):
    from tide_mega.data.prepare.vocabulary import train_bpe

    folder = damaged(exported(name), tmp_path / "hf")
    (folder / "tokenizer.json").write_text(train_bpe(["some other text altogether"] * 9, 300))
    refused(
        folder,
        "TokenizerError",
        r"tokenizer\.json is not this model's tokenizer: its vocabulary is another one",
    )
