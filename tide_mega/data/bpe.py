"""Training a byte-level BPE on the input."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tide_mega.data.tokenizer import EOS_NAMES, Llama3Tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Trains a byte-level BPE and returns its tokenizer.json.

    Words are split as Llama 3 does. <|endoftext|> (id 0) is its EOS, ids 1 to 256 are the bytes. The same
    texts give the same file. A text too small for `vocab_size` tokens gives fewer.

    Args:
        texts: the documents to train on.
        vocab_size: tokens wanted, the EOS included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(Llama3Tokenizer.PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())
