import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from unimed.cli import app as cli
from unimed.errors import UserError
from unimed.evaluate import against, evaluate, intervals
from unimed.evaluate.predictions import Predictions, read_predictions
from unimed.evaluate.run import _details, answer_table, answered, drawn_by, evaluate_run, odd_answers
from unimed.inference.files import fingerprint
from unimed.inference.session import Generated, Session, load
from unimed.records.pixels import View
from unimed.report import report
from unimed.tasks import RELEASED_TASKS, TASKS
from unimed.tasks.item import Item, digest
from unimed.tasks.protocol import STANDARD
from unimed.train import recipe as recipes
from unimed.train.run import items

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture(scope="module")
def slab(small_run):
    return evaluate.spread(items(recipes.load(small_run / "recipe.yaml"), "slab"), 5)


@pytest.fixture(scope="module")
def session(small_run):
    return load(small_run)


class Parrot:
    """Stands for a session: answers every item as `speak` says."""

    def __init__(self, speak):
        self.speak = speak

    def generate(self, items, batch_size=40, max_new_tokens=100, blank_images=False, progress=None):
        return [Generated(self.speak(item, blank_images), 1.0, ()) for item in items]


def test_progress_counts_every_item_once(session, slab):
    counts = Counter()
    rows = evaluate.compare(None, session, [], slab, batch_size=3, max_new_tokens=2, progress=lambda row, n: counts.update({row: n}))
    assert counts == {evaluate.TRAINED: len(slab), evaluate.BLANKED: sum(item.image is not None for item in slab)}
    assert set(rows[evaluate.TRAINED]["metrics"]) == set(RELEASED_TASKS)


def test_the_perfect_model_scores_one_and_beats_the_others(slab, small_run):
    train_items = items(recipes.load(small_run / "recipe.yaml"), "train")
    perfect = Parrot(lambda item, blanked: "nothing" if blanked else item.answer)
    silent = Parrot(lambda item, blanked: "")
    rows = evaluate.compare(silent, perfect, train_items, slab)
    assert list(rows) == list(evaluate.ROWS)
    for task in RELEASED_TASKS:
        name = TASKS[task].headline
        # A box is written in hundredths of the image, so even the right text is a little off.
        assert rows[evaluate.TRAINED]["metrics"][task][name] == pytest.approx(1, abs=0.15 if task == "refer" else 1e-6)
        assert rows[evaluate.UNTRAINED]["metrics"][task][name] == 0
    better = evaluate.verdict(rows)
    assert all(better.values())  # a text question cannot be asked with its image blanked
    assert set(better) == set(evaluate.verdict(rows, STANDARD)) == set(RELEASED_TASKS)
    assert rows[evaluate.BLANKED]["metrics"]["qa"] == rows[evaluate.TRAINED]["metrics"]["qa"]


def test_a_model_that_only_knows_the_majority_beats_nobody(slab, small_run):
    train_items = items(recipes.load(small_run / "recipe.yaml"), "train")
    majority = evaluate.MajorityAnswers.fit(train_items)
    rows = evaluate.compare(None, Parrot(lambda item, blanked: majority.predict(item)), train_items, slab)
    assert evaluate.UNTRAINED not in rows
    assert not any(evaluate.verdict(rows).values())


def test_a_task_that_training_lacks_has_no_majority_answer_and_no_verdict(slab):
    some = [item for item in slab if item.task in ("vqa", "qa")]
    perfect = Parrot(lambda item, blanked: item.answer)
    rows = evaluate.compare(None, perfect, [item for item in some if item.task == "qa"], some)
    assert set(rows[evaluate.MAJORITY]["metrics"]) == {"qa"}
    assert rows[evaluate.MAJORITY]["predictions"].count(None) == sum(item.task == "vqa" for item in some)
    assert set(evaluate.verdict(rows)) == {"qa"}


def test_spread_takes_an_even_share_of_every_task():
    many = [Item(str(i), task, "d", "", "", None, None, None, "t") for task in ("vqa", "qa") for i in range(100)]
    kept = evaluate.spread(many, 4)
    assert [item.id for item in kept] == ["0", "25", "50", "75"] * 2
    assert evaluate.spread(many, 0) == many


def test_evaluating_a_run_writes_its_metrics_and_predictions(evaluated_run):
    result = json.loads((evaluated_run / "metrics.json").read_text())
    stored = read_predictions(evaluated_run)
    assert result["notice"] == "Research use, not for diagnosis"
    assert set(result["splits"]) == {"slab", "subject"}
    for split, part in result["splits"].items():
        assert part["counts"] == dict.fromkeys(RELEASED_TASKS, 4)
        assert set(part["rows"]) == set(evaluate.ROWS)
        assert set(part["better"]) == set(RELEASED_TASKS)
        rows = stored[split]["rows"]
        assert {row: len(texts) for row, texts in rows.items()} == {"untrained": 24, "trained": 24, "image blanked": 20}
        assert part["rows"][evaluate.TRAINED]["refer"].keys() >= {"empty", "unparsable", "inverted", "chatty", "miou", "miou_strict"}
        again = evaluate.score(answered(stored[split]["data"]), [text for _, text in sorted(rows[evaluate.TRAINED].items())])
        assert again == part["rows"][evaluate.TRAINED]
        assert part["drawn"] == dict.fromkeys(RELEASED_TASKS, "images") | {"qa": "questions"}
        assert list(part["groups"]["dataset"]) == ["sample"]
        assert list(part["groups"]["modality"])[-1] == "no image"
        assert set(part["groups"]["modality"]) <= {"CT", "MRI", "no image"}
        for row, tasks in part["intervals"].items():
            for task, metrics in tasks.items():
                for metric, (low, high) in metrics.items():
                    assert low <= part["rows"][row][task][metric] <= high
    header, lines = answer_table(result)
    assert len(header) == 7
    assert [[row[0] for row in rows] for rows in lines.values()] == [list(evaluate.ROWS)] * 2


def test_a_test_only_set_can_be_evaluated(test_only_run):
    run, root, result = test_only_run
    part = result["splits"]["test"]
    assert part["name"] == "test split"
    assert set(part["counts"]) == {"vqa", "refer", "identify", "qa"}
    assert part["rows"][evaluate.MAJORITY] == part["better"] == part["better_strict"] == {}
    assert set(part["rows"][evaluate.TRAINED]) == set(part["counts"])
    assert evaluate.UNTRAINED not in part["rows"]
    assert "no such folder" in result["left_out"][evaluate.UNTRAINED]
    for strict in (False, True):
        _, lines = answer_table(result, strict)
        assert [row[1:] for row in lines["test"] if row[0] == evaluate.MAJORITY] == [["not fitted"] * 4]
    stored = read_predictions(run)["test"]
    assert stored["data"]["root"] == str(root)
    assert len(answered(stored["data"])) == len(stored["rows"][evaluate.TRAINED]) == 12


def test_a_split_that_the_data_lacks_is_named_with_those_it_has(small_run, test_only_run):
    before = {path.name: path.read_bytes() for path in small_run.glob("*.json")}
    with pytest.raises(UserError, match=r"in its 'slab' split; it has test: choose with evaluate.splits=\[test\]"):
        evaluate_run(small_run, [f"data.root={test_only_run[1]}"])
    with pytest.raises(UserError, match=r"split 'external'.*it has test"):
        evaluate_run(small_run, [f"data.root={test_only_run[1]}", "evaluate.splits=[external]"])
    assert {path.name: path.read_bytes() for path in small_run.glob("*.json")} == before


def test_odd_answers_are_counted_by_task():
    counts = {"count": 3.0, "empty": 1.0, "unparsable": 0.0, "inverted": 2.0, "chatty": 0.0}
    assert odd_answers({"rows": {"trained": {"refer": counts, "caption": {"count": 1.0, "empty": 0.0}}}}, "trained") == {
        "refer": {"empty": 1, "inverted": 2}
    }


def test_evaluating_what_is_not_a_run_says_so(tmp_path):
    with pytest.raises(UserError, match="not a run of unimed"):
        evaluate_run(tmp_path)


@pytest.fixture
def copy(evaluated_run, tmp_path):
    """The evaluated run, to be changed."""
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    return run


@pytest.fixture
def calls(monkeypatch):
    """How many items the model answered, call by call."""
    found = []
    original = Session.generate
    monkeypatch.setattr(Session, "generate", lambda self, part, *rest: found.append(len(part)) or original(self, part, *rest))
    return found


def test_an_interrupted_evaluation_goes_on(copy, calls):
    whole = (copy / "predictions.jsonl").read_text().splitlines(keepends=True)
    scores = json.loads((copy / "metrics.json").read_text())["splits"]
    (copy / "predictions.jsonl").write_text("".join(whole[:60]) + whole[60][:15])  # killed while it wrote
    result = evaluate_run(copy)
    made = [line for line in whole if json.loads(line).get("row") != evaluate.UNTRAINED]  # that row is an option
    found = (copy / "predictions.jsonl").read_text().splitlines(keepends=True)
    assert sum(calls) == len(found) - 60
    assert set(made) <= set(found) <= set(whole)
    for split, part in result["splits"].items():
        assert list(part["rows"]) == ["majority answer", "image blanked", "trained"]
        assert part["rows"] == {row: scores[split]["rows"][row] for row in part["rows"]}


def test_another_model_begins_anew(copy):
    before = fingerprint(copy / "model")
    manifest = copy / "model" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert len({before, fingerprint(copy / "model")}) == 2
    path = copy / "other.jsonl"
    Predictions(path, {"model": "a"}).add("test", "trained", [0], [item(0)], ["x"])
    assert Predictions(path, {"model": "a"}).there("test", "trained") == {0: "x"}
    whole = path.read_bytes()
    other = Predictions(path, {"model": "b"})
    assert other.there("test", "trained") == {}
    assert path.read_bytes() == whole, "answers of an earlier call stay until there is one of this"
    other.add("test", "trained", [0], [item(0)], ["y"])
    assert Predictions(path, {"model": "b"}).there("test", "trained") == {0: "y"}


def test_an_item_is_another_with_another_image_or_view():
    one = item(0)
    view = View(Path("data/ct.nii"), "axial", 3, (0.0, 9.0))
    others = [
        replace(one, image=image)
        for image in (None, Path("data/a.png"), Path("data/b.png"), view, replace(view, index=4), replace(view, plane="coronal"))
    ]
    others += [replace(one, image=replace(view, grey=None)), replace(one, image=view, subject="another patient")]
    assert len({digest([other]) for other in others}) == len(others)
    assert digest([replace(one, image=Path("data/a.png"))]) == digest([replace(one, image=Path("/moved/a.png"))])


def test_an_item_that_is_too_long_has_an_empty_answer(session, slab, caplog):
    """One such record ended the evaluation."""
    items = [one for one in slab if one.task == "vqa"][:4]
    items[1] = replace(items[1], question="which plane is shown " * 400, max_words=0)
    found = evaluate.answers(session, items, "trained", 3, 4)
    assert found[1] == ""
    assert [found[0], *found[2:]] == evaluate.answers(session, [items[0], *items[2:]], "trained", 3, 4)
    assert f"{items[1].id}: prompt 1 has" in caplog.text


def test_a_file_of_answers_that_is_not_ours_is_one_line(copy):
    for text in ("{]\n", "[1]\n"):
        (copy / "predictions.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"predictions.jsonl:1: not"):
            Predictions(copy / "predictions.jsonl", {})
    (copy / "predictions.jsonl").write_text('{"format": 0}\n')
    with pytest.raises(UserError, match="make it again with: unimed evaluate"):
        read_predictions(copy)


def test_a_run_against_itself_differs_by_nothing_and_against_another_by_the_scores(copy, evaluated_run):
    same = against.differences(copy, evaluated_run)
    assert set(same["slab"]) == set(RELEASED_TASKS)
    found = [one for tasks in same.values() for task in tasks.values() for one in task.values() if isinstance(one, dict)]
    assert all((one["difference"], one["interval"], one["score"]) == (0, [0, 0], one["other"]) for one in found)
    lines = [json.loads(line) for line in (copy / "predictions.jsonl").read_text().splitlines()]
    items = {split: answered(part["data"]) for split, part in read_predictions(copy).items()}
    for line in lines[1:]:
        if line["row"] == "trained":
            line["text"] = items[line["split"]][line["place"]].answer
    (copy / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = json.loads((evaluated_run / "metrics.json").read_text())["splits"]
    for split, tasks in against.differences(copy, evaluated_run).items():
        assert tasks["cls"]["drawn"] == "images"
        found = tasks["cls"]["accuracy"]
        assert found["difference"] == pytest.approx(1 - scores[split]["rows"]["trained"]["cls"]["accuracy"])
        assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    evaluate_run(copy, ["evaluate.limit=3"])
    with pytest.raises(UserError, match="other items than"):
        against.differences(copy, evaluated_run)


def test_a_difference_is_drawn_over_patients_and_paired():
    """Both runs are wrong on the same patients: each score is uncertain, the difference is not."""
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(20), 5)
    theirs = np.repeat(rng.integers(0, 2, 20), 5)[:, None].astype(float)
    ours = theirs.copy()
    ours[::10] = 1 - ours[::10]
    members = people.tolist()
    low, high = intervals.interval(ours - theirs, members)[0]
    assert high - low < 0.5 * np.subtract(*intervals.interval(ours, members)[0][::-1])


def test_a_difference_of_no_means_has_no_interval(copy, evaluated_run, monkeypatch):
    monkeypatch.setattr(intervals, "singles", lambda *given: None)
    found = against.differences(copy, evaluated_run)["slab"]["caption"]
    assert (found["rougeL"]["difference"], found["rougeL"]["interval"]) == (0, None)
    assert against.strip(found["rougeL"], 0.0) == " " * 12 + "●" + " " * 12


def test_a_missing_answer_is_no_difference(copy, evaluated_run):
    lines = (copy / "predictions.jsonl").read_text().splitlines(keepends=True)
    (copy / "predictions.jsonl").write_text("".join(lines[:-30]))
    with pytest.raises(UserError, match=r"answers of its '\w+' split are missing; finish them with: unimed evaluate"):
        against.differences(copy, evaluated_run)


def test_the_line_of_a_difference():
    one = {"difference": 0.5, "interval": [0.25, 1.0]}
    assert against.strip(one, 1.0, 9) == "    │━●━━"
    assert against.strip({"difference": 0.0, "interval": [-1.0, 0.5]}, 1.0, 9) == "━━━━●━━  "
    assert against.span_of({"test": {"vqa": {"f1": one}}}, {"vqa": "f1"}) == 1.0


def item(at, subject="", image="a.png"):
    return Item(str(at), "cls", "d", "Which: a, b?", "a", image and Path(image), None, None, "t", subject=subject)


def test_patients_are_drawn_where_there_are_ten(monkeypatch):
    assert intervals.groups([item(at, f"p{at % 10}") for at in range(40)])[0] == "patients"
    assert intervals.groups([item(at, f"p{at % 9}") for at in range(40)])[0] == "images"
    assert intervals.groups([item(at, f"p{at % 10}" if at else "") for at in range(40)])[0] == "images"
    assert intervals.groups([item(at, image=None) for at in range(3)])[0] == "questions"
    assert drawn_by({"drawn": {"vqa": "images", "cls": "patients", "refer": "images"}}) == "over images: vqa, refer; over patients: cls"


def test_an_interval_is_as_wide_as_its_groups_are_few():
    rng = np.random.default_rng(0)
    each = rng.integers(0, 2, (400, 1)).astype(float)
    ((low, high),) = intervals.interval(each, list(range(400)))
    expected = 1.96 * float(each.std()) / 20
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    assert low < each.mean() < high
    each = np.repeat(each[:40], 10, axis=0)  # forty patients, each with ten equal answers
    ((one, other),) = intervals.interval(each, [at // 10 for at in range(400)])
    assert other - one > 2.5 * (high - low)
    assert intervals.interval(each, [at // 10 for at in range(400)]) == [[one, other]]


def test_a_score_that_is_no_mean_has_no_interval(monkeypatch):
    part, texts = [item(at) for at in range(4)], ["a", "b", "a", "a"]
    assert intervals.singles("cls", part, texts, ["accuracy"])[:, 0].tolist() == [1, 0, 1, 1]
    monkeypatch.setattr(intervals.metrics, "score", lambda task, given, items, coco: {"accuracy": float(len(given) > 1)})
    assert intervals.singles("cls", part, texts, ["accuracy"]) is None


def test_a_row_that_is_scored_is_not_scored_again_for_its_intervals(monkeypatch):
    part, texts = [item(at) for at in range(4)], ["a", "b", "a", "a"]
    rows = {"trained": {"predictions": texts, "metrics": evaluate.score(part, texts)}}
    scored, real = [], intervals.metrics.score

    def counted(task, given, asked, coco):
        scored.append(len(given))
        return real(task, given, asked, coco)

    monkeypatch.setattr(intervals.metrics, "score", counted)
    found, drawn, _ = _details(part, rows)
    assert drawn == {"cls": "images"}
    assert found["trained"]["cls"]["accuracy"] == [0.75, 0.75]  # one image
    assert scored == [1, 1]  # each different answer; its groups add none


def test_the_command_takes_other_data_protocols_and_runs(copy, test_only_run, tmp_path, monkeypatch):
    shutil.copytree(copy, tmp_path / "runs" / "one")
    shutil.copytree(copy, tmp_path / "runs" / "two")
    for name, old, new in (("three", "limit: 4", "limit: 2"), ("four", "\n *- subject", "")):
        shutil.copytree(copy, tmp_path / "runs" / name)
        recipe = tmp_path / "runs" / name / "recipe.yaml"
        text, changes = re.subn(old, new, recipe.read_text())
        assert changes == 1
        recipe.write_text(text)
    monkeypatch.chdir(tmp_path)

    def run(*line):
        return CliRunner().invoke(cli.app, ["evaluate", *map(str, line)], env={"COLUMNS": "200", "TERM": "dumb"})

    root = test_only_run[1]
    line = ["--data", root, "--split", "test", "--protocol", "standard", "--against", "two", "--json", "scores.json", "evaluate.limit=2"]
    shown = run("one", *line)
    assert shown.exit_code == 0, shown.output
    scores = json.loads(Path("scores.json").read_text())
    assert scores["data"] == {"root": f"hospital ({root})", "sample": False, "protocol": "standard"}
    assert list(scores["splits"]) == ["test"]
    assert scores["against"]["run"] == "runs/two"
    found = [one for task in scores["against"]["splits"]["test"].values() for one in task.values() if isinstance(one, dict)]
    assert found
    assert all(one["difference"] == 0 for one in found)
    for words in ("scored strictly", "95 % interval", "intervals by bootstrap over images", "small less runs/two"):
        assert words in shown.output
    assert "headline metric of each task" not in shown.output
    assert "by organ, scored strictly: score (items)" in shown.output
    assert json.loads((tmp_path / "runs/one/metrics.json").read_text())["against"] == scores["against"]
    assert "Against runs/two" in report.write(tmp_path / "runs/one").read_text()
    assert "against" not in evaluate_run(
        tmp_path / "runs/one", ["evaluate.limit=1", "evaluate.splits=[slab]"]
    )  # nor in the file: it is new
    for wrong, words in (
        (["one", "--protocol", "loose"], "must be released or standard"),
        (["one", "--data", "absent"], "--data absent: no such folder"),
        (["one", "--against", "one"], "it is the run itself"),
        (["one", "--against", "three"], "scored on other data (split 'slab': 24 items here, 12 there, "),
        (["one", "--against", "four"], "is scored on slab, subject, runs/four on slab; choose the same for both with --split"),
    ):
        shown = run(*wrong)
        assert shown.exit_code == 2
        assert words in shown.output
        assert len(shown.output.strip().splitlines()) == 1
