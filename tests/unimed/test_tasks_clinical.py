"""Scorers of reports: published packages, here as stubs with the interfaces that their documentation gives, and the formulas of ours."""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from unimed.cli import app as cli
from unimed.errors import UserError
from unimed.evaluate.run import clinical_table
from unimed.report import report
from unimed.tasks.metrics import clinical

WORDS = {name: name.lower() for name in clinical.FINDINGS}


def annotation(*entities):
    """What RadGraph says of a report: (words, label, relations) of each entity."""
    return {"entities": {str(n): {"tokens": t, "label": label, "relations": r} for n, (t, label, r) in enumerate(entities, 1)}}


def graph(text):
    """The stub's annotation: each word an entity; "a>b" relates them."""
    words = [word for pair in text.split() for word in pair.split(">")]
    entities, at = [], {word: str(n) for n, word in enumerate(dict.fromkeys(words), 1)}
    links = [pair.split(">") for pair in text.split() if ">" in pair]
    for word in dict.fromkeys(words):
        entities.append((word, "OBS-DP", [["modify", at[b]] for a, b in links if a == word]))
    return annotation(*entities)


class F1RadGraph:
    """Interface of radgraph 0.1.18: empty pairs have rewards and no annotations."""

    made: ClassVar[list] = []

    def __init__(self, reward_level, model_type=None, cuda=None, model_cache_dir=None, tokenizer_cache_dir=None):
        assert reward_level == "all"
        self.made.append((model_type, cuda, model_cache_dir))

    def __call__(self, refs, hyps):
        assert len(refs) == len(hyps)
        simple = [float(one == other) for one, other in zip(hyps, refs, strict=True)]
        partial, complete = [value / 2 for value in simple], [value / 4 for value in simple]
        print("Using device: cpu")
        return (0.0,) * 3, (simple, partial, complete), [graph(one) for one in hyps], [graph(one) for one in refs]


class F1CheXbert:
    """Interface of f1chexbert 0.0.2: labels in the order of FINDINGS; tokenizer and model.bert as attributes."""

    def __init__(self, refs_filename=None, hyps_filename=None, device=None):
        self.folder = sys.modules["f1chexbert.f1chexbert"].CACHE_DIR
        self.tokenizer = lambda text, **_: {"input_ids": torch.tensor([[len(text), text.count("e")]])}
        self.model = SimpleNamespace(bert=lambda input_ids: (torch.stack([input_ids.float(), input_ids.float() + 1], 1),))

    def get_label(self, report, mode="rrg"):
        assert mode == "rrg"
        return [int(word in report) for word in WORDS.values()]


class BERTScorer:
    made: ClassVar[list] = []

    def __init__(self, model_type, num_layers, batch_size, lang, rescale_with_baseline, baseline_path, device):
        self.made.append((model_type, num_layers, baseline_path))

    def score(self, cands, refs):
        assert not any("  " in text for text in (*cands, *refs))
        f = torch.tensor([float(one == other) for one, other in zip(cands, refs, strict=True)])
        return f, f, f


class GREEN:
    def __init__(self, model_name, output_dir="."):
        self.asked = []

    def __call__(self, refs, hyps):
        self.asked += hyps
        scores = [None if one == "odd" else 0.5 for one in hyps]
        return 0.5, 0.0, scores, "summary", SimpleNamespace()


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """The stubs as packages, and a folder of placeholder weights."""
    stubs = {
        "radgraph": {"F1RadGraph": F1RadGraph}, "f1chexbert": {"F1CheXbert": F1CheXbert},
        "f1chexbert.f1chexbert": {"F1CheXbert": F1CheXbert, "CACHE_DIR": "elsewhere"},
        "bert_score": {"BERTScorer": BERTScorer}, "green_score": {"GREEN": GREEN},
    }  # fmt: skip
    for name, members in stubs.items():
        module = ModuleType(name)
        module.__spec__ = SimpleNamespace(name=name)
        module.__file__ = "/packages/bert_score/__init__.py"
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for file in ("radgraph-xl/weights.th", "chexbert.pth", "roberta/config.json", "green/config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    v0 = {"shift": [0, 0, 0, 0.5], "scale": [1, 1, 1, 2], "coefficients": [-1, 0, 0, -0.5], "intercept": 3}
    (tmp_path / "v0.json").write_text(json.dumps(v0))
    places = {"radgraph": ".", "chexbert": "chexbert.pth", "radcliq": "roberta", "radcliq_v0": "v0.json", "green": "green"}
    return {name: str(tmp_path / place) for name, place in places.items()}


def test_every_scorer_is_asked_as_its_documentation_says(packages, tmp_path):
    score = clinical.load(packages)
    pairs = [("edema  here.", "edema  here."), ("lung>clear", "lung>opaque"), ("", "edema."), ("edema  here.", "edema  here.")]
    found = score(pairs)
    assert F1RadGraph.made[-1] == ("radgraph-xl", -1, str(tmp_path))
    assert BERTScorer.made[-1] == (str(tmp_path / "roberta"), 5, "/packages/bert_score/rescale_baseline/en/distilroberta-base.tsv")
    assert sys.modules["f1chexbert.f1chexbert"].CACHE_DIR == "elsewhere"  # put back
    assert found.each["radgraph_simple"].tolist() == [1, 0, 0, 1]
    assert found.each["radgraph_complete"].tolist() == [0.25, 0, 0, 0.25]
    assert found.each["radgraph_combined"].tolist() == [0.5, 0.25, 0, 0.5]  # no relation in the first; one of two entities in the second
    assert found.each["green"].tolist() == [0.5, 0.5, 0, 0.5]
    assert found.each["bertscore"].tolist() == [1, 0, 0, 1]
    assert found.each["bleu2"].tolist() == pytest.approx([1, 0, 0, 1])
    assert found.each["chexbert_similarity"][0] == pytest.approx(1)
    v0 = 3 - found.each["radgraph_combined"] - 0.5 * 2 * (found.each["bleu2"] - 0.5)
    assert found.each["radcliq_v0"].tolist() == pytest.approx(v0.tolist())
    assert found.scores["chexbert_micro_f1_5"] == pytest.approx(2 * 2 / (2 + 3))  # edema: two hits, once not written
    assert found.scores["green"] == pytest.approx(0.375)
    assert set(found.scores) == {*found.each, *(f"chexbert_{kind}_f1_{n}" for kind in ("micro", "macro") for n in (14, 5))}


def test_where_the_chexbert_weights_are_is_where_the_package_looks(packages, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(F1CheXbert, "get_label", lambda self, text: seen.append(self.folder) or [0] * 14)
    clinical.load({"chexbert": packages["chexbert"]})([("a", "b")])
    assert set(seen) == {str(tmp_path)}


def test_an_answer_of_green_without_counts_is_zero(packages):
    assert clinical.load({"green": packages["green"]})([("odd", "b"), ("a", "b")]).each["green"].tolist() == [0, 0.5]


def test_label_f1_is_that_of_the_package():
    """The example of f1chexbert's own test: five reports, by their labels."""
    wanted, given = np.zeros((2, 5, 14), dtype=bool)
    for table, row, names in (
        (wanted, 1, ["Cardiomegaly"]), (wanted, 2, ["Cardiomegaly"]), (wanted, 3, ["Consolidation"]),
        (wanted, 4, ["Lung Opacity", "Lung Lesion", "No Finding"]),
        (given, 1, ["No Finding"]), (given, 2, ["Edema", "Atelectasis"]), (given, 3, ["Consolidation"]), (given, 4, ["No Finding"]),
    ):  # fmt: skip
        table[row, [clinical.FINDINGS.index(name) for name in names]] = True
    found = clinical.label_f1s(given, wanted)
    assert found == pytest.approx(
        {
            "chexbert_micro_f1_14": 0.3636363636, "chexbert_macro_f1_14": 0.1190476190,
            "chexbert_micro_f1_5": 0.3333333333, "chexbert_macro_f1_5": 0.2,
        }
    )  # fmt: skip
    assert set(clinical.label_f1s(wanted * False, wanted * False).values()) == {0.0}


def test_radcliq_v1_is_the_published_one():
    """Means that a published table has beside each other: RadGraph 0.3397, BERTScore 0.5421, similarity 0.6355, BLEU 0.2704."""
    assert clinical.RADCLIQ_V1(np.array([[0.3397, 0.5421, 0.6355, 0.2704]]))[0] == pytest.approx(0.5000, abs=1e-4)
    perfect, nothing = clinical.RADCLIQ_V1(np.array([[1.0] * 4, [0.0] * 4]))
    assert perfect < 0 < nothing


def test_the_combined_f1_of_two_annotations():
    given = annotation(("lungs", "ANAT-DP", []), ("clear", "OBS-DP", [["located_at", "1"]]))
    wanted = annotation(("lungs", "ANAT-DP", []), ("clear", "OBS-DA", [["located_at", "1"]]))
    assert clinical.combined(given, given) == 1
    assert clinical.combined(given, wanted) == 0.25
    assert clinical.combined(annotation(), wanted) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sage": "x"}, "--clinical sage=x: unknown scorer; valid are radgraph, chexbert, radcliq, radcliq_v0, green"),
        ({"radgraph": "absent"}, "--clinical radgraph=absent: must be a folder with radgraph-xl/weights.th or radgraph/weights.th"),
        ({"chexbert": "a.pth"}, "--clinical chexbert=a.pth: must be the file chexbert.pth"),
        ({"radcliq": "absent"}, "must be a folder of distilroberta-base"),
        ({"green": "absent"}, "must be a folder of GREEN's language model"),
        ({"radgraph": None}, "needs radgraph as well; add --clinical radgraph=PATH"),
    ],
)
def test_a_scorer_that_cannot_run_is_one_line(packages, change, words):
    settings = {name: path for name, path in {**packages, **change}.items() if path is not None}
    with pytest.raises(UserError) as caught:
        clinical.check(settings)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["radgraph", "chexbert", "green"])
def test_a_package_that_is_missing_is_one_line(packages, monkeypatch, name):
    monkeypatch.setattr(clinical, "find_spec", lambda module: None)
    brings = clinical.SCORERS[name].brings
    with pytest.raises(UserError, match=f"the package {brings} is not installed; get it with: pip install {brings}$"):
        clinical.check({name: packages[name]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not the coefficients of RadCliQ"),
        ('{"shift": [0]}', "not the coefficients of RadCliQ (KeyError: 'scale')"),
        ('{"shift": [0], "scale": [1], "coefficients": [1], "intercept": 0}', "must be 4 finite numbers each"),
        ('{"shift": [0,0,0,0], "scale": [1,1,1,1], "coefficients": [1,1,1,NaN], "intercept": 0}', "must be 4 finite numbers each"),
    ],
)
def test_coefficients_that_are_none_are_one_line(packages, tmp_path, text, words):
    (tmp_path / "v0.json").write_text(text)
    with pytest.raises(UserError) as caught:
        clinical.check(packages)
    assert words in str(caught.value)


def test_weights_that_do_not_load_are_one_line(packages, monkeypatch):
    monkeypatch.setattr(sys.modules["green_score"], "GREEN", lambda *given, **named: 1 / 0)
    with pytest.raises(UserError, match=r"--clinical green=\S+: green-score cannot load it: division by zero"):
        clinical.load({"green": packages["green"]})
    monkeypatch.delattr(sys.modules["radgraph"], "F1RadGraph")
    with pytest.raises(UserError, match="radgraph cannot load it"):
        clinical.load({"radgraph": packages["radgraph"]}, "cuda")


@pytest.mark.usefixtures("without_java")
def test_the_command_scores_the_reports(packages, evaluated_run, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))

    def evaluate(*line):
        return CliRunner().invoke(cli.app, ["evaluate", str(run), *line], env={"COLUMNS": "200", "TERM": "dumb"})

    options = [word for name in packages for word in ("--clinical", f"{name}={packages[name]}")]
    shown = evaluate(*options)
    assert shown.exit_code == 0, shown.output
    result = json.loads((run / "metrics.json").read_text())
    part = result["splits"]["slab"]["clinical"]
    assert set(part) == {"majority answer", "image blanked", "trained"}
    assert part["trained"]["count"] == 4
    low, high = part["trained"]["intervals"]["radcliq_v1"]
    assert low <= part["trained"]["scores"]["radcliq_v1"] <= high
    header, lines = clinical_table(result["splits"]["slab"])
    assert header == ["score", "majority answer", "image blanked", "trained", "95 % interval"]
    assert [line[0] for line in lines if "lower" in line[0]] == ["radcliq_v1 (lower is better)", "radcliq_v0 (lower is better)"]
    assert "clinical scores of the reports" in shown.output
    assert "Clinical scores of the reports" in report.write(run).read_text()
    for wrong, words in (("radgraph", "expected NAME=PATH"), ("green=absent", "--clinical green=absent: must be a folder of GREEN")):
        shown = evaluate("--clinical", wrong)
        assert shown.exit_code == 2
        assert words in shown.output
