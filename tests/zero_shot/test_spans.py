"""Texts to spans, against the harness's own functions if it is installed."""

import random
import string

import pytest

from tide_mega.data.tokenizer import load_tokenizer
from tide_mega.lab.zero_shot.scorer import Span, encode_pair, windows


@pytest.fixture(scope="module")
def tokenizer(tiny_data):
    return load_tokenizer(tiny_data)


def random_text(rng, most=40):
    alphabet = string.ascii_letters + "    \n.,?éß"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, most)))


def test_pairs_are_cut_as_the_harness_cuts_them(tokenizer):
    model = pytest.importorskip("lm_eval.api.model")

    class Theirs(model.TemplateLM):
        eot_token_id = tokenizer.eos_id

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode_batch([string])[0].tolist()

        def _loglikelihood_tokens(self, requests, **kwargs):
            return [(context, continuation) for _, context, continuation in requests]

        def loglikelihood_rolling(self, requests, disable_tqdm=False): ...

        def generate_until(self, requests, disable_tqdm=False): ...

    rng, theirs, compared = random.Random(0), Theirs(), 0
    for _ in range(300):
        context = random_text(rng) + rng.choice(["", "", " ", "   "])
        continuation = rng.choice(["", " "]) + random_text(rng, 12)
        if not context.strip():
            continue
        head, tail, apart = encode_pair(tokenizer, context, continuation)
        if not apart:
            compared += 1
            assert (head, tail) == theirs._encode_pair(context, continuation)
    assert compared > 250


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(tokenizer):
    together = encode_pair(tokenizer, "def ", "test():")
    assert together == encode_pair(tokenizer, "def", " test():")
    assert tokenizer.decode(together[1]) == " test():"


def test_an_empty_context_is_the_end_of_document(tokenizer):
    ids = tokenizer.encode_batch(["import os"])[0].tolist()
    assert encode_pair(tokenizer, "", "import os") == ([tokenizer.eos_id], ids, False)
    head, tail, apart = encode_pair(tokenizer, "  ", "import os")
    assert head == [tokenizer.eos_id] and tokenizer.decode(tail) == "  import os" and not apart


def test_a_continuation_that_merges_into_the_context_is_encoded_apart():
    class Merging:
        """One token for a known word, else one a character."""

        eos_id = 0

        def encode_batch(self, texts):
            return [[99] if text == "ab" else [ord(c) for c in text] for text in texts]

    assert encode_pair(Merging(), "a", "b") == ([ord("a")], [ord("b")], True)
    assert encode_pair(Merging(), "x", "b") == ([ord("x")], [ord("b")], False)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 23])
def test_windows_of_a_long_text_are_the_harness_rolling_windows(length):
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(100, 100 + length))
    theirs = [
        ((*inputs, predicted[-1]), len(predicted))
        for inputs, predicted in utils.get_rolling_token_windows(tokens, 7, max_seq_len=4, context_len=1)
    ]
    assert [(span.tokens, span.scored) for span in windows([7], tokens, 4)] == theirs


def test_windows_score_every_token_once_with_as_much_context_as_fits():
    rng = random.Random(1)
    for _ in range(300):
        context = list(range(rng.randrange(1, 20)))
        tail = list(range(100, 100 + rng.randrange(1, 30)))
        longest = rng.randrange(1, 12)
        spans = list(windows(context, tail, longest))
        assert [token for span in spans for token in span.tokens[-span.scored :]] == tail
        assert all(len(span.tokens) <= longest + 1 for span in spans)
        everything, end = context + tail, len(context)
        for span in spans:
            end += span.scored
            assert list(span.tokens) == everything[end - len(span.tokens) : end]
        full = min(longest + 1, len(everything))
        assert all(len(span.tokens) == full for span in spans)


@pytest.mark.parametrize(("tokens", "scored"), [((1, 2), 0), ((1, 2), 2), ((), 0)])
def test_a_span_without_context_or_without_anything_to_score_is_refused(tokens, scored):
    with pytest.raises(ValueError, match="cannot be scored"):
        Span(tokens, scored)
