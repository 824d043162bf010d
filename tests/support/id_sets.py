"""Hypothesis strategies: what the ranks of a memory exchange ask for."""

from hypothesis import strategies as st

LARGEST_VOCABULARY = 37


@st.composite
def id_sets(draw, vocabulary, members):
    """Ascending distinct ids: none, one id, all, one owner's, those at the edges of shards, or any."""
    last = vocabulary - 1
    edges = {0, 1, members - 1, members, vocabulary // members, last - members, last - 1, last}
    edges = sorted(i for i in edges if 0 <= i <= last)
    return sorted(
        draw(
            st.one_of(
                st.just(set()),
                st.just({last}),
                st.just(set(range(vocabulary))),
                st.integers(0, members - 1).map(lambda owner: set(range(owner, vocabulary, members))),
                st.sets(st.sampled_from(edges)),
                st.sets(st.integers(0, last)),
            )
        )
    )


@st.composite
def exchanges(draw, askers, members):
    """(vocabulary, ids of each asker); `members` own the rows, the vocabulary often divides unevenly."""
    vocabulary = draw(st.integers(1, LARGEST_VOCABULARY))
    ids = id_sets(vocabulary, members)
    everyone_alike = draw(st.booleans())
    return vocabulary, [draw(ids)] * askers if everyone_alike else [draw(ids) for _ in range(askers)]
