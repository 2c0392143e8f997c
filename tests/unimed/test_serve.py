"""`unimed serve` as its users meet it: a server in its own process, asked by OpenAI's client, by curl and by hand."""

import concurrent.futures
import json
import shutil
import subprocess
import time
import zlib

import attacks
import numpy as np
import pytest
from dicom_samples import dicom_file
from serving import Server, body, png, save_model, url
from soak import Question, Soak

import unimed
from unimed import Request

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

SECRET = "Wintergreen"  # in every place where a patient's name may be


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("work") / "runs" / "tiny")


@pytest.fixture(scope="module")
def session(run):
    return unimed.load(run, device="cpu")


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    with Server(run, tmp_path_factory.mktemp("server"), "--max-mib", "2", "--max-pixels", "1000000") as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def nifti():
    import nibabel as nib

    made = nib.Nifti1Image(np.arange(60 * 7, dtype=np.int16).reshape(6, 7, 10), np.eye(4))
    return made.to_bytes()


def messages(text, image=None):
    return body(text, image)["messages"]


def test_the_openai_client_gets_the_sessions_answers(client, session):
    assert [model.id for model in client.models.list()] == ["tiny"]
    made = client.chat.completions.create(model="tiny", messages=messages("[identify] 5,5,15,15", url(png())), max_tokens=9)
    answer = session.answer(png(), "5,5,15,15", "identify", max_new_tokens=9)
    choice = made.choices[0]
    assert choice.message.content == answer.text
    assert choice.unimed["task"] == "identify"
    assert choice.unimed["box"] == [5, 5, 15, 15]
    assert choice.unimed["confidence"] == pytest.approx(answer.confidence, abs=1e-3)
    assert choice.unimed["gates"] == pytest.approx(answer.gates, abs=1e-3)
    assert choice.finish_reason in ("stop", "length")
    assert made.usage.completion_tokens <= 9
    assert made.usage.total_tokens == made.usage.completion_tokens + made.usage.prompt_tokens
    question = {"model": "tiny", "messages": messages("which modality?", url(png(2))), "max_tokens": 20}
    whole = client.chat.completions.create(**question, extra_body={"task": "vqa"}).choices[0].message.content
    chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole == session.answer(png(2), "which modality?", max_new_tokens=20).text
    last = chunks[-2].choices[0]
    assert last.finish_reason
    assert last.unimed["task"] == "vqa"
    assert chunks[-1].usage.completion_tokens <= 20


def test_the_openai_client_raises_what_it_documents(client):
    import openai

    for error, fields in (
        (openai.NotFoundError, {"model": "other"}),
        (openai.BadRequestError, {"messages": messages("[vqa] without an image")}),
        (openai.BadRequestError, {"messages": messages("liver", url(b"no image"))}),
        (openai.BadRequestError, {"messages": messages("a", url(png())), "extra_body": {"task": "findings"}}),
        (openai.BadRequestError, {"messages": messages("word " * 3000)}),
    ):
        with pytest.raises(error) as caught:
            client.chat.completions.create(**{"model": "tiny", "messages": messages("where?"), **fields})
        assert caught.value.body["message"]
        assert "Traceback" not in caught.value.message


def test_files_of_hospitals_are_answered_like_the_sessions(server, session):
    grey = np.arange(300, dtype=np.uint16).reshape(15, 20)
    for data, media, more in (
        (dicom_file(grey), "application/dicom", {}),
        (dicom_file(grey), "application/dicom", {"window": [0, 90]}),
        (nifti(), "application/octet-stream", {"plane": "coronal", "slice": 2}),
    ):
        made = server.chat("what is it?", url(data, media), max_tokens=8, **more).json()
        answer = session.answer(Request(data, "what is it?", max_new_tokens=8, **{**more, "window": more.get("window")}))
        assert made["choices"][0]["message"]["content"] == answer.text
        assert made["choices"][0]["unimed"]["notes"] == list(answer.notes)


def test_answers_in_a_batch_are_those_by_themselves(server, session):
    questions = [(f"question {number}", png(number), 4 + number % 5) for number in range(12)]
    before = server.metric("unimed_batch_size_count"), server.metric("unimed_batch_size_sum")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        made = list(pool.map(lambda one: server.chat(one[0], url(one[1]), max_tokens=one[2], stream=one[2] == 5), questions))
    for (text, image, tokens), found in zip(questions, made, strict=True):
        if tokens == 5:
            events = [json.loads(line[6:]) for line in found.text.split("\n\n") if line.startswith("data: {")]
            content = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        else:
            content = found.json()["choices"][0]["message"]["content"]
        assert content == session.answer(image, text, max_new_tokens=tokens).text
    batches, asked = server.metric("unimed_batch_size_count") - before[0], server.metric("unimed_batch_size_sum") - before[1]
    assert asked == 12
    assert batches < 12


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_is_answered(server, session, tmp_path):
    (tmp_path / "body.json").write_text(json.dumps(body("[refer] liver", url(png()), max_tokens=6)))
    head = ["curl", "-sS", "--noproxy", "*", "-H", "Content-Type: application/json", "-d", f"@{tmp_path / 'body.json'}"]
    place = f"{server.url}/v1/chat/completions"
    made = subprocess.run([*head, place], capture_output=True, check=True, text=True).stdout
    assert json.loads(made)["choices"][0]["message"]["content"] == session.answer(png(), "liver", "refer", max_new_tokens=6).text
    (tmp_path / "body.json").write_text(json.dumps(body("where?", stream=True, max_tokens=6)))
    made = subprocess.run([*head, "-N", place], capture_output=True, check=True, text=True).stdout
    assert made.startswith("data: {")
    assert made.endswith("data: [DONE]\n\n")
    (tmp_path / "body.json").write_bytes(b"x" * 4_000_000)  # curl waits for 100 Continue before it sends this
    made = subprocess.run([*head, "-w", "%{http_code}", place], capture_output=True, check=True, text=True).stdout
    assert made.endswith("413")
    assert "the body has more than" in made


def wait_until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_who_leaves_is_not_answered_on(server):
    """Both kinds of request; the worker turns to the next one long before the answer would have been whole."""
    long = {"json": body("tell me all", url(png()), max_tokens=200, stream=True)}
    with server.client.stream("POST", "/v1/chat/completions", **long) as response:
        key = response.headers["x-request-id"]
        next(response.iter_lines())
    wait_until(lambda: any(event.get("id") == key for event in server.events()))
    assert next(event for event in server.events() if event.get("id") == key)["outcome"] == "left"
    plain = {**long["json"], "stream": False}
    leaves = httpx.Timeout(60, read=0.01)  # when the request is written; within 0.3 s a fast machine has answered
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=plain, timeout=leaves, headers={"X-Request-ID": "ab" * 8}, trust_env=False)
    wait_until(lambda: any(event.get("id") == "ab" * 8 for event in server.events()))
    assert next(event for event in server.events() if event.get("id") == "ab" * 8)["status"] == 499
    assert server.chat("where?", max_tokens=1).status_code == 200


def test_an_id_is_the_clients_where_it_is_a_number(server):
    for given, kept in (("0123456789abcdef", True), (SECRET, False), ("a b", False), ("1" * 65, False), ('"}\\n{"x', False)):
        found = server.client.get("/health", headers={"X-Request-ID": given}).headers["x-request-id"]
        assert (found == given) == kept
        assert found.isalnum()


def test_nothing_of_a_patient_is_logged(server):
    """In question, image, header, path, query, names of fields and files: nothing of them reaches the log, nor an answer that failed."""
    image = dicom_file(np.zeros((4, 4), np.uint8), PatientName=SECRET, PatientID=SECRET, Modality="OT")
    broken = dicom_file(np.zeros((4, 4), np.uint8), PatientName=SECRET, PatientBirthDate=SECRET, Rows=9999)
    odd = dicom_file(np.zeros((4, 4), np.uint8), WindowCenter="1", WindowWidth="2").replace(b"DS\x02\x001 ", b"DS\x02\x00zz")
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as by_hand:
        for data in (image, broken, odd, SECRET.encode(), zlib.compress(SECRET.encode() * 99)):
            for text in (SECRET, f"[refer] {SECRET}", f"[{SECRET}] x"):
                by_hand.post("/v1/chat/completions", json=body(text, url(data, "application/dicom"), max_tokens=2))
        by_hand.post("/v1/chat/completions", json={SECRET: 1, "messages": [{"role": SECRET}]})
        by_hand.post("/v1/chat/completions", json=body("x", f"https://{SECRET}.example/{SECRET}"), headers={"X-Request-ID": SECRET})
        by_hand.request(SECRET.upper(), f"/v1/{SECRET}?name={SECRET}", headers={SECRET: SECRET, "Authorization": f"Bearer {SECRET}"})
        by_hand.get(f"/{SECRET}")
    text = server.log.read_text().casefold()
    assert SECRET.casefold() not in text
    assert "traceback" not in text
    assert "data:" not in text
    allowed = {"time", "event", "id", "method", "route", "status", "ms", "bytes", "task", "stream", "image", "tokens", "batch", "tries"}
    allowed |= {"outcome", "pid", "device"}
    assert {name for event in server.events() for name in event} <= allowed


def test_bombs_are_refused_and_nothing_grows(server):
    server.chat("warm", url(png()), max_tokens=1)
    worker, before = server.worker(), server.metric("unimed_worker_resident_memory_bytes")
    for name, (data, fields) in attacks.bombs().items():
        found = server.chat("what?", url(data, "application/octet-stream"), max_tokens=1, **fields)
        assert found.status_code == 400, (name, found.text)
        assert found.json()["error"]["message"], name
    assert server.metric("unimed_worker_resident_memory_bytes") < before + 100e6
    assert server.worker() == worker


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.full)])
def test_fuzzed_requests_are_4xx(server, count):
    worker, ours = server.worker(), len(server.events())
    for seed in range(count):
        start = time.monotonic()
        status = attacks.attack(server, seed)
        assert status == 200 or 400 <= status < 500, seed
        assert time.monotonic() - start < 20, seed
    assert server.worker() == worker
    assert not [event for event in server.events()[ours:] if "error" in event or event["event"] != "request"]
    assert "Traceback" not in server.log.read_text()


def test_metrics_are_those_of_prometheus(server):
    parser = pytest.importorskip("prometheus_client.parser")
    assert server.chat("where?", max_tokens=1).status_code == 200
    families = {family.name: family for family in parser.text_string_to_metric_families(server.client.get("/metrics").text)}
    for name in ("unimed_requests", "unimed_request_seconds", "unimed_batch_size", "unimed_tokens", "unimed_worker_up"):
        assert families[name].samples
    labels = {sample.labels["route"] for sample in families["unimed_requests"].samples}
    assert labels <= {"/health", "/ready", "/metrics", "/v1/models", "/v1/chat/completions", "other"}
    assert server.metric("unimed_worker_resident_memory_bytes") > 1e8


def test_a_soak_loses_nothing_that_was_accepted(server, session):
    """120 requests of 16 clients while the worker is killed twice; `soak.py` by itself does 10,000. Then the server is told to end."""
    count, kills = 120, 2
    questions = [Question(session, seed) for seed in range(16)]
    made = Soak(server, questions, count, kills).run()
    assert made.wrong == []
    assert made.outcomes.total() == count
    assert made.outcomes["stream broken off by a kill"] <= kills * 16
    assert made.outcomes["refused with a reason"] > 0
    assert server.metric("unimed_worker_restarts_total") == kills
    assert server.metric("unimed_batch_size_sum") / server.metric("unimed_batch_size_count") > 1.5
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(server.chat, f"question {number}", url(png(number)), max_tokens=60) for number in range(6)]
        wait_until(lambda: server.metric("unimed_requests_open") >= 4)
        assert server.stop() == 0  # what it has accepted is answered before it ends
        assert [one.result().status_code for one in asked] == [200] * 6


def test_it_wrote_nothing(server, run):
    """The last test of the server, and so for all of them."""
    assert list(server.scratch.iterdir()) == []
    assert {path.name for path in server.log.parent.iterdir()} == {"log", "scratch"}
    assert {path.name for path in run.parent.iterdir()} == {"tiny"}
    assert [path.name for path in run.iterdir()] == ["model"]
