"""Reports scored by models that read reports. Each is a published package; its weights come from a path that the user gives.

    radgraph=DIR     radgraph 0.1.18: F1 of entities and relations. DIR holds radgraph-xl/ or radgraph/, as its archive unpacks
    chexbert=FILE    f1chexbert 0.0.2: F1 of 14 findings and of 5 of them, micro and macro. FILE is chexbert.pth
    radcliq=DIR      RadCliQ-v1, from the two above, BLEU-2 and bert-score. DIR holds distilroberta-base
    radcliq_v0=FILE  RadCliQ-v0 beside it. FILE has its coefficients, which are published only as a pickle: see `Linear`
    green=DIR        green_score: matched findings by matched findings and significant errors. DIR holds the language model

radgraph_simple: entities. radgraph_partial: entities, and whether they have a relation. radgraph_complete: with their relations.
radgraph_combined: mean of the F1 of entities and that of relations, as RadCliQ takes it. chexbert_similarity: cosine of the two embeddings.
RadCliQ predicts a number of errors: lower is better. All models are made for reports of chest X-rays. An empty report is no entity and no
finding, and GREEN is 0 for it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from unimed.errors import UserError
from unimed.tasks import overlap

Pairs = Sequence[tuple[str, str]]  # the report that was written, and its reference

FINDINGS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis",
    "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
PARTS = ("radgraph_combined", "bertscore", "chexbert_similarity", "bleu2")  # of RadCliQ, in the order of its coefficients
LOWER_IS_BETTER = ("radcliq_v0", "radcliq_v1")


@dataclass(frozen=True)
class Linear:
    """((part - shift) * scale) @ coefficients + intercept, over `PARTS`.

    A file of it is {"shift": [4], "scale": [4], "coefficients": [4], "intercept": 0}. Of scikit-learn's MinMaxScaler, which v0 has, scale
    is `scale_` and shift is `-min_ / scale_`.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float

    def __call__(self, parts: np.ndarray) -> np.ndarray:
        found: np.ndarray = ((parts - self.shift) * self.scale) @ np.array(self.coefficients) + self.intercept
        return found

    @classmethod
    def read(cls, path: Path, option: str) -> Linear:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            rows = [tuple(map(float, value[name])) for name in ("shift", "scale", "coefficients")]
            intercept = float(value["intercept"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{option}: not the coefficients of RadCliQ ({type(error).__name__}: {error})") from None
        if {len(row) for row in rows} != {len(PARTS)} or not np.isfinite([*sum(rows, ()), intercept]).all():
            raise UserError(f"{option}: shift, scale and coefficients must be {len(PARTS)} finite numbers each, for {', '.join(PARTS)}")
        return cls(rows[0], rows[1], rows[2], intercept)


# Standardised parts times the published coefficients of the v1 model (Yu et al., Patterns 2023).
RADCLIQ_V1 = Linear(
    (0.53792312, 0.61757256, 0.76479421, 0.44738335),
    (1 / 0.30282584, 1 / 0.22430938, 1 / 0.25394391, 1 / 0.29892717),
    (-0.377083683, -0.370300100, -0.252616218, 4.31504841e-12),
    2.46655256e-10,
)


@dataclass(frozen=True)
class Found:
    """scores: of all reports. each: [reports], of the scores that are means of them."""

    scores: dict[str, float]
    each: dict[str, np.ndarray]

    @classmethod
    def means(cls, each: Mapping[str, Any]) -> Found:
        arrays = {name: np.asarray(values, dtype=np.float64) for name, values in each.items()}
        return cls({name: float(values.mean()) for name, values in arrays.items()}, arrays)


# What there is, and whether it can run


@dataclass(frozen=True)
class Scorer:
    """package: the module that is imported; "" for none. brings: its name for pip. weights: what must lie at the path. needs: others."""

    package: str
    brings: str
    weights: str
    is_there: Callable[[Path], bool]
    needs: tuple[str, ...] = ()


def _radgraph_folder(path: Path) -> str:
    """The model that lies in a folder; "" for none."""
    return next((name for name in ("radgraph-xl", "radgraph") if (path / name / "weights.th").is_file()), "")


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file()


SCORERS = {
    "radgraph": Scorer(
        "radgraph", "radgraph", "a folder with radgraph-xl/weights.th or radgraph/weights.th", lambda path: bool(_radgraph_folder(path))
    ),
    "chexbert": Scorer("f1chexbert", "f1chexbert", "the file chexbert.pth", lambda path: path.name == "chexbert.pth" and path.is_file()),
    "radcliq": Scorer("bert_score", "bert-score", "a folder of distilroberta-base (config.json)", _is_model, ("radgraph", "chexbert")),
    "radcliq_v0": Scorer("", "", "a JSON file of coefficients", Path.is_file, ("radcliq",)),
    "green": Scorer("green_score", "green-score", "a folder of GREEN's language model (config.json)", _is_model),
}


def option(name: str, path: str | Path) -> str:
    return f"--clinical {name}={path}"


def check(settings: Mapping[str, str]) -> None:
    """A UserError for the first scorer that cannot run, before any answer is made."""
    for name, path in settings.items():
        if name not in SCORERS:
            raise UserError(f"{option(name, path)}: unknown scorer; valid are {', '.join(SCORERS)}")
        one = SCORERS[name]
        for other in one.needs:
            if other not in settings:
                raise UserError(f"{option(name, path)}: needs {other} as well; add --clinical {other}=PATH")
        if one.package and find_spec(one.package) is None:
            raise UserError(f"{option(name, path)}: the package {one.brings} is not installed; get it with: pip install {one.brings}")
        if not one.is_there(Path(path)):
            raise UserError(f"{option(name, path)}: must be {one.weights}")
        if name == "radcliq_v0":
            Linear.read(Path(path), option(name, path))


def load(settings: Mapping[str, str], device: str = "cpu") -> Callable[[Pairs], Found]:
    """Loads the models once; returns what scores pairs with all of them. The same pair is scored once."""
    check(settings)
    models: dict[str, Any] = {}
    for name, make in _MODELS.items():
        if name in settings:
            path = settings[name]
            try:
                with redirect_stdout(StringIO()):
                    models[name] = make(Path(path), device)
            except ImportError as error:
                raise UserError(f"{option(name, path)}: {SCORERS[name].brings} lacks the package {error.name or error}") from error
            except Exception as error:  # other packages, other exceptions
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(f"{option(name, path)}: {SCORERS[name].brings} cannot load it: {said}") from error
    v0 = Linear.read(Path(settings["radcliq_v0"]), option("radcliq_v0", settings["radcliq_v0"])) if "radcliq_v0" in settings else None

    def score(pairs: Pairs) -> Found:
        if not pairs:
            return Found({}, {})
        distinct = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
        once, rows = list(distinct), np.array([distinct[pair] for pair in pairs])
        with redirect_stdout(StringIO()):
            each = {name: np.asarray(values)[rows] for model in models.values() for name, values in model(once).items()}
        labels = {side: each.pop(f"chexbert_{side}") for side in ("given", "wanted") if f"chexbert_{side}" in each}
        if "radcliq" in models:
            each["bleu2"] = np.array([bleu2(*pair) for pair in once])[rows]
            parts = np.stack([each[name] for name in PARTS], 1)
            each["radcliq_v1"] = RADCLIQ_V1(parts)
            each |= {"radcliq_v0": v0(parts)} if v0 else {}
        found = Found.means(each)
        return Found(found.scores | (label_f1s(labels["given"], labels["wanted"]) if labels else {}), found.each)

    return score


# RadGraph


class _RadGraph:
    def __init__(self, path: Path, device: str) -> None:
        module = importlib.import_module("radgraph")
        cuda = 0 if device.startswith("cuda") else -1
        self.model = module.F1RadGraph(reward_level="all", model_type=_radgraph_folder(path), cuda=cuda, model_cache_dir=str(path))

    def __call__(self, pairs: Pairs) -> dict[str, np.ndarray]:
        names = [f"radgraph_{name}" for name in ("simple", "partial", "complete", "combined")]
        found = {name: np.zeros(len(pairs)) for name in names}
        some = [place for place, pair in enumerate(pairs) if all(pair)]  # of the others the package returns no annotation
        if some:
            _, rewards, given, wanted = self.model(hyps=[pairs[place][0] for place in some], refs=[pairs[place][1] for place in some])
            for name, values in zip(names, rewards, strict=False):
                found[name][some] = values
            found[names[3]][some] = [combined(one, other) for one, other in zip(given, wanted, strict=True)]
        return found


def combined(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    """Mean of the F1 of entities, as words with label, and the F1 of relations, as two entities with the kind, of two annotations."""
    return (_f1(_entities(given), _entities(wanted)) + _f1(_relations(given), _relations(wanted))) / 2


def _entity(one: Mapping[str, Any]) -> tuple[str, str]:
    return str(one["tokens"]), str(one["label"])


def _entities(annotation: Mapping[str, Any]) -> set[Any]:
    return {_entity(one) for one in annotation["entities"].values()}


def _relations(annotation: Mapping[str, Any]) -> set[Any]:
    entities = annotation["entities"]
    return {(_entity(one), _entity(entities[other]), kind) for one in entities.values() for kind, other in one["relations"]}


def _f1(given: set[Any], wanted: set[Any]) -> float:
    return 2 * len(given & wanted) / max(len(given) + len(wanted), 1)


# CheXbert


class _CheXbert:
    def __init__(self, path: Path, device: str) -> None:
        module: Any = importlib.import_module("f1chexbert.f1chexbert")
        kept = module.CACHE_DIR
        module.CACHE_DIR = str(path.parent)  # where the package looks for chexbert.pth; it has no argument for it
        try:
            self.model = module.F1CheXbert(device=device)
        finally:
            module.CACHE_DIR = kept
        self.device = device

    def __call__(self, pairs: Pairs) -> dict[str, np.ndarray]:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        labels = {text: np.array(self.model.get_label(text.strip()), dtype=bool) for text in texts}  # uncertain counts as present
        vectors = {text: self._embedding(text) for text in texts}
        return {
            "chexbert_given": np.stack([labels[given] for given, _ in pairs]),
            "chexbert_wanted": np.stack([labels[wanted] for _, wanted in pairs]),
            "chexbert_similarity": np.array([_cosine(vectors[given], vectors[wanted]) for given, wanted in pairs]),
        }

    def _embedding(self, text: str) -> np.ndarray:
        """The last state of the class token."""
        import torch

        inputs = self.model.tokenizer(" ".join(text.split()), truncation=True, max_length=512, return_tensors="pt")
        with torch.no_grad():
            states = self.model.model.bert(**{name: value.to(self.device) for name, value in inputs.items()})[0]
        found: np.ndarray = states[0, 0].float().cpu().numpy()
        return found


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-12))


def label_f1s(given: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """F1 of the 14 findings and of `FIVE`: micro over all labels, macro as the mean of the findings' F1, 0 for a finding in no text."""
    found = {}
    for count, columns in ((len(FINDINGS), slice(None)), (len(FIVE), [FINDINGS.index(name) for name in FIVE])):
        ours, theirs = given[:, columns], wanted[:, columns]
        hits, named = (ours & theirs).sum(0), ours.sum(0) + theirs.sum(0)
        found[f"chexbert_micro_f1_{count}"] = float(2 * hits.sum() / max(named.sum(), 1))
        found[f"chexbert_macro_f1_{count}"] = float((2 * hits / np.maximum(named, 1)).mean())
    return found


# RadCliQ


class _BertScore:
    """BERTScore as RadCliQ has it: distilroberta-base, rescaled by the package's baseline for English."""

    LAYERS = 5  # those that the package takes of distilroberta-base; of a path it must be told

    def __init__(self, path: Path, device: str) -> None:
        module = importlib.import_module("bert_score")
        baseline = Path(str(module.__file__)).parent / "rescale_baseline" / "en" / "distilroberta-base.tsv"
        settings = {"num_layers": self.LAYERS, "batch_size": 256, "lang": "en", "rescale_with_baseline": True}
        self.model = module.BERTScorer(model_type=str(path), baseline_path=str(baseline), device=device, **settings)

    def __call__(self, pairs: Pairs) -> dict[str, np.ndarray]:
        given, wanted = ([re.sub(" +", " ", pair[side]) for pair in pairs] for side in (0, 1))
        return {"bertscore": np.array([float(value) for value in self.model.score(given, wanted)[2]])}


def bleu2(given: str, wanted: str) -> float:
    """Sentence BLEU-2 of lower-case words, a full stop being one, without smoothing."""
    words = [" ".join(text.lower().replace(".", " .").split()) for text in (given, wanted)]
    return overlap.sentence_bleu(*words)[1] if all(words) else 0.0


# GREEN


class _Green:
    def __init__(self, path: Path, device: str) -> None:
        module = importlib.import_module("green_score")
        self.folder = tempfile.TemporaryDirectory()  # the package writes a table of what the model said
        takes_cpu = "cpu" in inspect.signature(module.GREEN).parameters  # not in every version
        settings = {"cpu": True} if takes_cpu and not device.startswith("cuda") else {}
        self.model = module.GREEN(str(path), output_dir=self.folder.name, **settings)

    def __call__(self, pairs: Pairs) -> dict[str, np.ndarray]:
        found = np.zeros(len(pairs))
        some = [place for place, pair in enumerate(pairs) if all(text.strip() for text in pair)]
        if some:
            _, _, scores, _, _ = self.model([pairs[place][1] for place in some], [pairs[place][0] for place in some])
            found[some] = [0.0 if score is None else score for score in scores]  # None: the model's answer has no counts
        return {"green": found}


_MODELS: dict[str, Callable[[Path, str], Any]] = {"radgraph": _RadGraph, "chexbert": _CheXbert, "radcliq": _BertScore, "green": _Green}
