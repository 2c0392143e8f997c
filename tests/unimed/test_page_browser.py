"""The page in headless Chromium, by playwright: what a visitor does with mouse and keyboard, and every request that the browser makes.

axe-core checks contrast and names.
"""

import importlib.util
import json
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from page_server import served
from PIL import Image

import unimed
from unimed import NOTICE
from unimed.sample.slices import ASSETS
from unimed.serve.desk import Desk

if importlib.util.find_spec("gradio") is None:  # not imported: it takes seconds, and every worker collects this file
    pytest.skip("the extra page is not installed", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
WAIT = 120_000  # ms; a machine may have other work

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def session(small_run):
    return unimed.load(small_run)


@pytest.fixture(scope="module")
def address(session):
    with served(Desk(session)) as (url, folder):
        yield url, folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield started
        started.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as a new visitor. At the end: every request went to the page's own host, and no script failed."""
    hosts, faults, contexts = set(), [], []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc) if request.url.startswith(("http", "ws")) else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"{address[0]}/?__theme={options.get('color_scheme', 'light')}")
        page.wait_for_selector("#ask")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert hosts == {urlsplit(address[0]).netloc}
    assert faults == []


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (40, 60), dtype=np.uint8)).save(path)
    return path


def upload(page, path):
    page.set_input_files("#upload input[type=file]", str(path))
    page.wait_for_selector("#picture image, #message .message")


def ask(page, task, question=None):
    page.locator(f"#task input[value={task}]").check()
    if question is not None:
        page.locator("#question :is(input, textarea)").fill(question)
    page.click("#ask")
    page.wait_for_selector("#details .details")
    page.wait_for_selector("#answer output[aria-busy=false]")
    return page.inner_text("#answer output")


def saved(page):
    with page.expect_download() as download:
        page.click("#save")
    return json.loads(Path(download.value.path()).read_text())


def uploads(folder):
    """Files with something in them: gradio leaves an empty one at each upload until the process ends."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_picture_is_asked_about_and_the_answers_saved(visit, session, picture, address):
    page = visit()
    assert NOTICE in page.inner_text("#head")
    upload(page, picture)
    assert ask(page, "vqa", "which plane is shown") == (session.answer(picture, "which plane is shown").text or "(an empty answer)")
    page.wait_for_function("document.querySelectorAll('#history tbody tr').length == 1")
    ask(page, "qa", "Where is the spleen?")
    page.wait_for_function("document.querySelectorAll('#history tbody tr').length == 2")
    assert "not the probability" in " ".join(page.inner_text("#details").split())
    kept = saved(page)
    assert kept["notice"] == NOTICE
    assert [(line["id"], line["task"], line["image"]) for line in kept["answers"]] == [("1", "vqa", "grey.png"), ("2", "qa", "")]
    assert kept["answers"][0]["text"] == session.answer(picture, "which plane is shown").text
    assert uploads(address[1]) == ["grey.png"]
    upload_again = picture.with_name("other.png")
    shutil.copy(picture, upload_again)
    page.click("#upload button[aria-label=Clear], #upload button[aria-label=Remove], #upload .icon-button-wrapper button")
    page.wait_for_selector("#picture .none")
    upload(page, upload_again)
    assert uploads(address[1]) == ["other.png"]
    page.close()
    until = time.monotonic() + 60
    while uploads(address[1]) and time.monotonic() < until:
        time.sleep(0.2)
    assert uploads(address[1]) == []


def test_a_volume_has_planes_slices_a_window_boxes_and_gates(visit, session):
    page = visit()
    upload(page, ASSETS / "ct.nii.gz")
    caption = page.locator("#picture figcaption")
    assert "axial slice 15 of 0 to 29" in caption.inner_text()
    page.get_by_label("coronal", exact=True).check()
    page.wait_for_function("document.querySelector('#picture figcaption').innerText.includes('coronal slice 50 of 0 to 100')")
    page.locator("#slice input[type=number]").fill("40")
    page.locator("#slice input[type=number]").press("Enter")
    page.wait_for_function("document.querySelector('#picture figcaption').innerText.includes('coronal slice 40')")
    page.locator("#auto input").uncheck()
    page.wait_for_selector("#low input[type=number]")
    page.locator("#low input[type=number]").fill("-500")
    page.locator("#low input[type=number]").press("Enter")
    page.wait_for_function("document.querySelector('#picture figcaption').innerText.includes('window -500 to 240 as asked')")
    page.locator("#low input[type=number]").fill("900")
    page.locator("#low input[type=number]").press("Enter")
    page.wait_for_selector("#message .message")
    assert page.inner_text("#message") == "window: black at 900 must be below white at 240"
    page.locator("#auto input").check()
    page.wait_for_selector("#message .message", state="detached")
    ask(page, "identify", "20,5,80,25")
    sides = [float(page.locator("#picture rect").get_attribute(name)) for name in ("x", "y", "width", "height")]
    answer = session.answer(ASSETS / "ct.nii.gz", "20,5,80,25", "identify", plane="coronal", slice=40)
    assert answer.box == pytest.approx((20, 5, 80, 25))
    shown = page.locator("#picture svg").get_attribute("viewBox").split()
    assert 0 < sides[2] < float(shown[2])
    assert sides[2] / float(shown[2]) == pytest.approx(60 / 122, abs=0.02)  # of 122 voxels across
    assert page.locator("#details .bars tr").count() == 5
    page.get_by_label("expert 2", exact=True).check()
    page.wait_for_selector("#picture .heat")
    assert "gate of expert 2" in caption.inner_text()
    page.get_by_label("axial", exact=True).check()  # the answer was about another slice
    page.wait_for_selector("#picture .heat", state="detached")
    page.wait_for_selector("#details .details", state="detached")


def test_every_example_is_answered(visit):
    page = visit()
    for number, has_image in enumerate((True, True, True, True, False)):
        page.click(f"#sample-{number}")
        page.wait_for_function(f"document.querySelectorAll('#history tbody tr').length == {number + 1}")
        page.wait_for_selector("#answer output[aria-busy=false]")
        assert page.locator("#message .message").count() == 0
        assert (page.locator("#picture image").count() > 0) == has_image


def test_what_goes_wrong_is_one_line(visit, tmp_path):
    page = visit()
    page.click("#ask")
    page.wait_for_selector("#message .message")
    assert page.inner_text("#message .message") == "task vqa: it needs an image; upload one, or take an example"
    broken = tmp_path / "<img src=x onerror=alert(1)>.nii.gz"
    broken.write_bytes(b"\x1f\x8b\x08\x00broken")
    upload(page, broken)
    page.wait_for_function("document.querySelector('#message .message')?.innerText.includes('.nii.gz')")
    words = page.inner_text("#message .message")  # gradio's note that it is processing may stand beside it for a moment
    assert "\n" not in words
    assert "Traceback" not in page.content()
    assert page.locator("#message img").count() == 0
    page.click("#sample-1")
    page.wait_for_selector("#details .details")
    page.locator("#task input[value=identify]").check()
    page.locator("#question :is(input, textarea)").fill("5,5,1,1")
    page.click("#ask")
    page.wait_for_selector("#message .message")
    assert "must have x1 < x2" in page.inner_text("#message .message")


def test_stop_ends_an_answer(visit, monkeypatch):
    left = threading.Event()

    def endless(self, *question):
        try:
            for _ in range(6000):
                yield "word "
                time.sleep(0.1)
        finally:
            left.set()

    monkeypatch.setattr(Desk, "ask", endless)
    page = visit()
    page.click("#ask")
    page.wait_for_function("document.querySelector('#answer output').innerText.includes('word word')")
    page.click("#stop")
    page.wait_for_function("document.querySelector('#answer output').innerText == '(stopped)'")
    assert left.wait(60), "the model goes on"


def test_the_keyboard_is_enough(visit, picture):
    page = visit()
    upload(page, picture)
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]:not(label, input, textarea)')?.id ?? ''"))
    assert {"task", "question", "ask", "stop", "sample-0", "sample-4", "save"} <= reached
    page.locator("#task input[value=vqa]").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function("document.querySelector('#task input[value=refer]').checked")
    box = page.locator("#question :is(input, textarea)")
    page.wait_for_function("document.querySelector('#question').innerText.includes('Name of the object')")
    box.focus()
    page.keyboard.type("liver")
    page.keyboard.press("Enter")
    page.wait_for_selector("#details .details")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit, scheme):
    page = visit(color_scheme=scheme, bypass_csp=True)
    page.click("#sample-0")
    page.wait_for_selector("#details .details")
    page.locator("#auto input").uncheck()
    page.wait_for_selector("#low input[type=number]")
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']})")
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found["violations"]] == []
    assert len(found["passes"]) > 20


def test_a_phone_scrolls_in_one_direction(visit):
    page = visit(viewport={"width": 390, "height": 844})
    page.click("#sample-0")
    page.wait_for_selector("#details .details")
    page.wait_for_selector("#history table")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
