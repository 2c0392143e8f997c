"""What the page does, without a browser: `Desk`, the HTML pieces, and gradio's own client. tests/unimed/test_page_browser.py drives it."""

import importlib
import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from page_server import served
from PIL import Image

import unimed
from cmoe_kernels import CMoEConfig
from unimed import NOTICE
from unimed.cli import app as cli
from unimed.errors import UserError
from unimed.inference.gates import gate_map, heat, token_gates
from unimed.records.pixels import View
from unimed.records.views import views
from unimed.sample.slices import ASSETS
from unimed.serve.desk import Desk


@pytest.fixture(scope="module")
def desk(small_run):
    return Desk(unimed.load(small_run))


def told(desk, file, view, task, question):
    *pieces, whole = desk.ask(file, view, task, question)
    assert "".join(pieces) == whole.answer.text
    return whole


# Gates over the picture


def test_gates_go_to_the_patches_that_their_token_joins():
    gates = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    config = {"in_features": 8, "out_features": 8, "num_experts": 3}
    rows = gate_map(CMoEConfig(**config, resample="projection", resample_rate=4), gates)
    assert rows.shape == (8, 8, 3)
    assert (rows[0, :4] == gates[0]).all()  # four neighbours of one row
    assert (rows[0, 4:] == gates[1]).all()
    assert (rows[1, :4] == gates[2]).all()
    pooled = gate_map(CMoEConfig(**config, resample="avgpool", resample_rate=4), gates)
    assert (pooled[:2, :2] == gates[0]).all()  # a square
    assert (pooled[:2, 2:4] == gates[1]).all()
    assert (pooled[2:4, :2] == gates[4]).all()
    plain = gate_map(CMoEConfig(**config, resample="none"), gates)
    assert (plain[1, 0] == gates[4]).all()
    assert gate_map(CMoEConfig(**config, resample="none"), gates[:15]) is None


def test_heat_is_clear_where_a_gate_is_lowest():
    layer = np.asarray(heat(np.array([[0.2, 0.4], [0.3, 0.2]]), (2, 2), (0, 200, 255)))
    assert layer[..., 3].tolist() == [[0, 170], [85, 0]]
    assert np.asarray(heat(np.full((2, 2), 0.2), (2, 2), (0, 0, 0)))[..., 3].max() == 0


def test_token_gates_are_those_of_the_answer(desk):
    with token_gates(desk.session.connector) as seen:
        answer = desk.session.answer(Image.new("RGB", (32, 32), (90, 60, 30)), "liver", "refer", max_new_tokens=3)
    (gates,) = seen
    assert gates[0].mean(0) == pytest.approx(answer.gates, abs=1e-4)
    desk.session.answer(Image.new("RGB", (32, 32)), "liver", "refer", max_new_tokens=1)
    assert len(seen) == 1


# What a file shows


def test_views_of_volumes_and_pictures(tmp_path):
    found = views(ASSETS / "ct.nii.gz")
    assert found.counts == {"axial": 30, "coronal": 101, "sagittal": 122}
    assert found.window == (-160, 240)
    assert found.values[0] < -900
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "deep.png")
    assert views(tmp_path / "deep.png").values == (0, 4095)
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    assert (views(tmp_path / "colour.png").counts, views(tmp_path / "colour.png").values) == ({"axial": 1}, None)
    Image.new("L", (8, 8)).save(tmp_path / "pages.tiff", save_all=True, append_images=[Image.new("L", (8, 8))] * 2)
    assert views(tmp_path / "pages.tiff").counts == {"axial": 3}


# The desk


def test_an_answer_has_all_that_the_session_gives(desk):
    file = desk.open(ASSETS / "ct.nii.gz", "ct.nii.gz")
    view = View(file.path, "axial", 15, (-160.0, 240.0))
    whole = told(desk, file, view, "refer", "liver")
    alone = desk.session.answer(file.path, "liver", "refer", plane="axial", slice=15, window=(-160.0, 240.0))
    assert (whole.answer.text, whole.answer.box, whole.answer.gates) == (alone.text, alone.box, alone.gates)
    assert whole.answer.confidence == pytest.approx(alone.confidence, rel=1e-6)
    assert whole.maps.mean((0, 1)) == pytest.approx(alone.gates, abs=1e-4)
    assert (whole.line["image"], whole.line["slice"], whole.line["window"]) == ("ct.nii.gz", 15, (-160.0, 240.0))
    json.dumps(whole.line)
    text = told(desk, file, view, "qa", "Where is the spleen?")  # the open image is left out
    assert text.maps is None
    assert text.line["image"] == ""


def test_leaving_an_answer_stops_the_model(desk):
    asked = desk.ask(desk.open(ASSETS / "mr.nii.gz", "mr.nii.gz"), View(ASSETS / "mr.nii.gz"), "vqa", "which plane?")
    next(asked)
    asked.close()
    assert not [one for one in threading.enumerate() if "work" in one.name]
    assert not desk.session.connector._forward_hooks


@pytest.mark.parametrize(
    ("task", "question", "image", "line"),
    [
        ("vqa", "", True, "task vqa: it needs a question"),
        ("vqa", "which?", False, "task vqa: it needs an image; upload one, or take an example"),
        ("identify", "liver", True, "box 'liver': write it as x1,y1,x2,y2"),
        ("nonsense", "which?", True, "task 'nonsense': no such task"),
    ],
)
def test_questions_that_cannot_be_asked_are_one_line(desk, task, question, image, line):
    file = desk.open(ASSETS / "mr.nii.gz", "mr.nii.gz") if image else None
    with pytest.raises(UserError) as error:
        list(desk.ask(file, file and file.view, task, question))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_files_are_named_as_the_visitor_named_them(desk, tmp_path):
    for content in (b"", b"not an image", b"\x1f\x8b\x08\x00", b"PK\x03\x04rest", b"\x00" * 128 + b"DICM" + b"\xff" * 40):
        path = tmp_path / "somewhere" / "scan.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            desk.open(path, "scan.bin")
        assert str(error.value).startswith("scan.bin")
        assert str(tmp_path) not in str(error.value)
    file = desk.open(ASSETS / "mr.nii.gz", "mr.nii.gz")
    with pytest.raises(UserError, match="slice 99"):
        desk.look(file, View(file.path, "axial", 99))
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    grey = desk.open(tmp_path / "grey.png", "grey.png")
    with pytest.raises(UserError, match=r"grey\.png: plane 'coronal' needs a volume"):
        desk.look(grey, View(grey.path, "coronal"))
    (tmp_path / "grey.png").unlink()
    with pytest.raises(UserError, match=r"grey\.png: the upload is no longer there"):
        desk.look(grey, grey.view)


# The server


def status(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.fixture(scope="module")
def page(desk):
    with pytest.MonkeyPatch.context() as patch, socket_log(patch) as addresses, served(desk) as (url, folder):
        yield url, folder
    assert addresses <= {"127.0.0.1", "::1"}, "the server connected to another host"
    assert not folder.exists()


@contextmanager
def socket_log(patch):
    seen, connect = set(), socket.socket.connect

    def spy(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            seen.add(address[0])
        return connect(self, address)

    patch.setattr(socket.socket, "connect", spy)
    yield seen


def test_the_page_says_what_it_is_and_holds_the_browser_to_its_host(page):
    url, _ = page
    code, headers, body = status(url)
    assert code == 200
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert NOTICE in body.decode()
    config = json.loads(status(f"{url}/config")[2])
    assert config["analytics_enabled"] is False
    assert config["run_history"] is False
    assert not [one for one in config["dependencies"] if one["api_visibility"] == "public"]


def test_the_page_gives_no_file_beyond_its_uploads(page, small_run):
    url, folder = page
    for path in ("/etc/passwd", __file__, str(small_run / "recipe.yaml"), f"{folder}/../{small_run.name}", str(ASSETS / "ct.nii.gz")):
        assert status(f"{url}/gradio_api/file={path}")[0] in (403, 404), path
    assert status(f"{url}/gradio_api/proxy=http://localhost:1/")[0] in (400, 401, 403, 404)


def test_another_site_s_name_does_not_lead_to_the_page(page):
    url, _ = page
    assert status(url, Host="evil.example")[0] == 400
    assert status(url, Host="localhost:7860")[0] == 200


def test_the_command_says_what_is_wrong_in_one_line(small_run, monkeypatch):
    from typer.testing import CliRunner

    def run(*line):
        done = CliRunner().invoke(cli.app, ["page", "--model", str(small_run), *line], env={"COLUMNS": "300", "TERM": "dumb"})
        return done.exit_code, done.stderr.strip()

    pytest.importorskip("gradio", reason="the extra page is not installed")
    importlib.import_module("unimed.serve.local")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, words = run("--port", str(taken.getsockname()[1]))
    assert (code, words.count("\n")) == (2, 0), words
    assert "cannot listen there" in words
    assert "name another --port" in words
    for name in ("local", "page"):
        monkeypatch.delitem(sys.modules, f"unimed.serve.{name}")
        monkeypatch.delattr(unimed.serve, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run() == (2, 'error: the package gradio is not installed; get all that the page needs with: pip install "cmoe-kernels[page]"')


def test_an_idle_page_looks_for_work_some_times_a_second(desk):
    """gradio's own pace, 1,000 times a second, takes 6 % of a core."""
    local = importlib.import_module("unimed.serve.local")
    (blocks,) = [route.app.get_blocks() for route in local.application(desk).routes if hasattr(getattr(route, "app", None), "get_blocks")]
    assert blocks._queue.sleep_when_free >= 0.05
    assert blocks._queue.progress_update_sleep_when_free >= 0.05
