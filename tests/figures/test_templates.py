"""The template sentences for token pairs."""

import pytest

from tide_mega.lab.figures.separation_pairs import CATEGORIES, SLOT, Template


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.name)
def test_every_category_has_150_sentences_whose_left_contexts_all_differ(category):
    assert len(category.templates) == 150
    assert len({template.before for template in category.templates}) == 150


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.name)
def test_they_are_sentences_with_one_slot(category):
    for template in category.templates:
        text = template.sentence(SLOT)
        assert text.count(SLOT) == 1
        assert text[0].isupper() and text.endswith(".")
        assert "  " not in text and " ," not in text and " ." not in text
        assert len(template.before.split()) >= 4


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.name)
def test_a_few_of_them_are_varied(category):
    few = category.templates[:10]
    assert len({template.before.split(",")[0] for template in few}) == 10
    assert len({template.after for template in few}) == 10


def test_no_sentence_is_in_two_categories():
    sentences = [template.sentence(SLOT) for category in CATEGORIES for template in category.templates]
    assert len(set(sentences)) == 450


def test_the_word_stands_between_its_contexts():
    assert Template("On page", ", they stopped.").sentence("12") == "On page 12, they stopped."


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.name)
def test_every_category_has_more_pairs_than_are_measured_and_none_twice(category):
    assert len(category.pairs) >= 24
    assert len({frozenset(pair) for pair in category.pairs}) == len(category.pairs)
    assert all(first != second for first, second in category.pairs)
