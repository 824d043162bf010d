"""Writes the tokenizer of an exported folder in the form that transformers reads.

It encodes text to the ids that training saw: nothing is added at either end. One difference remains: transformers
encodes the name of a special token within a text as that token, training as plain text.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from tide_mega.data.index import DatasetIndex
from tide_mega.data.tokenizer import BYTE_OF_CHARACTER, Llama3Tokenizer, load_tokenizer
from tide_mega.errors import ConfigError
from tide_mega.hf.tokens_tide import TOKENIZER_FILE

CONFIG_FILE = "tokenizer_config.json"


def write_tokenizer(data: Path, folder: Path, max_length: int) -> int:
    """Write tokenizer.json and tokenizer_config.json of a prepared dataset's tokenizer.

    Args:
        data: the dataset.
        folder: where to write.
        max_length: sequence length of the training.

    Returns:
        The id of the end-of-document token.

    Raises:
        ConfigError: the tokenizer is not the one that made the dataset's tokens.
        OSError: a file cannot be written.
    """
    index = DatasetIndex.load(data)
    source = data / index.tokenizer.file
    tokenizer = load_tokenizer(source, index.options.get("eos_token"))
    if tokenizer.fingerprint != index.tokenizer.fingerprint:
        raise ConfigError(
            f"{source} is not the tokenizer that made the tokens of {data}: put the right one back, or say where "
            "the dataset lies with data=<folder>."
        )
    if isinstance(tokenizer, Llama3Tokenizer):
        text = converted(tokenizer)
    else:
        text = without_additions(source.read_text(encoding="utf-8-sig"))
    (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")
    eos = str(Tokenizer.from_str(text).id_to_token(tokenizer.eos_id))
    config = tokenizer_config(eos, max_length)
    (folder / CONFIG_FILE).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return tokenizer.eos_id


def tokenizer_config(eos: str, max_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json; the end-of-document token is BOS, EOS and padding, as in config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "pad_token": eos,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def without_additions(text: str) -> str:
    """Return a tokenizer.json without what training did not use: tokens at the ends, truncation, padding."""
    description = json.loads(text)
    description |= {"truncation": None, "padding": None, "post_processor": None}
    return json.dumps(description, ensure_ascii=False)


def converted(tokenizer: Llama3Tokenizer) -> str:
    """Return the tokenizer.json that encodes as Llama-3's tokenizer.model does.

    tiktoken merges the neighbours that form the token of the lowest rank. A BPE does the same if its merges are
    all pairs of tokens that form a token, ordered by that token's rank.
    """
    spelling = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
    ranks = tokenizer.ranks
    spelled = {token: "".join(spelling[token[i : i + 1]] for i in range(len(token))) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        found.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in found]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(Llama3Tokenizer.PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    special = sorted(tokenizer.special_ids)
    names = [tokenizer.token_bytes(index).decode() for index in special]
    inner.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    if [inner.token_to_id(name) for name in names] != special:
        raise RuntimeError("the special tokens did not get the ids they have in training")
    return str(inner.to_str())
