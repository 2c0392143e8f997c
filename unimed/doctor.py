"""Reports installed packages, the kernels in use, and which features lack a package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from unimed.notice import install

OPTIONAL = {
    "nibabel": "NIfTI volumes",
    "pydicom": "DICOM images",
    "matplotlib": "report.html",
    "nltk": "BLEU of short answers as released",
    "rouge": "ROUGE of reports as released",
    "sacrebleu": "BLEU",
    "rouge_score": "ROUGE",
    "gguf": "SmolLM2 and other GGUF files",
    "pyarrow": "training and evaluation",
    "gradio": "unimed page",
    "fastapi": "unimed serve",
}
EXTRAS = {"gguf": "smollm2", "gradio": "page", "fastapi": "serve"}  # of those that the extra unimed does not bring


def lines() -> Iterator[tuple[str, str]]:
    """(title, finding) pairs."""
    from cmoe_kernels.doctor import tested_versions
    from unimed.train import machine
    from unimed.train import recipe as recipes

    for name, text in machine.describe().items():
        yield name, text
    yield "versions", tested_versions()
    for name, purpose in OPTIONAL.items():
        yield name, "installed" if find_spec(name) else f"missing: needed for {purpose}; {install(EXTRAS.get(name, 'unimed'))}"
    bits = "installed" if find_spec("bitsandbytes") else "missing: needed for language.quantize; pip install bitsandbytes"
    yield "bitsandbytes", bits
    root = Path(recipes.Data().root)
    yield "java", "found: BLEU by the PTB tokenizer, METEOR" if which("java") else "none: BLEU by our tokenizer, no METEOR"
    yield "index", _index()
    yield "sample", f"{root} is there" if (root / "sample.json").is_file() else f"{root} is not built: unimed sample build"
    runs = sorted(path.parent.name for path in Path("runs").glob("*/recipe.yaml"))
    yield "runs", ", ".join(runs) or "none yet: unimed demo"


def full_size(checkpoints: Path | None = None, data: Path | None = None) -> Iterator[tuple[str, str]]:
    """(key, finding) pairs: what `unimed train unimed-7b-release` needs, found or missing, and where each piece comes from."""
    from unimed.needs import needs
    from unimed.train import recipe as recipes

    for need in needs(recipes.load("unimed-7b-release"), checkpoints, data):
        state = "found" if need.found else "missing"
        how = "" if need.found else f"; {need.how}"
        yield need.key, f"{state}: {need.folder}: {need.title}; from {need.where}; licence: {need.licence}{how}"


def _index() -> str:
    from unimed import io

    files = list((place := io.index_folder()).glob("*"))
    count, size = sum(file.suffix == ".json" for file in files), sum(file.stat().st_size for file in files)
    return f"{count} indexes of data sets, {size / 1e6:.1f} MB, in {place}: made again when it is deleted" if count else f"{place} is empty"
