"""What is asked: boxes typed and drawn, tasks, class lists; rows, a folder, a chat."""

import io
import json
import math
import shutil

import numpy as np
import pytest
from dicom_samples import dicom_file
from PIL import Image
from typer.testing import CliRunner

import unimed
from tests.unimed.test_inference import ROOT
from unimed import Request
from unimed.cli import app as cli
from unimed.errors import UserError
from unimed.inference import draw
from unimed.inference.follow import Follow
from unimed.inference.images import open_source
from unimed.inference.request import prepare, read_box
from unimed.inference.rows import Row, answer_rows, read_rows
from unimed.inference.session import Session
from unimed.records import box as boxes
from unimed.records.box import Placement
from unimed.records.pixels import Opened

SAMPLE_VOLUME = ROOT / "unimed" / "sample" / "assets" / "mr.nii.gz"


def run(*line, **options):
    return CliRunner().invoke(cli.app, [str(part) for part in line], env={"COLUMNS": "200", "TERM": "dumb"}, **options)


@pytest.fixture
def asked(tmp_path):
    """Reads one answer about a grey image of 50 x 50 pixels."""
    image = tmp_path / "grey.png"
    Image.new("L", (50, 50), 90).save(image)
    return lambda text, question, task: (
        (one := prepare(Request(image, question, task))),
        Session.read(one, text),
    )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{<10><20><30><40>}", ""),
        ("the liver: {<10><20><30><40>}", "chatty"),
        ("{<30><40><10><20>}", "inverted"),
        ("{<10><20><30><40>} {<1><1><2><2>}", "unparsable"),
    ],
)
def test_every_box_in_an_answer_can_be_drawn(asked, tmp_path, text, kind):
    one, answer = asked(text, "liver", "refer")
    assert answer.box == (5, 10, 15, 20)
    assert answer.parsed.kind == kind
    drawn = tmp_path / "drawn.png"
    draw.save(one.opened, answer.box, drawn)
    with Image.open(drawn) as image:
        assert image.convert("RGB").getpixel((5, 15)) == (255, 138, 31)
    with pytest.raises(UserError, match="no box to draw"):
        draw.save(one.opened, None, drawn)
    with pytest.raises(UserError, match="must end in"):
        draw.save(one.opened, answer.box, tmp_path / "a.bmp")


def test_boxes_are_in_pixels_of_the_file():
    halved = Opened(Image.new("RGB", (50, 20)), ("x",), Placement(a=2.0, e=2.0))
    one = prepare(Request(halved, "20,8,60,32", "identify"))
    assert one.box == (20, 8, 60, 32)
    assert one.item.question == "{<20><20><60><80>}"
    answer = Session.read(prepare(Request(halved, "liver", "refer")), "{<20><20><60><80>}")
    assert answer.box == (20, 8, 60, 32)
    with pytest.raises(UserError, match="which is 0, 0, 100, 40 in pixels of the file"):
        prepare(Request(halved, "20,8,101,32", "identify"))


@pytest.mark.parametrize("text", ["10,20,30,40", " 10 20 30 40 ", "10, 20, 30, 40", "{<20><40><60><80>}"])
def test_a_box_can_be_typed(text):
    assert read_box(text, Opened(Image.new("RGB", (50, 50)))) == (10, 20, 30, 40)


@pytest.mark.parametrize("text", ["10,20,30", "a,b,c,d", "30,20,10,40", "10,20,30,60", "-1,0,5,5", "nan,0,5,5", "inf,0,5,5", ""])
def test_a_wrong_box_says_how_to_write_one(text):
    with pytest.raises(UserError, match="box"):
        read_box(text, Opened(Image.new("RGB", (50, 50))))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("x.png", "q", "speech"), "task 'speech'.*vqa, refer"),
        (Request(None, "q"), "needs an image"),
        (Request("x.png", "q", "qa"), "takes no image"),
        (Request("x.png", ""), "needs a question"),
        (Request("x.png", "q"), "no such image"),
        (Request("x.png", "q", max_new_tokens=0), "max_new_tokens=0"),
    ],
)
def test_asking_wrongly_names_what_is_wrong(request_, words):
    with pytest.raises(UserError, match=words):
        prepare(request_)


def test_asking_each_task(session, picture):
    questions = {"vqa": "which plane is shown", "refer": "liver", "identify": "5,5,15,15", "caption": "", "cls": "", "qa": "where?"}
    for task, question in questions.items():
        answer = session.answer(None if task == "qa" else picture, question, task, max_new_tokens=8)
        assert isinstance(answer.text, str)
        assert (answer.box is not None) == (task == "identify" or (task == "refer" and bool(boxes.find(answer.text)[0])))
    assert session.answer(picture, "5,5,15,15", "identify", max_new_tokens=2).box == (5, 5, 15, 15)


def test_a_model_of_several_class_lists_is_asked_the_one_that_is_meant():
    organ, lesion = "Which organ is in the image: liver, spleen?", "Which skin lesion is in the image: melanoma?"
    image = Image.new("RGB", (4, 4))

    def asked(question, known):
        return prepare(Request(image, question, "cls"), known).item.question

    with pytest.raises(UserError, match=r"2 lists of classes; ask one, or a word of it: Which organ .*\| Which skin lesion"):
        asked("", (organ, lesion))
    assert asked("lesion", (organ, lesion)) == lesion
    assert asked(organ, (organ, lesion)) == organ
    assert asked("Which side: left, right?", (organ, lesion)) == "Which side: left, right?"
    assert asked("", (organ,)) == organ
    with pytest.raises(UserError, match="needs the question that lists the classes"):
        asked("", ())


def test_a_wrong_dtype_and_a_broken_recipe_are_one_line(small_run, tmp_path):
    with pytest.raises(UserError, match="dtype 'int8': it must be auto, fp32"):
        unimed.load(small_run, dtype="int8")
    (tmp_path / "model").symlink_to(small_run / "model")
    (tmp_path / "recipe.yaml").write_text("{]")
    with pytest.raises(UserError, match="not a recipe"):
        unimed.load(tmp_path)
    with pytest.raises(UserError, match="no trained model there"):
        unimed.load(tmp_path / "absent")


@pytest.fixture
def rows(picture, tmp_path):
    """A JSONL file of four good rows and four bad ones."""
    lines = [
        {"image": str(picture), "question": "which plane is shown"},
        {"id": "b", "image": str(picture), "task": "caption"},
        {"image": "absent.png", "question": "which plane"},
        {"image": str(picture), "question": "liver", "task": "refer"},
        {"question": "where is the liver?", "task": "qa"},
        {"image": str(picture), "prompt": "which plane"},
        {"id": "b", "image": str(picture), "question": "again"},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not json\n")
    return source


def test_rows_go_in_and_answers_come_out(session, small_run, rows, tmp_path, monkeypatch):
    out = tmp_path / "out" / "answers.jsonl"
    like = Request(max_new_tokens=6)
    calls = []
    original = Session.answer_prepared
    monkeypatch.setattr(Session, "answer_prepared", lambda self, asked: calls.append(len(asked)) or original(self, asked))
    done = answer_rows(session, read_rows(rows, like), out, batch=3)
    assert (done.answered, done.before, len(done.bad)) == (4, 0, 4)
    assert calls == [3, 1]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in found] == ["1", "b", "4", "5"]
    assert found[0]["text"] == session.answer(found[0]["image"], found[0]["question"], max_new_tokens=6).text
    bad = "\n".join(done.bad)
    for words in (
        "absent.png: no such image",
        "rows.jsonl:6: unknown field 'prompt'; valid are",
        "b: another row has this id",
        "rows.jsonl:8: not valid",
    ):
        assert words in bad
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1] + lines[2][:20])  # killed while it wrote
    done = answer_rows(session, read_rows(rows, like), out, batch=3)
    assert (done.answered, done.before) == (2, 2)
    assert out.read_bytes() == whole
    calls.clear()
    assert answer_rows(session, read_rows(rows, like), out).before == 4
    assert calls == []
    with pytest.raises(UserError, match="unknown field 'prompt'"):
        answer_rows(session, (row for row in read_rows(rows, like) if row.id == "6"), None, strict=True)
    rows.write_text(rows.read_text().replace("liver", "spleen", 1))
    with pytest.raises(UserError, match="4: its question was 'liver' and is now 'spleen'; name another --out"):
        answer_rows(session, read_rows(rows, like), out)
    other = Session(session.model, session.processor, name="another")
    with pytest.raises(UserError, match="not by 'another'"):
        answer_rows(other, read_rows(rows, like), out)
    again = Session(session.model, session.processor, name=session.name, weights="others")
    with pytest.raises(UserError, match="by other weights of the model"):
        answer_rows(again, read_rows(rows, like), out)


def test_an_answer_to_another_view_or_length_is_another(session, picture, tmp_path):
    out = tmp_path / "answers.jsonl"

    def ask(**fields):
        row = Row("a", picture.name, Request(picture, "which plane is shown", **{"max_new_tokens": 3, **fields}))
        return answer_rows(session, iter([row]), out)

    assert ask().answered == ask().before == 1
    for name, value in {"plane": "coronal", "slice": 2, "window": (0, 50), "max_new_tokens": 4}.items():
        with pytest.raises(UserError, match=f"a: its {name} was .* and is now .*; name another --out"):
            ask(**{name: value})


def test_a_row_that_is_too_long_is_named_and_the_others_are_answered(session, picture, tmp_path):
    lines = [{"id": f"g{i}", "image": str(picture), "question": "which plane"} for i in range(4)]
    lines[1]["question"] = "which plane is shown " * 400
    lines[3]["max_new_tokens"] = 100_000
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = answer_rows(session, read_rows(tmp_path / "rows.jsonl", Request(max_new_tokens=3)), tmp_path / "out.jsonl")
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["g0", "g2"]
    assert [text.split(":")[0] for text in done.bad] == ["g1", "g3"]
    with pytest.raises(UserError, match="g1: prompt 0 has"):
        answer_rows(session, read_rows(tmp_path / "rows.jsonl", Request(max_new_tokens=3)), None, strict=True)


def test_rows_with_a_byte_order_mark_and_without_ids(picture, tmp_path):
    lines = [{"id": None, "image": str(picture), "question": "a"}, {"id": None, "image": str(picture), "question": "b"}]
    lines.append({"image": str(picture), "window": [-math.inf, 5]})
    source = tmp_path / "rows.jsonl"
    source.write_text("\ufeff" + "".join(json.dumps(line) + "\n" for line in lines))
    found = list(read_rows(source, Request()))
    assert [row.id for row in found] == ["1", "2", "3"]
    assert [row.request.question for row in found[:2]] == ["a", "b"]
    assert "window is [-inf, 5]" in str(found[2].request)


def test_answers_in_the_folder_that_is_asked_about_are_no_image_of_it(session, picture, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(picture, folder / "one.png")
    for _ in range(2):
        done = answer_rows(session, read_rows(folder, Request(max_new_tokens=3, task="caption")), folder / "answers.jsonl")
        assert done.bad == []


def test_predict_takes_a_folder_and_jsonl(small_run, rows, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(small_run.parents[1])
    shown = run("predict", rows, "--out", tmp_path / "a.jsonl")
    assert shown.exit_code == 1
    assert "4 answers, 4 left out" in shown.output
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "one.jpg").write_bytes(picture.read_bytes())
    (folder / "two.png").write_bytes(b"broken")
    shown = run("predict", folder, "which plane is shown")
    assert shown.exit_code == 1
    lines = [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]
    assert [line["id"] for line in lines] == ["one.jpg"]
    assert "two.png: not a readable image" in shown.output
    assert run("predict", folder, "which plane", "--strict").exit_code == 2
    shown = run("predict", picture, "which plane is shown", "--json")
    assert json.loads(shown.stdout)["task"] == "vqa"
    for line, words in (
        (["predict", picture, "q", "--out", tmp_path / "b.jsonl"], "for a folder or a JSONL file"),
        (["predict", folder, "q", "--save", tmp_path / "b.png"], "holds many"),
    ):
        shown = run(*line)
        assert shown.exit_code == 2
        assert words in shown.output
    (tmp_path / "empty.jsonl").write_text("")
    assert "no file or row there" in run("predict", tmp_path / "empty.jsonl").output


def test_chat_streams_and_takes_commands(small_run, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(small_run.parents[1])
    calls = []
    original = Session.stream
    monkeypatch.setattr(Session, "stream", lambda self, request: calls.append(request.question) or original(self, request))
    drawn = tmp_path / "drawn.png"
    typed = ["which plane is shown", "and which organ", "/save x.png", "/task identify", "5,5,15,15", f"/save {drawn}", "/task song"]
    typed += ["/image absent.png", f"/image {picture}", "/save x.png", "/dance", "/help", "/task qa", "where?"]
    typed += ["/image", "/save", "/task severity", f"/image {SAMPLE_VOLUME}", "/quit", "never"]
    shown = run("chat", picture, input="\n".join(typed) + "\n")
    assert shown.exit_code == 0, shown.output
    assert calls == ["which plane is shown", "and which organ", "5,5,15,15", "where?"]
    assert drawn.read_bytes().startswith(b"\x89PNG")
    for words in (
        "not trained for dialogue: it gets the last question only",
        "no box to draw",
        "task song: not one of this model's; valid are vqa, refer, identify, caption, cls, qa\n",
        "task severity: not one of this model's",
        "/image: it needs a name behind it",
        "/save: it needs a name behind it",
        "axial slice 10 of 0 to 19 · ",
        "absent.png: no such image",
        "no answer yet",
        "/dance: no such command",
        "Research use, not for diagnosis",
    ):
        assert words in shown.output


def test_ctrl_c_stops_an_answer_and_not_the_chat(small_run, picture, monkeypatch):
    monkeypatch.chdir(small_run.parents[1])
    original = Session.stream

    def interrupted(self, request):
        yield "begun"
        raise KeyboardInterrupt

    def stream(self, request):
        return (interrupted if request.question == "first" else original)(self, request)

    monkeypatch.setattr(Session, "stream", stream)
    shown = run("chat", picture, input="first\n/task qa\nsecond\n/quit\n")
    assert shown.exit_code == 0, shown.output
    assert "begun" in shown.output
    assert "stopped" in shown.output
    assert "qa> " in shown.output


def test_a_second_question_loads_nothing_again(session, picture, monkeypatch):
    session.answer(picture, "which plane is shown", max_new_tokens=2)
    opened = []
    original = io.open
    monkeypatch.setattr("builtins.open", lambda file, *args, **kwargs: opened.append(str(file)) or original(file, *args, **kwargs))
    session.answer(picture, "which organ is shown", max_new_tokens=2)
    assert [name for name in opened if name != str(picture)] == []


class Noted(Follow):
    """Notes pieces and ends in the order in which they come; `stop` gives the number of pieces after which a row ends."""

    def __init__(self, stop=None):
        self.events, self.stop = [], stop or {}

    def of(self, row):
        return [what for at, what in self.events if at == row]

    def stopped(self, row):
        return row in self.stop and len(self.of(row)) >= self.stop[row]

    def streams(self, row):
        return row != 1

    def piece(self, row, text):
        self.events.append((row, text))

    def done(self, row, made):
        self.events.append((row, made))


def test_rows_of_a_batch_are_followed_each_to_its_own_limit(session, slab):
    slab = slab[::4]
    limits = [(1, 9, 4, 12, 6)[place % 5] for place in range(len(slab))]
    single = [session.generate([item], max_new_tokens=most, details=True)[0] for item, most in zip(slab, limits, strict=True)]
    seen = Noted()
    together = session.generate(slab, 3, limits, follow=seen)
    for row, (one, alone) in enumerate(zip(together, single, strict=True)):
        assert one._replace(confidence=0, gates=()) == alone._replace(confidence=0, gates=())
        assert one.confidence == pytest.approx(alone.confidence, rel=1e-3)
        assert one.gates == pytest.approx(alone.gates, abs=1e-4)
        *pieces, made = seen.of(row)
        assert made == one
        assert "".join(pieces) == ("" if row == 1 else one.text)
        assert one.tokens == limits[row] if not one.ended else one.tokens <= limits[row]
    ends = [row for row, what in seen.events if not isinstance(what, str)]
    assert ends.index(0) < ends.index(1)  # a short answer does not wait for the longest of its batch
    seen = Noted(stop={3: 0})
    stopped = session.generate(slab, 5, limits, follow=seen)
    assert seen.of(3) == []
    assert [one.text for one in stopped] == [one.text if row != 3 else "" for row, one in enumerate(single)]


def test_a_long_neighbour_does_not_push_a_request_out_of_the_positions(session, monkeypatch):
    """Padding is no part of a prompt: what is answered by itself is answered in a batch."""
    short, long = Request(None, "where?", "qa", max_new_tokens=9), Request(None, "where " * 40, "qa", max_new_tokens=2)
    items = [prepare(request).item for request in (short, long)]
    lengths = session._inputs(items, [1, 1])["attention_mask"].sum(1).tolist()
    monkeypatch.setattr(session.model.config.text_config, "max_position_embeddings", lengths[1] + 2)
    assert lengths[0] + 9 <= lengths[1] + 2 < lengths[1] + 9
    assert session.answer([short, long])[0].text == session.answer(short).text


def test_image_bytes_never_touch_the_disk(picture, tmp_path, monkeypatch):
    import tempfile
    import zipfile

    import nibabel as nib

    def never(*args, **kwargs):
        raise AssertionError("a file was made")

    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    place = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1]}
    slices = [dicom_file(grey, ImagePositionPatient=[0, 0, z], **place) for z in range(3)]
    (tmp_path / "one.dcm").write_bytes(slices[0])
    nib.save(nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)), tmp_path / "v.nii.gz")
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for z, data in enumerate(slices):
            archive.writestr(f"{z}.dcm", data)
    files = [picture, *sorted(tmp_path.iterdir())]
    expected = [open_source(file) for file in files]
    for name in ("mkdtemp", "mkstemp", "NamedTemporaryFile", "TemporaryFile"):
        monkeypatch.setattr(tempfile, name, never)
    for file, one in zip(files, expected, strict=True):
        found = open_source(file.read_bytes())
        assert found.rgb.tobytes() == one.rgb.tobytes()
        assert found.notes == one.notes
        assert found.to_original == one.to_original
