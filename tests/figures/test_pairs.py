"""Which token pairs are measured, and why others are not."""

import numpy as np

from tests.support.word_tokenizer import WordTokenizer
from tide_mega.lab.figures.separation_pairs import Category, Template, choose_pairs, sampled_rare_pairs

TEMPLATES = (Template("They said", " twice."), Template("Nobody there wrote", "."))


def chosen_of(tokenizer, *pairs, limit=12):
    return choose_pairs(Category("test", pairs, TEMPLATES), tokenizer, limit)


def test_a_pair_is_dropped_where_a_word_is_not_one_token_and_the_reason_names_it():
    chosen = chosen_of(WordTokenizer("their", "there", "to"), ("their", "there"), ("to", "too"))
    assert [verdict.status for verdict in chosen.verdicts] == ["measured", "dropped"]
    assert chosen.verdicts[1].reason == "too is 3 tokens (t|o|o)"
    assert chosen.verdicts[1].ids is None


def test_words_of_one_length_that_differ_in_several_tokens_are_dropped():
    chosen = chosen_of(WordTokenizer(), ("form", "from"))
    assert chosen.verdicts[0].status == "dropped"


def test_a_number_of_two_tokens_is_dropped_although_only_its_last_one_differs():
    chosen = chosen_of(WordTokenizer(), ("1847", "1849"), ("847", "849"))
    assert [verdict.status for verdict in chosen.verdicts] == ["dropped", "measured"]
    assert chosen.verdicts[0].reason == "1847 is 2 tokens (184|7); 1849 is 2 tokens (184|9)"


def test_contexts_end_before_the_slot_also_where_its_space_is_a_token():
    tokenizer = WordTokenizer("said")
    chosen = chosen_of(tokenizer, ("847", "849"))
    assert [tokenizer.decode(context) for context in chosen.contexts] == ["They said ", "Nobody there wrote "]
    assert [tokenizer.token_text(index) for index in chosen.ids_W] == ["847", "849"]


def test_pairs_beyond_the_limit_are_not_needed():
    chosen = chosen_of(WordTokenizer("a", "b", "c"), ("x", "yy"), ("a", "b"), ("b", "c"), limit=1)
    assert [verdict.status for verdict in chosen.verdicts] == ["dropped", "measured", "not needed"]
    assert len(chosen.ids_W) == 2


def test_pairs_share_the_columns_of_their_words():
    chosen = chosen_of(WordTokenizer("b", "a", "c"), ("a", "b"), ("c", "a"))
    words = [WordTokenizer("b", "a", "c").token_text(index).strip() for index in chosen.ids_W]
    assert [(words[first], words[second]) for first, second in chosen.columns] == [("a", "b"), ("c", "a")]


def test_sampled_pairs_are_rare_whole_words_that_end_alike():
    words = [
        "walking",
        "talking",
        "walkings",
        "station",
        "nation",
        "motion",
        "common",
        "sermon",
        "ab",
        "Upper",
    ]
    tokenizer = WordTokenizer(*words)
    bins = np.full(len(words) + 1, 1, np.int8)
    bins[1 + words.index("sermon")] = 9
    pairs = sampled_rare_pairs(tokenizer, bins, 0, TEMPLATES).pairs
    assert pairs == sampled_rare_pairs(tokenizer, bins, 0, TEMPLATES).pairs
    # walking begins walkings, so that it may be a fragment; sermon is common.
    assert len(pairs) == 1 and set(pairs[0]) < {"station", "nation", "motion"}
