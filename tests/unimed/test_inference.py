import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unimed
from unimed import Request
from unimed.errors import UserError
from unimed.inference.images import open_source

ROOT = Path(__file__).resolve().parents[2]


TRAINING = ("unimed.train", "peft")
HEAVY = (*TRAINING, "pydicom", "nibabel", "pyarrow", "pandas", "scipy", "sklearn", "matplotlib", "unimed.datasets.index", "unimed.sample")


def test_predict_imports_nothing_heavy_and_inference_nothing_of_training(small_run, picture):
    """What a first answer waits for: a reader of DICOM files or volumes is imported when such a file comes."""
    names = ["unimed.cli.predict", *(f"unimed.inference.{path.stem}" for path in (ROOT / "unimed" / "inference").glob("[a-z]*.py"))]
    code = f"""
import runpy, sys
sys.argv = ["unimed", "predict", {str(picture)!r}, "Which plane?", "--model", {str(small_run)!r}]
try:
    runpy.run_module("unimed", run_name="__main__")
except SystemExit as end:
    print("code", end.code or 0)
print("heavy", [name for name in sys.modules if name.startswith({HEAVY!r})])
import {", ".join(names)}
print("training", [name for name in sys.modules if name.startswith({TRAINING!r})])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-3:] == ["code 0", "heavy []", "training []"]
    for path in (ROOT / "unimed" / "inference").glob("*.py"):
        assert "unimed.train" not in path.read_text().replace("imports `unimed.train`", "")


def test_public_names():
    for name in unimed.__all__:
        assert getattr(unimed, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Example'"):
        unimed.Example  # noqa: B018


def test_batches_do_not_change_answers(session, slab):
    together = session.generate(slab, batch_size=7, max_new_tokens=8, details=True)
    single = [session.generate([item], max_new_tokens=8, details=True)[0] for item in slab]
    assert [one.text for one in together] == [one.text for one in single]
    assert [one.confidence for one in together] == pytest.approx([one.confidence for one in single], rel=1e-3)
    for one, other, item in zip(together, single, slab, strict=True):
        assert len(one.gates) == (5 if item.image is not None else 0)
        assert one.gates == pytest.approx(other.gates, abs=1e-4)
        assert sum(one.gates) == pytest.approx(1 if one.gates else 0, abs=1e-4)
    assert not session.model.training
    plain = session.generate(slab, batch_size=7, max_new_tokens=8)
    assert [one.text for one in plain] == [one.text for one in together]


def test_confidence_is_the_mean_probability_of_the_answer(session, slab):
    import torch

    item = slab[0]
    inputs = session._inputs([item], [6])
    with torch.inference_mode():
        made = session.model.generate(
            **inputs, max_new_tokens=6, do_sample=False, num_beams=1, output_logits=True, return_dict_in_generate=True
        )
    tokens = made.sequences[0, inputs["input_ids"].shape[1] :]
    chances = [step[0].float().softmax(-1)[token] for step, token in zip(made.logits, tokens, strict=True)]
    ends = [place for place, token in enumerate(tokens) if token in session.ends]
    chances = torch.stack(chances[: ends[0] + 1 if ends else None])
    expected = float(chances.log().mean().exp())
    assert session.generate([item], max_new_tokens=6, details=True)[0].confidence == pytest.approx(expected, rel=1e-4)


def test_blanked_means_black_and_only_that(session, slab, monkeypatch):
    seen = []
    original = type(session.processor).__call__

    def spy(self, *args, **kwargs):
        seen.extend(kwargs.get("images") or [])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(session.processor), "__call__", spy)
    session.generate(slab, max_new_tokens=1, blank_images=True)
    assert seen
    assert all(np.asarray(image).max() == 0 for image in seen)
    seen.clear()
    session.generate(slab, max_new_tokens=1)
    assert all(np.asarray(image).max() > 0 for image in seen)


def test_one_image_in_every_form_has_one_answer(session, picture):
    image = Image.open(picture)
    forms = [str(picture), picture, image, np.asarray(image), picture.read_bytes(), open_source(picture)]
    found = [session.answer(form, "which plane is shown", max_new_tokens=6) for form in forms]
    assert len({answer.text for answer in found}) == 1
    assert found[0].task == "vqa"
    assert 0 < found[0].confidence <= 1
    assert len(found[0].gates) == 5
    mixed = [Request(form, "liver", "refer", max_new_tokens=5 + place % 2) for place, form in enumerate(forms)]
    answers = session.answer([*mixed, Request(None, "where?", "qa")])
    assert [answer.task for answer in answers] == ["refer"] * 6 + ["qa"]
    assert [answer.text for answer in answers[:6:2]] == [session.answer(picture, "liver", "refer", max_new_tokens=5).text] * 3
    assert answers[-1].gates == ()


@pytest.mark.parametrize(
    "array",
    [
        np.tile(np.arange(256, dtype=np.uint16) * 257, (8, 1)),
        np.tile(np.arange(256, dtype=np.int64) * 257, (8, 1)),
        np.tile(np.arange(256, dtype=np.float64) / 255, (8, 1)),
        np.tile(np.arange(256, dtype=np.uint8), (8, 1)),
        np.repeat(np.tile(np.arange(256, dtype=np.uint8), (8, 1))[..., None], 3, axis=2),
    ],
    ids=str,
)
def test_arrays_of_any_depth_are_shown_alike(array):
    shown = np.asarray(open_source(array).rgb).astype(int)
    assert shown.shape == (8, 256, 3)
    assert abs(shown - np.arange(256)[:, None]).max() <= 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((2, 3, 4, 5), np.uint8), "it must be uint8"),
        (np.zeros((0, 4), np.uint8), "it must be uint8"),
        (np.array(["a"]), "it must be uint8"),
        (b"not an image", "image of 12 bytes: not a readable image"),
        (3, "type int: it must be a path"),
        ("absent.png", "absent.png: no such image"),
    ],
)
def test_what_is_no_image_is_one_line(source, words):
    with pytest.raises(UserError, match=words) as caught:
        open_source(source)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="image in memory"):
        open_source(np.zeros((4, 4), np.uint8), plane="coronal")


def test_pieces_join_to_the_answer(session, picture, slab):
    for question, task in (("which plane is shown", "vqa"), ("", "caption"), ("liver", "refer")):
        request = Request(picture, question, task, max_new_tokens=12)
        pieces = list(session.stream(request))
        assert "".join(pieces) == session.answer(request).text
        assert len(pieces) > 1 or len(pieces[0].split()) <= 1 or task == "refer"
    stream = session.stream(Request(picture, "", "caption", max_new_tokens=400))
    next(stream)
    stream.close()  # stops the model: the thread is joined
    assert not session.model.training
    with pytest.raises(UserError, match="do not fit the model's"):
        list(session.stream(Request(picture, "", "caption", max_new_tokens=5000)))
