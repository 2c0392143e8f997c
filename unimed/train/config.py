"""Recipes: one YAML file a run, checked key by key against the dataclasses below.

A recipe file only holds what differs from the defaults here. Command-line overrides are dotted
(`train.max_steps=50`). Every wrong key or value is one line that names it and the nearest valid keys.
"""

from __future__ import annotations

import difflib
import re
import warnings
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unimed.datasets.load import SPLIT
from unimed.errors import UserError
from unimed.tasks import RELEASED_TASKS, TASKS
from unimed.tasks.protocol import ProtocolName

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

# What a number may be, by section: at least one, at least zero, a share in [0, 1).
COUNTS = {
    "vision": "image_size patch_size width layers heads",
    "connector": "num_experts top_k resample_rate",
    "language": "width layers heads mlp_width vocab_size",
    "lora": "r",
    "train": "max_steps batch_size accumulate log_every save_every keep",
    "evaluate": "batch_size max_new_tokens",
}
AMOUNTS = {
    "data": "cache_mb workers",
    "optim": "lr warmup_lr min_lr warmup_steps weight_decay clip",
    "train": "threads",
    "evaluate": "limit",
}
SHARES = {"augment": "zoom shift brightness contrast noise", "lora": "dropout"}
SEEDS = 2**32  # NumPy takes no larger seed

# A run may be resumed with other values of these: they do not change what is learned.
HARMLESS = {
    "": "name description",
    "data.": "root strict links cache_mb workers",
    "train.": "gradient_checkpointing log_every save_every keep threads",
    "evaluate.": "splits batch_size max_new_tokens limit",
}
SET_KEY = r"data\.sets\.[A-Za-z0-9][A-Za-z0-9_-]*\."
# Keys of earlier versions: left out of a file with a warning.
REMOVED = {"data.cache_images": "data.cache_mb"}
# The language models that can be trained, and the keys of `language` that each one reads.
LANGUAGES = {"tiny": ("width", "layers", "heads", "mlp_width", "vocab_size"), "smollm2": ("archive",)}


@dataclass
class DataSet:
    """One data set of `data.sets`: a folder, its layout, its share of each task beside the other sets, and its own names of splits."""

    root: str = ""
    layout: str = "records"
    ratio: float = 1.0
    splits: dict[str, str] = field(default_factory=dict)


@dataclass
class Data:
    root: str = ".cache/unimed/sample"  # "": data.sets only
    sets: dict[str, DataSet] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=lambda: list(RELEASED_TASKS))
    cache_mb: int = 2048  # memory for decoded training images, shared by the workers
    workers: int = 0  # processes that prepare batches; 0: the training process itself
    strict: bool = False  # the first bad record is an error; else bad records are left out, counted and named in one line
    languages: list[str] = field(default_factory=lambda: ["en"])  # of the questions, where a data set has several (SLAKE: en, zh)
    protocol: ProtocolName = "released"  # released: texts end after 50 words, without MedQA's options or abstracts
    links: bool = True  # symbolic links in the data's folder are followed

    @property
    def where(self) -> str:
        """The folders, in a few words."""
        return ", ".join([*([self.root] if self.root else []), *(f"{name} ({one.root})" for name, one in self.sets.items())])


@dataclass
class Augment:
    """Random views of a training image; boxes move along. Nothing is mirrored: side is a label."""

    zoom: float = 0.0  # the window's side is drawn from [1 - zoom, 1 + zoom] of the image's
    shift: float = 0.0  # and its centre moves by up to this share of the side
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0


@dataclass
class Vision:
    image_size: int = 96
    patch_size: int = 8
    width: int = 128
    layers: int = 4
    heads: int = 4
    freeze: bool = False


@dataclass
class Connector:
    """The fields of CMoEConfig that a recipe chooses; widths come from the vision and language sides."""

    num_experts: int = 5
    hidden_features: int | None = None
    expert: Literal["mlp", "linear"] = "mlp"
    router: Literal["soft", "sparse", "hard", "constant"] = "soft"
    router_inputs: Literal["task_token", "token", "task"] = "task_token"
    router_features: int | None = None
    task_features: int | None = None
    num_task_tokens: int = 1
    top_k: int = 2
    renormalize: bool = True
    resample: Literal["projection", "avgpool", "maxpool", "none"] = "projection"
    resample_rate: int = 4
    aux_losses: dict[str, float] = field(default_factory=dict)


@dataclass
class Language:
    kind: Literal["tiny", "smollm2", "llama2"] = "tiny"
    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp_width: int = 384
    vocab_size: int = 1024
    archive: str = ""  # a downloaded model archive or folder (smollm2)


@dataclass
class Lora:
    enabled: bool = False
    r: int = 8
    alpha: int = 16
    dropout: float = 0.05


@dataclass
class Sampler:
    """`homogeneous`: each step draws one source by ratio (as released). `mixed`: each sample does.

    A source is a task (`vqa`) or one dataset's share of it (`slake/vqa`).
    """

    mode: Literal["homogeneous", "mixed"] = "mixed"
    ratios: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RELEASED_TASKS, 1.0))


@dataclass
class Optim:
    lr: float = 1e-3
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    warmup_steps: int = 50
    schedule: Literal["continuous", "released"] = "continuous"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.05
    no_decay: list[str] = field(default_factory=lambda: ["bias", "norm"])  # and every tensor with fewer than two axes
    clip: float = 1.0  # largest gradient norm; 0 turns clipping off


@dataclass
class Train:
    max_steps: int = 500
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 42
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    log_every: int = 10
    save_every: int = 200
    keep: int = 2  # checkpoints kept
    threads: int = 0  # 0: as many as PyTorch chooses


@dataclass
class Evaluate:
    splits: list[str] = field(default_factory=lambda: ["slab", "subject"])  # any that the data has
    batch_size: int = 40
    max_new_tokens: int = 100
    limit: int = 0  # examples a task and split, evenly spaced; 0: all


@dataclass
class Recipe:
    name: str = "run"
    description: str = ""
    cannot_run: str = ""  # why this recipe is a record and not something that trains here
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    vision: Vision = field(default_factory=Vision)
    connector: Connector = field(default_factory=Connector)
    language: Language = field(default_factory=Language)
    lora: Lora = field(default_factory=Lora)
    sampler: Sampler = field(default_factory=Sampler)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)


def load(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe called `source` (a name in unimed/recipes, or a path to a YAML file) with dotted overrides."""
    path = find(str(source))
    try:
        raw = OmegaConf.load(path)
    except Exception as error:  # PyYAML, OmegaConf and the file system each have their own
        raise UserError(f"recipe {path}: not readable as YAML ({_first_line(error)})") from error
    if not isinstance(raw, DictConfig):
        raise UserError(f"recipe {path}: must be a mapping of sections such as `train:`, it is a {type(raw).__name__}")
    config = OmegaConf.structured(Recipe)
    config.name = path.stem
    named = [text.partition("=")[0].strip() for text in overrides or []]
    sets = {key.split(".")[2] for key in named if re.match(SET_KEY, key)}
    for key, value in _leaves(OmegaConf.to_container(raw), Recipe):
        if (sets and key == "data.root") or ("data.root" in named and not sets and key == "data.sets"):
            continue  # data that the command line names takes the place of the recipe's own
        if key == "data.sets" and isinstance(value, dict) and all(isinstance(one, dict) for one in value.values()):
            for name, one in value.items():
                if not sets or name in sets:
                    for part, given in one.items():
                        _set(config, f"data.sets.{name}.{part}", given, where=f"recipe {path}")
            continue
        if key in REMOVED:
            warnings.warn(f"recipe {path}: {key} is no longer read; use {REMOVED[key]}", stacklevel=2)
        else:
            _set(config, key, value, where=f"recipe {path}")
    if config.data.sets and "data.root" not in dict(_leaves(OmegaConf.to_container(raw), Recipe)):
        config.data.root = ""
    if sets:
        config.data.root = ""
    for text in overrides or []:
        key, equals, _ = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {text!r}: write it as key=value, for example train.max_steps=50")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist(["value=" + text.partition("=")[2]]))["value"]  # type: ignore[index, call-overload]
        except Exception as error:
            raise UserError(f"override {text!r}: the value is not readable ({_first_line(error)})") from error
        _set(config, key.strip(), value, where="override")
    recipe = OmegaConf.to_object(config)
    assert isinstance(recipe, Recipe)
    check(recipe)
    return recipe


def find(source: str) -> Path:
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    path = RECIPES / f"{source}.yaml" if source in names else Path(source)
    if not path.is_file():
        raise UserError(f"recipe {source!r}: neither a file nor one of {', '.join(names)}")
    return path


def dump(recipe: Recipe) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def dotted_keys(node: Any = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key a recipe has."""
    found: list[str] = []
    for item in fields(node):
        default = item.default_factory() if callable(item.default_factory) else item.default
        found += dotted_keys(default, f"{prefix}{item.name}.") if is_dataclass(default) else [prefix + item.name]
    return found


def nearest(key: str, candidates: list[str]) -> str:
    """Valid keys to offer for a wrong one: by the whole key, or by its last word alone."""
    last = {candidate: candidate.rpartition(".")[2] for candidate in candidates}
    tail = key.rpartition(".")[2]

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    similar = {candidate: max(ratio(key, candidate), ratio(tail, last[candidate])) for candidate in candidates}
    best = sorted((c for c in candidates if similar[c] >= 0.6 or tail in last[c]), key=lambda c: -similar[c])[:3]
    return ", ".join(best or sorted({c.partition(".")[0] for c in candidates}))


def check(recipe: Recipe) -> None:
    """What types cannot say: ranges, task names, sizes that must divide one another."""
    r = recipe
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", r.name):
        raise UserError(f"name={r.name!r}: it names a folder: letters, digits, '.', '_' and '-' only, and a letter or digit first")
    for source, ratio in r.sampler.ratios.items():
        if source.rpartition("/")[2] not in TASKS:
            raise UserError(f"sampler.ratios.{source}: no such task; valid are {', '.join(TASKS)}, or dataset/task")
        if not 0 <= ratio < float("inf"):
            raise UserError(f"sampler.ratios.{source}={ratio}: must be zero or more")
    if not any(r.sampler.ratios.values()):
        raise UserError("sampler.ratios: at least one ratio must be above zero")
    for task in r.data.tasks:
        if task not in TASKS:
            raise UserError(f"data.tasks: no task {task!r}; valid are {', '.join(TASKS)}")
    for name, one in r.data.sets.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise UserError(f"data.sets: {name!r} is no name of a data set: letters, digits, '_' and '-' only, and a letter or digit first")
        if not one.root:
            raise UserError(f"data.sets.{name}.root: which folder? Give data.sets.{name}.root=FOLDER")
        if not 0 <= one.ratio < float("inf"):
            raise UserError(f"data.sets.{name}.ratio={one.ratio}: must be zero or more")
        for split in one.splits.values():
            if not SPLIT.fullmatch(split):
                raise UserError(f"data.sets.{name}.splits: {split!r} is no name of a split")
    for split in r.evaluate.splits:
        if not SPLIT.fullmatch(split):
            raise UserError(f"evaluate.splits: {split!r} is no name of a split; slab, subject, val and test are some")
    for section, names in COUNTS.items():
        for key in (f"{section}.{name}" for name in names.split()):
            if value(r, key) < 1:
                raise UserError(f"{key}={value(r, key)}: must be 1 or more")
    for section, names in AMOUNTS.items():
        for key in (f"{section}.{name}" for name in names.split()):
            if not 0 <= value(r, key) < float("inf"):
                raise UserError(f"{key}={value(r, key)}: must be zero or more")
    for section, names in SHARES.items():
        for key in (f"{section}.{name}" for name in names.split()):
            if not 0 <= value(r, key) < 1:
                raise UserError(f"{key}={value(r, key)}: must be at least 0 and below 1")
    if len(r.optim.betas) != 2 or not all(0 <= beta < 1 for beta in r.optim.betas):
        raise UserError(f"optim.betas={r.optim.betas}: must be two numbers in [0, 1)")
    if not 0 <= r.train.seed < SEEDS:
        raise UserError(f"train.seed={r.train.seed}: must be from 0 to {SEEDS - 1}")
    if not r.cannot_run:
        _check_language(r.language)
    for key, total, part in (
        ("vision.image_size", r.vision.image_size, r.vision.patch_size),
        ("vision.width", r.vision.width, r.vision.heads),
        ("language.width", r.language.width, r.language.heads),
        ("train.save_every", r.train.save_every, r.train.log_every),
    ):
        if total % part:
            raise UserError(f"{key}={total}: must be a multiple of {part}")


def _check_language(language: Language) -> None:
    read = LANGUAGES.get(language.kind)
    if read is None:
        raise UserError(f"language.kind={language.kind!r}: cannot be trained yet; supported are {', '.join(LANGUAGES)}")
    for item in fields(language):
        given = getattr(language, item.name)
        if item.name not in ("kind", *read) and given != item.default:
            keys = ", ".join(f"language.{name}" for name in read)
            what = f"language.{item.name}={given!r}: language.kind={language.kind!r} does not read it, only {keys}"
            raise UserError(f"{what}; leave it out, or start from the recipe {language.kind}")


def harmless(key: str) -> bool:
    """Whether a run may be resumed with another value of this key."""
    section, dot, name = key.rpartition(".")
    return name in HARMLESS.get(section + dot, "").split()


def learned(recipe: Recipe, key: str) -> Any:
    """What a recipe says under a dotted key, without what does not change what is learned: where the folder of a data set lies."""
    if key == "data.sets":
        return {name: (one.layout, one.ratio, one.splits) for name, one in recipe.data.sets.items()}
    return value(recipe, key)


def value(recipe: Recipe, key: str) -> Any:
    """What a recipe says under a dotted key."""
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name) if name else getattr(recipe, section)


def _leaves(raw: Any, node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) pairs of a YAML tree, going down only where the recipe has a section."""
    sections = {item.name: item.default_factory for item in fields(node) if is_dataclass(item.default_factory)}
    found = []
    for key, value in raw.items():
        if key in sections and isinstance(value, dict):
            found += _leaves(value, sections[key], f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _set(config: DictConfig, key: str, value: Any, where: str) -> None:
    valid = dotted_keys()
    if key in REMOVED:
        raise UserError(f"{where}: {key}={value!r} is no longer read; use {REMOVED[key]}")
    mapping = next((known for known in ("sampler.ratios", "connector.aux_losses") if key.startswith(known + ".")), None)
    if key.startswith("data.sets."):
        valid += [f"{key.rpartition('.')[0]}.{item.name}" for item in fields(DataSet)] if key.count(".") == 3 else []
        mapping = "data.sets" if re.fullmatch(SET_KEY + r"(root|layout|ratio|splits|splits\.\w+)", key) else None
        if not re.match(SET_KEY, key):
            keys = ", ".join(item.name for item in fields(DataSet))
            raise UserError(f"{where}: {key}={value!r}: write data.sets.NAME.root=FOLDER; a set has the keys {keys}")
        name = key.split(".")[2]
        if mapping and name not in config.data.sets:
            config.data.sets[name] = DataSet()
    if key not in valid and mapping is None:
        if any(known.startswith(key + ".") for known in valid):
            inside = ", ".join(known for known in valid if known.startswith(key + "."))
            raise UserError(f"{where}: {key}={value!r} is a section, not a value; its keys are {inside}")
        raise UserError(f"{where}: unknown key {key!r} (value {value!r}); nearest valid keys: {nearest(key, valid)}")
    try:
        OmegaConf.update(config, key, value, merge=False)
    except OmegaConfBaseException as error:
        default = OmegaConf.select(OmegaConf.structured(Recipe), key)
        raise UserError(f"{where}: {key}={value!r}: {_first_line(error)}; default: {default!r}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).strip()
