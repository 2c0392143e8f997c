"""Recipes: one YAML file a run, checked key by key against the sections below.

A recipe file only holds what differs from the defaults here. Command-line overrides are dotted
(`train.max_steps=50`). Every wrong key or value is one line that names it, says what is valid, and offers the nearest keys.
"""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, ValidationError, field_validator, model_validator

from unimed.datasets.load import SPLIT
from unimed.datasets.spec import DATASETS
from unimed.errors import UserError
from unimed.inference.files import RECIPE_FILE
from unimed.models.spec import Amount, Count, ModelSpec, Natural, Section, Share, Whole, from_scratch
from unimed.tasks import RELEASED_TASKS, TASKS
from unimed.tasks.protocol import ProtocolName
from unimed.train.faults import must, nearest_keys

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
SET_KEY = rf"data\.sets\.{NAME}\."
# Keys of earlier versions.
REMOVED = {"data.cache_images": "data.cache_mb", "language.kind": "language.from", "lora": "language.lora"}
HARMLESS: Any = {"harmless": True}  # a run may be resumed with another value of the field: it does not change what is learned
Beta = Annotated[float, Field(ge=0, lt=1)]


class DataSet(Section):
    """One data set of `data.sets`: a folder, its layout, its share of each task beside the other sets, and its own names of splits."""

    root: str = ""
    layout: str = "records"
    ratio: Amount = 1.0
    splits: dict[str, str] = Field(default_factory=dict)


class Data(Section):
    root: str = Field(".cache/unimed/sample", json_schema_extra=HARMLESS)  # "": data.sets only
    sets: dict[str, DataSet] = Field(default_factory=dict)
    tasks: list[str] = Field(default_factory=lambda: list(RELEASED_TASKS))
    cache_mb: Natural = Field(2048, json_schema_extra=HARMLESS)  # memory for decoded training images, shared by the workers
    workers: Natural = Field(0, json_schema_extra=HARMLESS)  # processes that prepare batches; 0: the training process itself
    # The first bad record is an error; else bad records are left out, counted and named in one line.
    strict: bool = Field(False, json_schema_extra=HARMLESS)
    languages: list[str] = Field(default_factory=lambda: ["en"])  # of the questions, where a data set has several (SLAKE: en, zh)
    protocol: ProtocolName = "released"  # released: texts end after 50 words, without MedQA's options or abstracts
    links: bool = Field(True, json_schema_extra=HARMLESS)  # symbolic links in the data's folder are followed

    @property
    def where(self) -> str:
        """The folders, in a few words."""
        return ", ".join([*([self.root] if self.root else []), *(f"{name} ({one.root})" for name, one in self.sets.items())])

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if task not in TASKS:
                raise UserError(f"data.tasks: no task {task!r}; valid are {', '.join(TASKS)}")
        return tasks

    @field_validator("sets")
    @classmethod
    def _sets(cls, sets: dict[str, DataSet]) -> dict[str, DataSet]:
        for name, one in list(sets.items()):
            if not re.fullmatch(NAME, name):
                raise UserError(
                    f"data.sets: {name!r} is no name of a data set: letters, digits, '_' and '-' only, and a letter or digit first"
                )
            if not one.root and one.layout in DATASETS and DATASETS[one.layout].root:
                sets[name] = one = one.model_copy(update={"root": DATASETS[one.layout].root})
            if not one.root:
                raise UserError(f"data.sets.{name}.root: which folder? Give data.sets.{name}.root=FOLDER")
            for split in one.splits.values():
                if not SPLIT.fullmatch(split):
                    raise UserError(f"data.sets.{name}.splits: {split!r} is no name of a split")
        return sets


class Augment(Section):
    """Random views of a training image; boxes move along. Nothing is mirrored: side is a label."""

    zoom: Share = 0.0  # the window's side is drawn from [1 - zoom, 1 + zoom] of the image's
    shift: Share = 0.0  # and its centre moves by up to this share of the side
    brightness: Share = 0.0
    contrast: Share = 0.0
    noise: Share = 0.0


class Sampler(Section):
    """`homogeneous`: each step draws one source by ratio (as released). `mixed`: each sample does.

    A source is a task (`vqa`) or one dataset's share of it (`slake/vqa`).
    """

    mode: Literal["homogeneous", "mixed"] = "mixed"
    ratios: dict[str, Amount] = Field(default_factory=lambda: dict.fromkeys(RELEASED_TASKS, 1.0))

    @field_validator("ratios")
    @classmethod
    def _ratios(cls, ratios: dict[str, float]) -> dict[str, float]:
        for source in ratios:
            if source.rpartition("/")[2] not in TASKS:
                raise UserError(f"sampler.ratios.{source}: no such task; valid are {', '.join(TASKS)}, or dataset/task")
        if not any(ratios.values()):
            raise UserError("sampler.ratios: at least one ratio must be above zero")
        return ratios


class Optim(Section):
    lr: Amount = 1e-3
    warmup_lr: Amount = 1e-6
    min_lr: Amount = 1e-5
    warmup_steps: Natural = 50
    schedule: Literal["continuous", "released"] = "continuous"
    betas: list[Beta] = Field(default_factory=lambda: [0.9, 0.999], min_length=2, max_length=2)
    weight_decay: Amount = 0.05
    no_decay: list[str] = Field(default_factory=lambda: ["bias", "norm"])  # and every tensor with fewer than two axes
    clip: Amount = 1.0  # largest gradient norm; 0 turns clipping off


class Train(Section):
    max_steps: Count = 500
    batch_size: Count = 16
    accumulate: Count = 1
    seed: Whole = Field(42, ge=0, le=2**32 - 1)  # NumPy takes no larger seed
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = Field(False, json_schema_extra=HARMLESS)
    log_every: Count = Field(10, json_schema_extra=HARMLESS)
    save_every: Count = Field(200, json_schema_extra=HARMLESS)
    keep: Count = Field(2, json_schema_extra=HARMLESS)  # checkpoints kept
    probe_every: Natural = Field(0, json_schema_extra=HARMLESS)  # steps between two points of `train.probe`; 0: none
    threads: Natural = Field(0, json_schema_extra=HARMLESS)  # 0: as many as PyTorch chooses
    # Where the log also goes, beside metrics.jsonl.
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list, json_schema_extra=HARMLESS)

    @field_validator("report_to", mode="before")
    @classmethod
    def _one(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names


class Evaluate(Section):
    splits: list[str] = Field(default_factory=lambda: ["slab", "subject"], json_schema_extra=HARMLESS)  # any that the data has
    batch_size: Count = Field(40, json_schema_extra=HARMLESS)
    max_new_tokens: Count = Field(100, json_schema_extra=HARMLESS)
    limit: Natural = Field(0, json_schema_extra=HARMLESS)  # items a task and split, evenly spaced; 0: all
    clinical: dict[str, str] = Field({}, json_schema_extra=HARMLESS)  # scorers of reports and the paths of their weights

    @field_validator("splits")
    @classmethod
    def _splits(cls, splits: list[str]) -> list[str]:
        for split in splits:
            if not SPLIT.fullmatch(split):
                raise UserError(f"evaluate.splits: {split!r} is no name of a split; slab, subject, val and test are some")
        return splits


class MedMoE(Section):
    """Med-MoE's three stages: 1 trains the connector, 2 the language model too and then the router, 3 the experts and the meta expert.

    A tower that is not frozen trains in stages 1 and 2. `domains`: of each expert, in their order, which items are its own, as patterns of
    DATASET/PATIENT/TASK; the first domain that fits an item has it. The settings of `upcycle` hold for the router of stage 2, too.

    `router`, of stage 3: "frozen" is the one that stage 2 trained on domains, "learned" starts at random and trains with the experts.
    `dense`: stage 3 trains the FFNs of those layers as they are; for comparison.
    """

    stage: Literal[1, 2, 3] = 1
    domains: dict[str, list[str]] = Field(min_length=1)
    layers: Literal["every_other", "all"] | list[Natural] = "every_other"
    top_k: Count = 1
    meta: bool = True
    scale: Literal["released", "preserve"] = "released"
    released: bool = False
    router: Literal["frozen", "learned"] = "frozen"
    dense: bool = False
    router_layers: Literal[1, 2] = 1
    router_samples: Count = 1000
    router_steps: Count = 500
    router_lr: Amount = 1e-3

    @property
    def upcycling(self) -> dict[str, Any]:
        """What `upcycle` is given."""
        names = ("layers", "top_k", "meta", "scale", "released", "router", "router_layers")
        return {"num_experts": len(self.domains)} | {name: getattr(self, name) for name in names}

    @model_validator(mode="after")
    def _experts(self) -> MedMoE:
        if self.top_k > len(self.domains):
            raise UserError(f"medmoe.top_k={self.top_k}: must be at most {len(self.domains)} (medmoe.domains, an expert each)")
        return self


class Recipe(ModelSpec):
    name: str = Field("run", json_schema_extra=HARMLESS)
    description: str = Field("", json_schema_extra=HARMLESS)
    source: str = Field("", alias="from")  # the run whose model is the start: of stages 2 and 3
    medmoe: MedMoE | None = None
    data: Data = Field(default_factory=Data)
    augment: Augment = Field(default_factory=Augment)
    sampler: Sampler = Field(default_factory=Sampler)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    evaluate: Evaluate = Field(default_factory=Evaluate)

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(f"name={name!r}: it names a folder: letters, digits, '.', '_' and '-' only, and a letter or digit first")
        return name

    @model_validator(mode="after")
    def _stage(self) -> Recipe:
        stage = self.medmoe.stage if self.medmoe else None
        if self.source and stage in (None, 1):
            raise UserError(f"from={self.source!r}: only medmoe.stage 2 and 3 start from a run; a part has its own from")
        if stage in (2, 3) and not self.source:
            raise UserError(f"from='': medmoe.stage={stage} starts from a run of stage {stage - 1}; give from=runs/NAME")
        if stage and (self.lora or self.language.freeze or self.connector.freeze):
            raise UserError("medmoe.stage: says what trains; leave out lora, language.freeze and connector.freeze")
        return self

    @model_validator(mode="after")
    def _steps(self) -> Recipe:
        if self.train.save_every % self.train.log_every:  # a checkpoint holds the log up to its own step
            raise UserError(f"train.save_every={self.train.save_every}: must be a multiple of {self.train.log_every} (train.log_every)")
        return self


def load(source: str | Path, overrides: list[str] | None = None, stay: bool = False) -> Recipe:
    """The recipe called `source` (a name in unimed/recipes, or a path to a YAML file) with dotted overrides.

    Data sets that overrides name take the place of the recipe's; with `stay` the others stay.
    """
    path = find(str(source))
    raw = _read(path)
    raw.setdefault("name", path.stem)
    values = dict(_override(text) for text in overrides or [])
    _choose_data(raw, values, stay)
    _take_over(raw, values)
    _choose_parts(raw, values)
    for key, given in values.items():
        _put(raw, key, given)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(_one_line(error, path, values)) from error


def find(source: str) -> Path:
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    path = RECIPES / f"{source}.yaml" if source in names else Path(source)
    if not path.is_file():
        raise UserError(f"recipe {source!r}: neither a file nor one of {', '.join(names)}")
    return path


def dump(recipe: Recipe) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(by_alias=True)))


def flat(section: Section, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a section with its value."""
    found: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        # A part that may be absent (LoRA) is one value.
        inner = isinstance(value, Section) and info.annotation is type(value)
        found |= flat(value, f"{prefix}{name}.") if inner else {prefix + (info.alias or name): value}
    return found


@functools.cache
def defaults() -> dict[str, Any]:
    """Every dotted key a recipe has, and its default."""
    return flat(Recipe())


def dotted_keys() -> list[str]:
    """Every dotted key a recipe has."""
    return list(defaults())


def harmless(key: str) -> bool:
    """Whether a run may be resumed with another value of this key."""
    section, _, name = key.rpartition(".")
    owner: Any = Recipe
    for part in section.split(".") if section else []:
        owner = owner.model_fields[part].annotation
    info = next(info for field, info in owner.model_fields.items() if name in (field, info.alias))
    return info.json_schema_extra is HARMLESS


def learned(recipe: Recipe, key: str) -> Any:
    """What a recipe says under a dotted key, without what does not change what is learned: where the folder of a data set lies."""
    if key == "data.sets":
        return {name: (one.layout, one.ratio, one.splits) for name, one in recipe.data.sets.items()}
    return flat(recipe)[key]


def _read(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # PyYAML, OmegaConf and the file system each have their own
        raise UserError(f"recipe {path}: not readable as YAML ({_first_line(error)})") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"recipe {path}: must be a mapping of sections such as `train:`, it is a {type(config).__name__}")
    raw = {str(key): value for key, value in OmegaConf.to_container(config).items()}  # type: ignore[union-attr]
    data, language, lora = raw.get("data"), raw.get("language"), raw.pop("lora", None)
    raw.pop("cannot_run", None)  # runs of earlier versions
    if isinstance(data, dict) and "cache_images" in data:
        del data["cache_images"]
        warnings.warn(f"recipe {path}: data.cache_images is no longer read; use data.cache_mb", stacklevel=3)
    if isinstance(language, dict) and (kind := language.pop("kind", None)):  # runs of earlier versions
        language["from"] = {"tiny": "llama"}.get(kind, kind)
        if kind != "tiny":
            for size in ("width", "layers", "heads", "mlp_width", "vocab_size"):
                language.pop(size, None)
    if isinstance(lora, dict) and lora.pop("enabled", False):
        raw.setdefault("language", {})["lora"] = lora
    return raw


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"override {text!r}: write it as key=value, for example train.max_steps=50")
    if _kind(key) is not str or (value[:1] in ("'", '"') and value[-1:] == value[:1]):  # else a name or a path: 007 is no number there
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index, call-overload]
        except Exception as error:
            raise UserError(f"override {text!r}: the value is not readable ({_first_line(error)})") from error
    for old, new in REMOVED.items():
        if key == old or key.startswith(f"{old}."):
            raise UserError(f"override: {key}={value!r} is no longer read; use {new}")
    if inside := [known for known in dotted_keys() if known.startswith(f"{key}.")]:
        raise UserError(f"override: {key}={value!r} is a section, not a value; its keys are {', '.join(inside)}")
    if key.startswith("data.sets") and not re.match(SET_KEY + ".", key):
        keys = ", ".join(DataSet.model_fields)
        raise UserError(f"override: {key}={value!r}: write data.sets.NAME.root=FOLDER; a set has the keys {keys}")
    return key, value


def _kind(key: str) -> Any:
    """The type of a dotted key's value; None for an unknown key."""
    kind: Any = Recipe
    for part in key.split("."):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        kind = next((one for one in get_args(kind) if isinstance(one, type) and issubclass(one, Section)), kind)  # of X | None
        if isinstance(kind, type) and issubclass(kind, Section):
            kind = next((info.annotation for name, info in kind.model_fields.items() if part in (name, info.alias)), None)
        else:
            return None
    return kind


def _choose_data(raw: dict[str, Any], values: dict[str, Any], stay: bool) -> None:
    """Data that the command line names takes the place of the recipe's own; with `stay` only that which has the same name."""
    data = raw.setdefault("data", {})
    if not isinstance(data, dict):
        return
    sets = {key.split(".")[2] for key in values if re.match(SET_KEY, key)}
    if isinstance(data.get("sets"), dict) and not (stay and sets):
        kept = {name: one for name, one in data["sets"].items() if name in sets} if sets else {} if "data.root" in values else data["sets"]
        data["sets"] = kept
    if sets:
        data["root"] = ""
    elif data.get("sets"):
        data.setdefault("root", "")


def _take_over(raw: dict[str, Any], values: dict[str, Any]) -> None:
    """A recipe that starts from a run and names no part of the model has that run's parts, and its settings of Med-MoE."""
    source = values.get("from", raw.get("from"))
    if not source or not isinstance(source, str) or any(part in raw for part in ModelSpec.model_fields):
        return
    before = Path(source) / RECIPE_FILE
    if not before.is_file():
        raise UserError(f"from={source!r}: no run is there (no {RECIPE_FILE}); train that stage first, or give from=runs/NAME")
    stored = _read(before)
    raw |= {part: stored.get(part) or {} for part in ModelSpec.model_fields}
    old, own = stored.get("medmoe"), raw.get("medmoe")
    if isinstance(old, dict) and isinstance(own, dict):
        raw["medmoe"] = old | own


def _choose_parts(raw: dict[str, Any], values: dict[str, Any]) -> None:
    """A tower or language model that the command line names does not take the sizes of the recipe's own."""
    for part in ("vision", "language"):
        source, own = values.get(f"{part}.from"), raw.get(part)
        if isinstance(source, str) and isinstance(own, dict):
            kept = {"freeze", "dtype", "lora"}
            raw[part] = own if from_scratch(source) else {key: value for key, value in own.items() if key in kept}
            for key in ("archive", "config"):
                raw[part].pop(key, None)


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        inner = raw.get(section)
        raw[section] = raw = inner if isinstance(inner, dict) else {}
    raw[name] = value


def _one_line(error: ValidationError, path: Path, overridden: dict[str, Any]) -> str:
    """The first fault: where, which key and value, what would be right."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if part != "[key]"]
    key, given = ".".join(parts), first["input"]
    where = (
        "override" if any(key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.") for one in overridden) else f"recipe {path}"
    )
    keys = dotted_keys()
    if first["type"] == "extra_forbidden":
        if re.match(SET_KEY, key):
            keys += [f"{key.rpartition('.')[0]}.{name}" for name in DataSet.model_fields]
        return f"{where}: unknown key {key!r} (value {given!r}); nearest valid keys: {nearest_keys(key, keys)}"
    if inside := [known for known in keys if known.startswith(f"{key}.")]:
        return f"{where}: {key}={given!r} is a section, not a value; its keys are {', '.join(inside)}"
    default = f"; default: {defaults()[key]!r}" if key in defaults() else ""
    return f"{where}: {key}={given!r}: {must(first)}{default}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).strip()
