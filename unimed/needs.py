"""The weights and data sets that a recipe reads from folders which a user brings, and where each comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unimed.datasets import DATASETS
from unimed.models.published import published
from unimed.train.recipe import Recipe


@dataclass(frozen=True)
class Need:
    """`key`: of the recipe. `how`: the way into the folder."""

    key: str
    folder: Path
    title: str
    found: bool
    where: str
    licence: str
    how: str


def needs(recipe: Recipe, checkpoints: Path | None = None, data: Path | None = None) -> Iterator[Need]:
    """Published weights and data sets of a recipe. `checkpoints` and `data`: look there in place of the recipe's own parent folders."""
    for name in ("vision", "language"):
        source = getattr(recipe, name).source
        if known := published(source):
            folder = checkpoints / Path(source).name if checkpoints else Path(source)
            found = source == known.hub or ((folder / "config.json").is_file() and any(folder.glob("*.safetensors")))
            yield Need(
                f"{name}.from", folder, f"{known.title}, {known.size}", found, known.where, known.licence, known.how.format(folder=folder)
            )
    for name, one in recipe.data.sets.items():
        folder = data / Path(one.root).name if data else Path(one.root)
        if spec := DATASETS.get(one.layout):
            found = folder.is_dir() and spec.matches(folder)
            yield Need(f"data.sets.{name}", folder, spec.title or name, found, spec.where, spec.licence, f"a folder of {spec.files}")


def missing_weights(recipe: Recipe) -> str:
    """The recipe's published weights that are not there, with the command for each; "" if all are."""
    absent = [need for need in needs(recipe) if need.key.endswith(".from") and not need.found]
    return "; ".join(f"{need.key}={need.folder} is missing ({need.how})" for need in absent)
