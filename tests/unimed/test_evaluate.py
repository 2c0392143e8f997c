import json

import pytest

from unimed.errors import UserError
from unimed.evaluate import evaluate
from unimed.evaluate.run import answer_table, answered, evaluate_run, odd_answers
from unimed.inference.session import Generated, load
from unimed.records.example import Example
from unimed.tasks import RELEASED_TASKS, TASKS
from unimed.tasks.protocol import STANDARD
from unimed.train import config
from unimed.train.run import examples

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture(scope="module")
def slab(small_run):
    return evaluate.spread(examples(config.load(small_run / "recipe.yaml"), "slab"), 5)


@pytest.fixture(scope="module")
def session(small_run):
    return load(small_run)


class Parrot:
    """Stands for a session: answers every example as `speak` says."""

    def __init__(self, speak):
        self.speak = speak

    def generate(self, examples, batch_size=40, max_new_tokens=100, blank_images=False, progress=None):
        return [Generated(self.speak(example, blank_images), 1.0, ()) for example in examples]


def test_progress_counts_every_example_once(session, slab):
    counts = []
    result = evaluate.evaluate(session, slab, batch_size=3, progress=counts.append, max_new_tokens=2)
    assert sum(counts) == len(slab) == len(result["predictions"])
    assert set(result["metrics"]) == set(RELEASED_TASKS)


def test_the_perfect_model_scores_one_and_beats_the_others(slab, small_run):
    train_examples = examples(config.load(small_run / "recipe.yaml"), "train")
    perfect = Parrot(lambda example, blanked: "nothing" if blanked else example.answer)
    silent = Parrot(lambda example, blanked: "")
    rows = evaluate.compare(silent, perfect, train_examples, slab)
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
    train_examples = examples(config.load(small_run / "recipe.yaml"), "train")
    majority = evaluate.MajorityAnswers.fit(train_examples)
    rows = evaluate.compare(None, Parrot(lambda example, blanked: majority.predict(example)), train_examples, slab)
    assert evaluate.UNTRAINED not in rows
    assert not any(evaluate.verdict(rows).values())


def test_a_task_that_training_lacks_has_no_majority_answer_and_no_verdict(slab):
    some = [example for example in slab if example.task in ("vqa", "qa")]
    perfect = Parrot(lambda example, blanked: example.answer)
    rows = evaluate.compare(None, perfect, [example for example in some if example.task == "qa"], some)
    assert set(rows[evaluate.MAJORITY]["metrics"]) == {"qa"}
    assert rows[evaluate.MAJORITY]["predictions"].count(None) == sum(example.task == "vqa" for example in some)
    assert set(evaluate.verdict(rows)) == {"qa"}


def test_spread_takes_an_even_share_of_every_task():
    many = [Example(str(i), task, "d", "", "", None, None, None, "t") for task in ("vqa", "qa") for i in range(100)]
    kept = evaluate.spread(many, 4)
    assert [example.id for example in kept] == ["0", "25", "50", "75"] * 2
    assert evaluate.spread(many, 0) == many


def test_evaluating_a_run_writes_its_metrics_and_predictions(evaluated_run):
    result = json.loads((evaluated_run / "metrics.json").read_text())
    stored = json.loads((evaluated_run / "predictions.json").read_text())
    assert result["notice"] == "Research use, not for diagnosis"
    assert set(result["splits"]) == {"slab", "subject"}
    for split, part in result["splits"].items():
        assert part["counts"] == dict.fromkeys(RELEASED_TASKS, 4)
        assert set(part["rows"]) == set(evaluate.ROWS)
        assert set(part["better"]) == set(RELEASED_TASKS)
        assert all(len(texts) == len(stored[split]["ids"]) == 24 for texts in stored[split]["rows"].values())
        held_out = {example.id: example for example in examples(config.load(evaluated_run / "recipe.yaml"), split)}
        assert part["rows"][evaluate.TRAINED]["refer"].keys() >= {"empty", "unparsable", "inverted", "chatty", "miou", "miou_strict"}
        again = evaluate.score([held_out[key] for key in stored[split]["ids"]], stored[split]["rows"][evaluate.TRAINED])
        assert again == part["rows"][evaluate.TRAINED]
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
    stored = json.loads((run / "predictions.json").read_text())["test"]
    assert stored["data"]["root"] == str(root)
    assert [example.id for example in answered(stored["data"])] == stored["ids"]


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
