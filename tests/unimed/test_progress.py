"""The bar of long commands."""

from rich.console import Console

from unimed import progress


def test_items_are_counted_as_they_are_read(monkeypatch, capsys):
    assert list(progress.watched(iter(range(3)), "read mine")) == [0, 1, 2]
    assert "".join(capsys.readouterr()) == ""  # no terminal, no bar

    monkeypatch.setattr(progress, "Console", lambda stderr, markup: Console(force_terminal=True, stderr=stderr, width=100, markup=markup))
    assert sum(progress.watched(range(250), "read mine")) == sum(range(250))
    assert list(progress.watched([], "read nothing")) == []
    out, err = capsys.readouterr()
    assert out == ""  # a table or JSON goes there
    assert "read mine" in err
    assert "250/?" in err
