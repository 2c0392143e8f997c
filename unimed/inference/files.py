"""The files of a run's folder that a model is loaded with."""

import hashlib
from pathlib import Path

from unimed import io
from unimed.errors import UserError

RECIPE_FILE, RUN_FILE, MODEL_FOLDER = "recipe.yaml", "run.json", "model"


def model_in(run: Path) -> Path:
    """The folder of the model in a run; `run` where it is that folder."""
    folder = run / MODEL_FOLDER if (run / MODEL_FOLDER).is_dir() else run
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{run}: no trained model there (looked for {MODEL_FOLDER}/config.json); train one with: unimed train tiny")
    return folder


def require_run(folder: Path) -> None:
    """The folder must be that of a run."""
    if not (folder / RECIPE_FILE).is_file():
        raise UserError(f"{folder}: not a run of unimed (no {RECIPE_FILE}); train one with: unimed train tiny")


def fingerprint(model: Path) -> str:
    """Changes with a saved model: by its manifest, which holds a hash of every file, or by sizes and times where there is none."""
    manifest = model / io.MANIFEST
    if manifest.is_file():
        return io.sha256(manifest)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    listed = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(listed).encode()).hexdigest()
