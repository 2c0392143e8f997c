"""A run's folder: the names of its files, how it is made, and when it may be gone on with."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from unimed import io
from unimed.errors import UserError
from unimed.inference.files import MODEL_FOLDER, RECIPE_FILE, RUN_FILE
from unimed.train import recipe as recipes
from unimed.train.recipe import Recipe

PARTIAL = re.compile(r"\.(recipe\.yaml|(start|router|run)\.json|(metrics|probe)\.jsonl|checkpoint|checkpoint-\d+|base|domains|model)\.")


class Run:
    """runs/NAME/: recipe.yaml  start.json  metrics.jsonl  router.json  run.json  checkpoint-STEP/  base/ (with LoRA)  model/

    probe.jsonl: with train.probe_every, how the tasks pull at the weights.
    domains/: the router of stage 2 of Med-MoE, and the domain of each expert.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe, self.record, self.model = (self.path / name for name in (RECIPE_FILE, RUN_FILE, MODEL_FOLDER))
        self.start, self.log, self.router = (self.path / name for name in ("start.json", "metrics.jsonl", "router.json"))
        self.base, self.domains, self.probe = self.path / "base", self.path / "domains", self.path / "probe.jsonl"

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path for path in self.path.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    @contextmanager
    def writing(self, target: Path) -> Iterator[None]:
        """A full disk or a folder that takes no files is a UserError that says which checkpoint is whole."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
            if isinstance(error, RuntimeError) and "writ" not in str(error):
                raise
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            last = self.checkpoints()[-1:]
            whole = f"the checkpoint before it, {last[0].name}, is whole" if last else "there is no checkpoint before it"
            raise UserError(f"{target}: not written ({reason}); {whole}: free space or repair the folder, then --resume") from error

    @property
    def _replaced(self) -> Path:
        return self.path.with_name(f".{self.path.name}.replaced")

    def create(self, recipe: Recipe, start: dict[str, Any], overwrite: bool = False) -> None:
        """Makes the folder; one that exists is an error, or with `overwrite` replaced if it is a run: see `replaced` and `restore`."""
        self.require_free(overwrite)
        if self.recipe.exists():
            if self._replaced.exists():  # an earlier start was killed before it had a model: that run is the one to keep
                shutil.rmtree(self.path)
            else:
                self.path.rename(self._replaced)
        self._clear()
        io.write_json(self.start, start)
        io.write_text(self.recipe, recipes.dump(recipe))  # last: it makes the folder a run

    def replaced(self) -> None:
        """The new run can start: the one that it replaces goes."""
        shutil.rmtree(self._replaced, ignore_errors=True)

    def restore(self) -> None:
        """The new run can't start: the one that it would have replaced comes back."""
        if self._replaced.exists():
            shutil.rmtree(self.path, ignore_errors=True)
            self._replaced.rename(self.path)

    def require_free(self, overwrite: bool = False) -> None:
        """The folder is not there, or may be replaced."""
        if self.recipe.exists():
            if not overwrite:
                raise UserError(
                    f"{self.path}: this run exists; go on with --resume, start it again with --overwrite, or choose another --name"
                )
        elif self.path.exists() and (not self.path.is_dir() or any(path != self.start for path in self._others())):
            raise UserError(f"{self.path}: exists and is not a run of unimed; choose another --name")

    def resume(self, recipe: Recipe, start: dict[str, Any]) -> Path | None:
        """The last checkpoint, whose files are as they were written; None if there is no checkpoint yet.

        Raises:
            UserError: going on with this recipe, data or number of processes would not be the run that was started.
        """
        self._require_same(recipe, start)
        self._clear()
        last = self.checkpoints()[-1:]
        for checkpoint in last:
            io.verify_folder(checkpoint)
        if not last:  # every step will be logged again
            for path in (self.log, self.router):
                path.unlink(missing_ok=True)
        io.write_text(self.recipe, recipes.dump(recipe))
        return last[0] if last else None

    def _partials(self) -> list[Path]:
        """What a killed run was writing: hidden, beside the names that they would have taken."""
        return [path for path in self.path.glob(".*") if PARTIAL.match(path.name)]

    def _others(self) -> set[Path]:
        return set(self.path.iterdir()) - set(self._partials())

    def _clear(self) -> None:
        for path in self._partials():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _require_same(self, recipe: Recipe, start: dict[str, Any]) -> None:
        stored = self.stored_recipe()
        for key in recipes.dotted_keys():
            new, old = recipes.learned(recipe, key), recipes.learned(stored, key)
            if new != old and not recipes.harmless(key) and key != "train.accumulate":
                what = f"cannot resume with {key}={new!r}: the run was started with {old!r}"
                raise UserError(f"{self.path}: {what}; keep that, or use another --name")
        # A step holds the same batches where processes x train.accumulate is the same.
        started = self.started_with()
        was = (started.get("processes", start["processes"]), stored.train.accumulate)
        now = (start["processes"], recipe.train.accumulate)
        if was[0] * was[1] != now[0] * now[1]:
            what = f"cannot resume with {_processes(*now)}: the run was started with {_processes(*was)}"
            raise UserError(f"{self.path}: {what}; use torchrun --nproc-per-node {was[0]}, or keep the product of the two numbers")
        if started.get("examples_sha256", start["examples_sha256"]) != start["examples_sha256"]:
            before, here = started["examples"], start["examples"]
            changed = f"{here} training items in {recipe.data.where}, the run was started with {before}"
            what = changed if here != before else "the items changed"
            raise UserError(f"{self.path}: cannot resume with other data: {what}; use another --name")

    def stored_recipe(self, overrides: list[str] | None = None) -> Recipe:
        """The recipe that the run was started with, with overrides."""
        if not self.recipe.is_file():
            raise UserError(f"{self.path}: nothing to resume: no {RECIPE_FILE} there; leave out --resume to start")
        return recipes.load(self.recipe, overrides, stay=True)

    def started_with(self) -> dict[str, Any]:
        """The command, number of processes and items of the start; {} for a run of an earlier version."""
        return io.read_json(self.start) if self.start.is_file() else {}


def _processes(number: int, accumulate: int) -> str:
    return f"{number} {'process' if number == 1 else 'processes'} and train.accumulate={accumulate}"
