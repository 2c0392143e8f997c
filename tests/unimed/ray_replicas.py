"""deploy/ray_serve.py with two replicas on this machine: `python tests/unimed/ray_replicas.py`."""

import concurrent.futures
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from serving import body, httpx, png, save_model, url  # noqa: E402


def check(folder: Path) -> dict[str, int]:
    """Answers equal the Session's, and both replicas give some; how many each gave."""
    import ray
    from ray import serve

    import unimed

    run = save_model(folder / "runs" / "tiny")
    session = unimed.load(run, device="cpu")
    tests, deploy = str(Path(__file__).parent), str(ROOT / "deploy")
    os.environ |= {"UNIMED_MODEL": str(run), "UNIMED_REPLICAS": "2", "UNIMED_CPUS": "0.5", "RAY_USAGE_STATS_ENABLED": "0"}
    sys.path.insert(0, deploy)
    import ray_serve

    variables = {name: os.environ[name] for name in ("UNIMED_MODEL", "UNIMED_REPLICAS", "UNIMED_CPUS")}
    path = os.pathsep.join([str(ROOT), tests, deploy])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {**variables, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8765})
        serve.run(ray_serve.app, name="unimed")
        with httpx.Client(base_url="http://127.0.0.1:8765", timeout=120, trust_env=False) as client:
            end, ready = time.monotonic() + 240, 0
            while ready < 10:  # in a row: of both
                ready = ready + 1 if client.get("/ready").status_code == 200 else 0
                assert time.monotonic() < end
                time.sleep(0.1)

            def ask(number: int) -> None:
                found = client.post("/v1/chat/completions", json=body(f"question {number}", url(png(number)), max_tokens=12))
                answer = session.answer(png(number), f"question {number}", max_new_tokens=12)
                assert found.json()["choices"][0]["message"]["content"] == answer.text

            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                list(pool.map(ask, range(40)))
            given: dict[str, int] = {}
            for _ in range(40):
                text = client.get("/metrics").text
                start = next(line for line in text.splitlines() if line.startswith("process_start_time_seconds "))
                asked = next(line for line in text.splitlines() if line.startswith("unimed_batch_size_sum "))
                given[start.split()[1]] = int(float(asked.split()[1]))
            streamed = client.post("/v1/chat/completions", json=body("where?", stream=True, max_tokens=4)).text
        assert streamed.endswith("data: [DONE]\n\n")
        assert len(given) == 2
        assert all(given.values())
        assert sum(given.values()) == 40
        return given
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print("answered by each replica:", *check(Path(made)).values())
