"""300 requests of 16 clients, two of which see their worker killed: nothing that was accepted is lost. `soak.py` by itself does 10,000."""

import concurrent.futures

import pytest
from serving import Server, png, save_model, url

import unimed

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from soak import Question, Soak


def test_nothing_accepted_is_lost(tmp_path):
    run = save_model(tmp_path / "runs" / "tiny")
    session = unimed.load(run, device="cpu")
    questions = [Question(session, seed) for seed in range(16)]
    with Server(run, tmp_path / "server") as server:
        made = Soak(server, questions, 300, kills=2).run()
        assert made.wrong == []
        assert made.outcomes.total() == 300
        assert made.outcomes["stream broken off by a kill"] <= 2 * 16
        assert made.outcomes["refused with a reason"] > 0
        assert server.metric("unimed_worker_restarts_total") == 2
        assert server.metric("unimed_batch_size_sum") / server.metric("unimed_batch_size_count") > 1.5
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(server.chat, f"question {number}", url(png(number)), max_tokens=60) for number in range(6)]
            while server.metric("unimed_requests_open") < 4:
                pass
            assert server.stop() == 0  # what it has accepted is answered before it ends
            assert [one.result().status_code for one in asked] == [200] * 6
