"""What published layouts hold: classes of MedMNIST, whole vignettes, letters of options, folders of archives."""

import data_samples
import numpy as np
import pytest
from data_samples import medqa, write

from tests.unimed.test_data_bad_records import LONG, STANDARD, STRICT, told
from unimed.datasets import load_items
from unimed.errors import UserError
from unimed.records.policy import Rules

FLAT = {
    "pathmnist": 9, "dermamnist": 7, "octmnist": 4, "pneumoniamnist": 2, "retinamnist": 5, "breastmnist": 2, "bloodmnist": 8,
    "tissuemnist": 8, "organamnist": 11, "organcmnist": 11, "organsmnist": 11,
}  # fmt: skip

VOLUMES = {"organmnist3d": 11, "nodulemnist3d": 2, "adrenalmnist3d": 2, "fracturemnist3d": 3, "vesselmnist3d": 2, "synapsemnist3d": 2}


@pytest.mark.each
@pytest.mark.parametrize(("name", "classes"), [*FLAT.items(), *VOLUMES.items()])
def test_every_set_of_medmnist_has_class_names(tmp_path, name, classes):
    images = np.full((classes, 8, 8), 9, np.uint8)
    if name in VOLUMES:
        images = np.stack([np.full((classes, 8, 8), depth, np.uint8) for depth in range(9)], 1)
    np.savez(tmp_path / f"{name}_64.npz", train_images=images, train_labels=np.arange(classes).reshape(-1, 1))
    found = load_items(tmp_path, "train", rules=STRICT)
    answers = [item.answer for item in found]
    assert len(set(answers)) == classes
    assert found[0].question.endswith(": " + ", ".join(answers) + "?")
    assert found[0].question.count(",") == classes - 1  # no name holds the comma that divides them
    assert np.asarray(found[0].open()).max() == (4 if name in VOLUMES else 9)


def test_volumes_are_said_to_be_shown_by_a_slice_and_masks_are_visible(tmp_path, caplog):
    volume = np.zeros((1, 6, 8, 8), np.uint8)
    volume[0, 3, 2:4] = 1
    np.savez(tmp_path / "adrenalmnist3d.npz", train_images=volume, train_labels=[[1]])
    (only,) = load_items(tmp_path, "train", rules=STRICT)
    assert told(caplog) == ["medmnist (train): adrenalmnist3d.npz: volumes, shown by their middle slice"]
    assert (only.answer, only.size, np.asarray(only.open()).max()) == ("hyperplasia", (8, 8), 255)


def test_chestmnist_has_any_number_of_findings(tmp_path, caplog):
    labels = np.zeros((4, 14), np.uint8)
    labels[0, [1, 12]] = 1
    labels[1, 13] = 1
    labels[3, 0] = 7
    np.savez(tmp_path / "chestmnist.npz", train_images=np.zeros((4, 8, 8), np.uint8), train_labels=labels)
    found = load_items(tmp_path, "train")
    assert [item.answer for item in found] == ["cardiomegaly, pleural thickening", "hernia", "no finding"]
    assert found[0].question.startswith("Which findings are in the image: atelectasis, cardiomegaly, ")
    assert found[0].question.endswith(", hernia, or no finding?")
    assert "1 of 4 records left out: 1 with a label out of range (first: chestmnist.npz: train image 3: labels [7, 0" in told(caplog)[0]


@pytest.mark.parametrize(
    "options", [{"A": "Rest", "B": "Ampicillin"}, [{"key": "A", "value": "Rest"}, {"key": "B", "value": "Ampicillin"}]]
)
def test_the_standard_protocol_keeps_whole_vignettes_with_their_options(tmp_path, options):
    from unimed.tasks import prompts

    medqa(tmp_path, [{**LONG, "options": options}])
    (released,), (whole,) = load_items(tmp_path, "train"), load_items(tmp_path, "train", rules=STANDARD)
    assert len(released.question.split()) == 50
    assert "Which drug?" not in released.question
    assert whole.question.endswith("word Which drug? (A) Rest (B) Ampicillin")
    assert prompts.instruction(whole, None).endswith("Which drug? (A) Rest (B) Ampicillin")
    assert len(prompts.instruction(released, None).removeprefix("[qa] ").split()) == 50


@pytest.mark.parametrize("rules", [Rules(), STANDARD])
@pytest.mark.parametrize("row", [{"answer": "B"}, {"answer_idx": "B"}])
def test_the_answer_of_a_letter_is_the_text_of_its_option(tmp_path, row, rules):
    medqa(tmp_path, [{"question": "Which?", "options": {"A": "Rest", "B": "Ampicillin"}, **row}])
    assert [item.answer for item in load_items(tmp_path, "train", rules=rules)] == ["Ampicillin"]


def test_pubmedqa_as_published(tmp_path):
    rows = {str(i): {"QUESTION": f"Is it {i}?", "CONTEXTS": ["It was.", "So."], "final_decision": "yes"} for i in range(6)}
    write(tmp_path / "ori_pqal.json", rows)
    with pytest.raises(UserError, match=r"test_ground_truth\.json"):
        load_items(tmp_path, "train")
    write(tmp_path / "test_ground_truth.json", {"1": "yes", "4": "no"})
    ids = {split: [item.id for item in load_items(tmp_path, split)] for split in ("train", "val", "test")}
    with pytest.raises(UserError, match="split 'external'"):
        load_items(tmp_path, "external")
    assert ids == {"train": ["pubmedqa/0", "pubmedqa/2", "pubmedqa/3", "pubmedqa/5"], "val": [], "test": ["pubmedqa/1", "pubmedqa/4"]}
    assert load_items(tmp_path, "test", rules=STANDARD)[0].question == "It was. So. Is it 1?"
    with pytest.raises(UserError, match="split 'external'"):  # not the training split by another name
        load_items(tmp_path, "external")
    write(tmp_path / "dev_set.json", {"2": rows["2"]})
    assert [item.id for item in load_items(tmp_path, "train")] == ["pubmedqa/0", "pubmedqa/3", "pubmedqa/5"]


def test_path_vqa_in_the_folders_of_its_archive(tmp_path):
    data_samples.path_vqa(tmp_path)
    (tmp_path / "qas" / "train").mkdir(parents=True)
    (tmp_path / "train_vqa.json").rename(tmp_path / "qas" / "train" / "train_vqa.json")
    assert len(load_items(tmp_path, "train", rules=STRICT)) == 2
