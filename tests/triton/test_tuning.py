"""Tiles: the built-in table, the user's table over it, tuning. Nothing here needs a GPU: a clock stands in for it."""

import hashlib
import json
import warnings

import pytest
import torch

from cmoe_kernels import backends

if not backends.INTERPRETED:
    pytest.skip("for the interpreter's process (TRITON_INTERPRET=1)", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from cmoe_kernels.ops.gemm import tuning

X = torch.empty(0, dtype=torch.bfloat16)
LINE = "half gemm 64"


@pytest.fixture(autouse=True)
def own(monkeypatch, tmp_path):
    """An empty home, and no memory of another test's table."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "interpreted", tuning.KNOWN["sm_90"])
    tuning._own_table.cache_clear()
    yield tuning.own_path()
    tuning._own_table.cache_clear()


def play(monkeypatch, device):
    monkeypatch.setattr(tuning, "interpreted", device)


def used(kernel="gemm", rows=50, x=X, w=X):
    return tuning.tuned(kernel, rows, x, w, lambda tile: tile)


def test_every_line_fits_its_device(monkeypatch):
    lines = tuning._table()
    assert {key.split()[0] for key in lines} == set(tuning.KNOWN)
    for key, tile in lines.items():
        arch, line = key.split(" ", 1)
        play(monkeypatch, tuning.KNOWN[arch])
        x = X if line.startswith(("half", "rounded")) else X.float()
        assert tuning.tile_for(line, x) == tile, key


def test_wildcards_give_each_line_its_tile():
    """The 576 lines that stood in the file one by one before it had wildcards; the digest changes with a line that a GPU has measured."""
    lines = "\n".join(f"{key}: {list(tile)}" for key, tile in sorted(tuning._table().items()))
    assert lines.count("\n") + 1 == len(tuning.KNOWN) * len(tuning.OPERANDS) * len(tuning.KERNELS) * (len(tuning.ROWS) + 1) == 576
    assert hashlib.sha256(lines.encode()).hexdigest() == "a9fad374ef42662da46475ea8e4e2c581680b7725a54fa83b4f091ecdf13a0ef"


def test_lines_by_rows_and_operands():
    table = tuning._table()
    for rows, most in ((1, "16"), (16, "16"), (17, "64"), (256, "256"), (257, "more")):
        assert used(rows=rows) == table[f"sm_90 half gemm {most}"]
    assert used(w=X.float()) == table["sm_90 rounded gemm 64"]
    assert used(x=X.float()) == table["sm_90 fp32 gemm 64"]
    assert used(x=X.float(), w=X.float()) == table["sm_90 fp32 gemm 64"]


def test_an_unknown_device_takes_the_lines_before_it_and_fewer_stages(monkeypatch):
    play(monkeypatch, tuning.Device("sm_86", 84, 99 << 10))
    assert used(rows=1000) == tuning._table()["sm_80 half gemm more"]
    play(monkeypatch, tuning.Device("sm_75", 40, 64 << 10))
    before = tuning._table()["sm_80 half gemm more"]
    assert used(rows=1000) == before._replace(stages=2)
    play(monkeypatch, tuning.Device("sm_120", 170, 99 << 10))
    assert used(rows=16) == tuning._table()["sm_100 half gemm 16"]


def test_the_users_table_comes_first(own):
    own.parent.mkdir()
    own.write_text(json.dumps({f"sm_90 {LINE}": [32, 64, 32, 4, 2, 1]}))
    assert used() == (32, 64, 32, 4, 2, 1)
    assert used(rows=1000) == tuning._table()["sm_90 half gemm more"]


NO_TABLES = ("{", "[]", '{"a": 1}', '{"a": [17, 64, 32, 4, 2, 1]}', '{"a": [64, 64, 32]}', '{"a": [64, 64, 32, 4, "2"]}', "\0")


@pytest.mark.parametrize("text", NO_TABLES)
def test_what_is_no_table_gives_one_warning(own, text):
    own.parent.mkdir()
    own.write_text(text)
    with pytest.warns(UserWarning, match="is not a table of tiles") as caught:
        assert used() == used() == tuning._table()[f"sm_90 {LINE}"]
    assert len(caught) == 1
    assert str(own) in str(caught[0].message)
    assert own.read_text() == text


def test_tuning_keeps_the_fastest_for_the_next_process(monkeypatch, own):
    monkeypatch.setenv("CMOE_AUTOTUNE", "1")
    best, tried = tuning.Tile(32, 128, 64, 4, 3, 2), []

    def clock(call):
        tried.append(call())
        if tried[-1].stages == 4:
            raise OutOfResources(1, 0, "shared memory")
        return 1.0 if tried[-1] == best else 2.0

    monkeypatch.setattr(tuning, "_time", clock)
    assert used() == used() == best
    assert tried[0] == tuning._table()[f"sm_90 {LINE}"]
    assert all(tuning._bytes(tile, LINE, X) <= tuning.interpreted.shared for tile in tried)
    assert json.loads(own.read_text()) == {f"sm_90 {LINE}": list(best)}
    # The next process: no tuning, and lines of another one stay.
    tuning._own_table.cache_clear()
    own.write_text(json.dumps({**json.loads(own.read_text()), "sm_80 half gemm 64": [16, 32, 32, 4, 2, 1]}))
    tried.clear()
    assert used() == best
    assert not tried
    used(rows=1)
    assert set(json.loads(own.read_text())) == {f"sm_90 {LINE}", "sm_80 half gemm 64", "sm_90 half gemm 16"}


def test_few_candidates_are_the_nearest(monkeypatch, own):
    monkeypatch.setenv("CMOE_AUTOTUNE", "4")
    tried = []
    monkeypatch.setattr(tuning, "_time", lambda call: tried.append(call()) or float(len(tried)))
    before = tuning._table()[f"sm_90 {LINE}"]
    assert used() == tried[0] == before
    assert 1 < len(tried) <= 5
    assert before not in tried[1:]
    for tile in tried[1:]:  # one step away in one number
        assert sum(a != b for a, b in zip(tile, before, strict=True)) == 1


def test_tuning_in_a_home_that_cannot_be_written(monkeypatch, own):
    monkeypatch.setenv("CMOE_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_time", lambda call: call() and 1.0)
    own.parent.write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="cannot be written"):
        first = used()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert used() == first


def test_nothing_is_tuned_without_being_asked(monkeypatch, own):
    monkeypatch.setattr(tuning, "_time", lambda call: pytest.fail("timed"))
    used()
    assert not own.exists()


@pytest.mark.parametrize("switch", ["allow_tf32", "fp32_precision", "set_float32_matmul_precision"])
def test_tf32_follows_torch(switch):
    before = torch.backends.cuda.matmul.fp32_precision
    assert tuning.precision() == "ieee"
    try:
        match switch:
            case "allow_tf32":
                torch.backends.cuda.matmul.allow_tf32 = True
            case "fp32_precision":
                torch.backends.cuda.matmul.fp32_precision = "tf32"
            case _:
                torch.set_float32_matmul_precision("high")
        assert tuning.precision() == "tf32"
        assert used(x=X.float(), w=X.float()) == tuning._table()["sm_90 tf32 gemm 64"]
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before
    assert tuning.precision() == "ieee"
