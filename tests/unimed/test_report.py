import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from unimed.errors import UserError
from unimed.report import gallery, page, plots, report
from unimed.tasks import RELEASED_TASKS
from unimed.tasks.item import Item
from unimed.train.telemetry import RouterHistory, describe

VOID = {"meta", "br", "img", "input", "hr", "path", "use", "rect", "image", "link"}


class Outline(HTMLParser):
    """Collects ids and addresses, and checks that elements close in order."""

    def __init__(self):
        super().__init__()
        self.ids, self.addresses, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.addresses += [value for key, value in attrs.items() if key.split(":")[-1] in ("href", "src", "data", "action") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html(evaluated_run):
    return report.write(evaluated_run).read_text(encoding="utf-8")


def outline(html):
    found = Outline()
    found.feed(html)
    return found


def test_the_page_is_whole_and_loads_nothing(html):
    found = outline(html)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    for address in found.addresses:
        assert address.startswith(("#", "data:image/png;base64,")), address[:80]
    assert {address[1:] for address in found.addresses if address.startswith("#")} <= set(found.ids)
    assert "default-src 'none'" in html
    assert not re.search(r"url\((?!#)|@import|<script", html)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http-equiv', "", html)


def test_the_page_says_what_it_must(html, evaluated_run):
    text = re.sub(r"<[^>]+>", " ", html)
    for words in ("Research use, not for diagnosis", "synthetic", "No generalisation", "majority answer", "image blanked", "untrained"):
        assert words in text
    assert all(f"<br>{metric}</th>" in html for metric in json.loads((evaluated_run / "metrics.json").read_text())["headline"].values())
    assert "max_steps: 12" in text


def test_every_number_of_the_table_is_the_one_that_was_measured(html, evaluated_run):
    result = json.loads((evaluated_run / "metrics.json").read_text())
    shown = [float(value) for value in re.findall(r"<td class=value>([\d.]+)<", html)]
    expected = [
        part["rows"][row][task][result["headline"][task]]
        for task in RELEASED_TASKS
        for row in ("untrained", "majority answer", "image blanked", "trained")
        for part in result["splits"].values()
    ]
    assert shown == pytest.approx(expected, abs=5e-4)


def test_the_strict_value_stands_beside_each(html, evaluated_run):
    result = json.loads((evaluated_run / "metrics.json").read_text())
    shown = [float(value) for value in re.findall(r'<td class="value strict">([\d.]+)<', html)]
    expected = [
        part["rows"][row][task][result["strict"][task]]
        for task in RELEASED_TASKS
        for row in ("untrained", "majority answer", "image blanked", "trained")
        for part in result["splits"].values()
    ]
    assert shown == pytest.approx(expected, abs=5e-4)
    assert "repeats count" in html  # what the headline F1 is


def test_odd_answers_are_in_the_page(evaluated_run, html):
    result = json.loads((evaluated_run / "metrics.json").read_text())
    assert page.macro("score_table", report.table(result)) in html
    result["splits"]["slab"]["rows"]["trained"]["refer"] |= {"empty": 0, "unparsable": 21, "inverted": 22, "chatty": 23}
    made = page.macro("score_table", report.table(result))
    assert "<td>refer</td><td>4</td><td>0</td><td>21</td><td>22</td><td>–</td><td>23</td>" in made


DEMO_ONLY = ("TotalSegmentator", "mask", "slab", "slices", "CT ", "MR", "Radiological", "anatomy", "held-out subject", "synthetic")


def test_nothing_of_the_sample_is_said_of_other_data(test_only_run):
    run, _, _ = test_only_run
    html = report.write(run).read_text(encoding="utf-8")
    prose = re.sub(
        r"<svg.*?</svg>|<pre>.*?</pre>|<style>.*?</style>|<div class=\"item.*?</div></div>|<figcaption>.*?</figcaption>",
        " ",
        html,
        flags=re.S,
    )
    text = re.sub(r"<[^>]+>", " ", prose)
    assert [words for words in DEMO_ONLY if words in text] == []
    assert "majority answer" in text
    assert "not fitted" in text
    assert "test split" in text
    assert "is missing" in text  # the untrained model
    assert "12 items of hospital" in text
    assert "The training data is not there any more" in text
    assert len(re.findall("<tr[^>]*><th rowspan=3>", html)) == 4


def test_the_page_shows_what_was_answered_or_says_that_it_cannot(test_only_run, tmp_path):
    run, root, _ = test_only_run
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    path = moved / "predictions.jsonl"
    path.write_text(path.read_text().replace(json.dumps(str(root)), json.dumps(str(copy))))
    report.write(moved)
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:-20]))
    with pytest.raises(UserError, match=r"lacks answers of the 'test' split; finish it with: unimed evaluate"):
        report.write(moved)
    path.write_text(whole)
    lines = copy / "records-00000.jsonl"
    lines.write_text(lines.read_text().replace('answer": "', 'answer": "not '))
    with pytest.raises(UserError, match=r"not those that were answered.*unimed evaluate"):
        report.write(moved)
    result = json.loads((moved / "metrics.json").read_text())
    del result["splits"]["test"]["intervals"]
    (moved / "metrics.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"older version.*unimed evaluate"):
        report.write(moved)


def test_subjects_that_training_shows_are_counted(html):
    text = re.sub(r"<[^>]+>", " ", html)
    assert "Subjects that the training data shows as well: sample 2 of 2." in text
    assert "sample 0 of 1." in text
    facts = {"datasets": ["a", "b"], "subjects": {"a": 0, "b": 3}, "subjects_in_training": {"a": 0, "b": 1}}
    assert report._who({"counts": {"vqa": 5}, "facts": facts}).endswith(
        "b 1 of 3. Nothing names the subjects of a: the same people may be in training."
    )


def test_text_of_a_model_cannot_become_markup(evaluated_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["text"] = "<script>alert(1)</script>"
    (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = report.write(run).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_the_same_run_gives_the_same_page(evaluated_run, html):
    assert report.write(evaluated_run).read_text(encoding="utf-8") == html


@pytest.mark.parametrize(
    ("name", "words"), [("metrics.json", "unimed evaluate"), ("recipe.yaml", "unimed train"), ("predictions.jsonl", "unimed evaluate")]
)
def test_what_is_missing_is_named_with_its_command(evaluated_run, tmp_path, name, words):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    (run / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*{words}"):
        report.write(run)


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (200, 100))
    drawn = page.macro("picture", gallery.picture(image, (10, 20, 30, 40), (50, 60, 80, 90)))
    assert 'viewBox="0 0 200 100"' in drawn
    assert re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn) == [
        ("10.0", "20.0", "20.0", "20.0"),
        ("50.0", "60.0", "30.0", "30.0"),
    ]
    assert "<rect" not in page.macro("picture", gallery.picture(image, None, None))


def test_the_grid_goes_from_the_best_box_to_the_worst():
    box = (10.0, 10.0, 60.0, 60.0)
    truth = Item("a", "refer", "d", "liver", "{<10><10><60><60>}", None, (100, 100), box, "refer/liver")
    texts = ["none", "liver: {<10><10><60><60>}", "{<10><10><30><60>}", "{<60><60><10><10>}"]
    found = gallery.box_grid([truth] * 4, texts, lambda item: Image.new("RGB", (100, 100)))
    grid = page.macro("box_grid", found, "", true_colour="green", guess_colour="red")
    scores = re.findall(r"IoU ([\d.]+)|(no box|wrong order)", grid)
    assert [none for _, none in scores] == ["", "", "no box", "wrong order"]
    assert float(scores[0][0]) > float(scores[1][0])
    assert "among other text" in grid
    assert 'x="10.0" y="10.0" width="50.0" height="50.0"' in grid.rpartition("<figure>")[2]  # the inverted box, in order
    assert gallery.spread(100, 4) == [0, 33, 66, 99]


def test_gates_are_described():
    import torch

    even = describe(torch.full((2, 3, 4), 0.25))
    assert even["gates"] == pytest.approx([0.25] * 4)
    assert even["entropy"] == pytest.approx(1)
    sharp = describe(torch.eye(4)[[1, 1, 2]])
    assert sharp["entropy"] == 0
    assert sharp["load"] == pytest.approx([0, 2 / 3, 1 / 3, 0])
    assert describe(torch.ones(5, 1)) == {"gates": [1.0], "entropy": 0.0, "load": [1.0]}


def test_the_history_keeps_tasks_apart_and_lets_go_of_the_graph():
    import torch

    history = RouterHistory()
    gates = torch.rand(2, 3, requires_grad=True).softmax(-1)
    history.add("vqa", gates)
    assert not any(part.requires_grad for parts in history._open.values() for part in parts)
    history.add("cls", torch.eye(3))
    assert set(history.close(4)) == {"vqa", "cls"}
    assert history.close(6) == {}
    assert [entry["step"] for entry in history.entries] == [4]


def test_smoothing_keeps_a_constant_and_follows_a_step():
    assert plots.smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert plots.smooth([0.0, 1.0])[1] == pytest.approx(1 / 1.8)
