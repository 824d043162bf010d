"""Folders that cannot be used are refused in a sentence, before anything is loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.exported import write_byte_tokenizer, write_folder
from tide_mega.errors import ConfigError, FolderError
from tide_mega.inference.folder import ModelFolder
from tide_mega.inference.model_config import read_config

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(folders, tmp_path):
    """Return a copy of a folder of two shards, to be damaged."""
    shutil.copytree(folders[3, True], tmp_path / "hf")
    return tmp_path / "hf"


def change_config(folder, **keys):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_weights(folder, change):
    weights = load_file(folder / SHARD)
    change(weights)
    save_file(weights, folder / SHARD, metadata={"format": "pt"})


def name_in_shard(folder, part):
    return next(name for name in load_file(folder / SHARD) if part in name)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": ...}, "model_type is ''"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type default alone"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type default alone"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "silu alone"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"num_attention_heads": 5}, "no multiple of num_key_value_heads"),
        ({"head_dim": 15}, "must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"memory_format": "int3"}, "'int3' is unknown"),
        ({"memory_format": "rank"}, "the rank is None"),
        ({"eos_token_id": 270}, "eos_token_id is 270"),
        ({"bos_token_id": "x"}, "bos_token_id is x"),
        ({"num_memory_blocks": -1}, "num_memory_blocks is -1"),
    ],
)
def test_a_configuration_that_is_not_supported(keys, said, folder):
    change_config(folder, **keys)
    with pytest.raises(FolderError, match=f"config.json.*{said}"):
        ModelFolder.open(folder)


@pytest.mark.parametrize(
    ("content", "said"), [("{", "cannot be read"), ("[]", "no JSON object"), ("[" * 99 + "]" * 99, "nested")]
)
def test_a_configuration_that_is_no_json(content, said, folder):
    (folder / "config.json").write_text(content)
    with pytest.raises(FolderError, match=said):
        ModelFolder.open(folder)


def test_what_is_no_exported_folder(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        ModelFolder.open(tmp_path / "none")
    with pytest.raises(FolderError, match=r"has no config\.json"):
        ModelFolder.open(tmp_path)


def test_older_names_of_rope_and_eos_of_the_generation(folder):
    change_config(folder, rope_parameters=..., rope_theta=1234.0, eos_token_id=...)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    config = read_config(folder)
    assert config.shape.rope_theta == 1234.0 and config.eos_ids == (3, 5)


def test_a_missing_shard(folder):
    (folder / SHARD).unlink()
    with pytest.raises(FolderError, match=f"has no {SHARD}"):
        ModelFolder.open(folder)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FolderError, match=r"has neither model\.safetensors nor"):
        ModelFolder.open(folder)


@pytest.mark.parametrize("left", [0, 7, 200, -1])
def test_a_truncated_shard(left, folder):
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:left])
    with pytest.raises(FolderError, match=f"{SHARD} is damaged or cut short"):
        ModelFolder.open(folder)


def test_a_shard_that_is_a_link(folder, tmp_path):
    (folder / SHARD).rename(tmp_path / "elsewhere")
    (folder / SHARD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FolderError, match="is a link"):
        ModelFolder.open(folder)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"a": 3}}, "no weight_map"),
        ({"weight_map": {"a": "../config.json"}}, "not the plain name"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_is_none(index, said, folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FolderError, match=said):
        ModelFolder.open(folder)


def test_a_tensor_of_another_shape(folder):
    name = name_in_shard(folder, "mlp")
    change_weights(folder, lambda weights: weights.update({name: weights[name][:-1].contiguous()}))
    with pytest.raises(FolderError, match=f"{name} in .* should be F32 or BF16 or F16"):
        ModelFolder.open(folder)


def test_a_tensor_of_another_dtype(folder):
    name = name_in_shard(folder, "mlp")
    change_weights(folder, lambda weights: weights.update({name: weights[name].to(torch.int32)}))
    with pytest.raises(FolderError, match=f"{name} in .* is I32"):
        ModelFolder.open(folder)


def test_a_tensor_too_few_and_one_too_many(folder):
    name = name_in_shard(folder, "mlp")
    change_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(FolderError, match=f"lacks {name}"):
        ModelFolder.open(folder)
    change_weights(
        folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(3)})
    )
    with pytest.raises(FolderError, match=r"q_proj\.bias"):
        ModelFolder.open(folder)


def test_an_output_matrix_where_embeddings_are_tied(folders, tmp_path):
    shutil.copytree(folders[3, False], tmp_path / "hf")
    change_config(tmp_path / "hf", tie_word_embeddings=True)
    with pytest.raises(FolderError, match=r"holds lm_head\.weight"):
        ModelFolder.open(tmp_path / "hf")


def test_a_stock_folder_of_one_file_and_an_old_buffer(references, tmp_path):
    folder = write_folder(tmp_path / "hf", references[0, True])
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors")
    opened = ModelFolder.open(folder)
    assert torch.equal(opened.tensor("model.norm.weight"), weights["model.norm.weight"])
    assert opened.open_memory("disk", 0.1, torch.device("cpu")) is None


def test_a_tokenizer_of_another_model(folder):
    write_byte_tokenizer(folder)
    change_config(folder, eos_token_id=5)
    with pytest.raises(FolderError, match="ends texts with id 0, the model with 5"):
        _ = ModelFolder.open(folder).tokenizer
    change_config(folder, eos_token_id=0, vocabulary_fingerprint="0" * 64)
    with pytest.raises(FolderError, match="not this model's tokenizer"):
        _ = ModelFolder.open(folder).tokenizer
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FolderError, match="no tokenizer of this model"):
        _ = ModelFolder.open(folder).tokenizer


def test_a_tokenizer_with_more_ids_than_the_model(references, tmp_path):
    folder = write_folder(tmp_path / "hf", references[0, True])
    description = json.loads((folder / "tokenizer.json").read_text())
    description["model"]["vocab"]["many"] = 270
    (folder / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(FolderError, match="ids up to 270, the model a vocabulary of 270"):
        _ = ModelFolder.open(folder).tokenizer


def test_rows_among_the_weights_cannot_stay_on_disk(folder):
    with pytest.raises(ConfigError, match="export with memory=sidecar"):
        ModelFolder.open(folder).open_memory("disk", 0.05, torch.device("cpu"))


@pytest.mark.parametrize("place", ["device", "host", "disk"])
@pytest.mark.parametrize("damage", ["missing", "short", "foreign", "path"])
def test_a_memory_file_that_cannot_be_used(damage, place, sidecar_folder, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(sidecar_folder, folder)
    file = folder / "memory.tide"
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "foreign":
        change_config(folder, memory_fingerprint="0" * 64)
    else:
        change_config(folder, memory_file="../memory.tide")
    with pytest.raises(FolderError, match=r"memory\.tide|memory of"):
        ModelFolder.open(folder).open_memory(place, 0.05, torch.device("cpu"))
