"""An error that every rank finds is printed once, and one of a single rank by that rank."""

from moa_dist.cli.rank_output import say_unless_rank_0_does


def test_rank_0_prints_at_once(capsys):
    say_unless_rank_0_does(0, "no data", lambda: True)
    assert capsys.readouterr().err == "rank 0: no data\n"


def test_others_are_silent_if_the_launcher_ends_them(capsys):
    answers = iter([False, False, True])
    say_unless_rank_0_does(1, "no data", lambda: next(answers))
    assert capsys.readouterr().err == ""


def test_others_print_if_rank_0_goes_on(capsys):
    say_unless_rank_0_does(1, "no data", lambda: False, patience_s=0.1)
    assert capsys.readouterr().err == "rank 1: no data\n"
