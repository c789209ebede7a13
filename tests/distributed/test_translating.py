"""Ranks share the texts to translate, and all get all translations."""

from tests.evaluate.test_translate import translate_on_this_rank


def test_ranks_change_nothing(pools, tmp_path):
    expected = translate_on_this_rank(tmp_path)
    assert pools(2).run(translate_on_this_rank, tmp_path) == [expected, expected]
