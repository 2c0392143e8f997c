"""The files of deploy/ keep what docs/unimed/serve.md says of them. Docker itself is not needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


def test_the_image_runs_without_root_on_a_read_only_file_system():
    last = DOCKERFILE[DOCKERFILE.rindex("FROM ") :]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert "HEALTHCHECK" in last
    assert '"--api-key-file"' in last
    assert "g++" not in last
    for service in COMPOSE["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_what_the_image_copies_is_there():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    context = (ROOT / "deploy" / COMPOSE["services"]["unimed"]["build"]["context"]).resolve()
    assert (context / COMPOSE["services"]["unimed"]["build"]["dockerfile"]).read_text() == DOCKERFILE


def test_prometheus_scrapes_the_service_with_the_key():
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["unimed:8000"]
    [secret] = COMPOSE["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert f"/run/secrets/{secret}" in DOCKERFILE


def test_options_of_the_entry_point_exist():
    from typer.testing import CliRunner

    from unimed.cli import app as cli

    [line] = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    words = yaml.safe_load(line)
    assert words[:2] == ["unimed", "serve"]
    shown = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for option in (word for word in words if word.startswith("--")):
        assert option in shown


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing():
    subprocess.run(["hadolint", str(ROOT / "deploy" / "Dockerfile")], check=True)


@pytest.mark.full
def test_two_replicas_of_ray_serve(tmp_path):
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    import ray_replicas

    ray_replicas.check(tmp_path)
