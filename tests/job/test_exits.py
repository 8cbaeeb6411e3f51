import signal

from beit import cli
from beit.job import exits


def test_a_stop_is_128_and_the_signals_number_as_shells_have_it() -> None:
    assert [exits.of_signal(n) for n in (2, 10, 15)] == [130, 138, 143]
    assert int(exits.Exit.SIGUSR1) == 128 + signal.SIGUSR1


def test_every_code_has_a_meaning_and_stands_in_the_help(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["beit", "--help"])
    assert cli.main() == 0
    shown = capsys.readouterr().out
    for code in exits.Exit:
        assert f"{code:>3}  {exits.MEANINGS[code]}" in shown


def test_a_sweeps_code_is_a_stop_before_all_then_the_worst() -> None:
    assert exits.of_all([]) == 0
    assert exits.of_all([0, 0]) == 0
    assert exits.of_all([0, 2, 3]) == 3
    assert exits.of_all([1, 2, 4]) == 1
    assert exits.of_all([1, 0, 143]) == 143
    assert exits.of_all([0, -9]) == 1  # a code that is not in the table


def test_the_command_line_ends_with_the_code_of_what_ended_the_run(capsys, monkeypatch) -> None:
    class NoSpace(exits.RunEnd):
        code = exits.Exit.NO_SPACE

    def full(arguments: list[str]) -> int:
        raise NoSpace("no space left for\nx.safetensors")

    monkeypatch.setitem(cli._VERBS, "train", full)
    monkeypatch.setattr("sys.argv", ["beit", "train"])
    assert cli.main() == 5
    assert capsys.readouterr().err == "beit: no space left for x.safetensors\n"
