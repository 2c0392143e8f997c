"""Very small data sets in the layouts that the loaders read."""

import copy
import json

import numpy as np
from hypothesis import strategies as st
from PIL import Image


def picture(path, size=(40, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 128).save(path)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


RECORD = {"img_id": 0, "img_name": "xmlab0/source.jpg", "q_lang": "en", "qid": 0, "location": "Abdomen", "modality": "MRI"}
QUESTIONS = [
    {
        **RECORD,
        "question": "What modality is used  to take this image?",
        "answer": "MRI",
        "answer_type": "OPEN",
        "content_type": "Modality",
    },
    {**RECORD, "question": "Does the picture contain lung?", "answer": "No", "answer_type": "CLOSED", "content_type": "Organ", "qid": 1},
    {**RECORD, "question": "图中是否有肺?", "answer": "没有", "answer_type": "CLOSED", "q_lang": "zh", "qid": 2},
]
DETECTIONS = [{"Liver": [4.0, 5, 10, 10]}, {"Spleen": [30, 2, 8, 8]}]


def slake(root, questions=QUESTIONS, detections=DETECTIONS, cases="xmlab0\n"):
    """As the release has it: lists of cases, each case with its own questions."""
    picture(root / "imgs" / "xmlab0" / "source.jpg")
    write(root / "imgs" / "xmlab0" / "question.json", questions)
    write(root / "imgs" / "xmlab0" / "detection.json", detections)
    write(root / "train.txt", cases)
    write(root / "test.txt", "")
    return root


def published_slake(root, rows=QUESTIONS, detections=DETECTIONS):
    """As published: one list of questions a split."""
    picture(root / "imgs" / "xmlab0" / "source.jpg")
    picture(root / "imgs" / "xmlab1" / "source.jpg")
    write(root / "imgs" / "xmlab0" / "detection.json", detections)
    write(root / "imgs" / "xmlab0" / "question.json", rows)
    write(root / "train.json", rows)
    write(root / "validate.json", [])
    write(root / "test.json", [{**QUESTIONS[0], "img_name": "xmlab1/source.jpg", "qid": 9}])
    write(root / "mask.txt", "1:Liver\n")
    return root


def sa_med2d(root, boxes=({"left kidney": [0, 0, 20, 10]}, {"spleen": [20, 5, 10, 10]})):
    picture(root / "images_small_train" / "ct_00" / "ct_00--a--0001.png")
    write(root / "regions_small_train" / "ct_00" / "ct_00--a--0001.json", list(boxes))
    return root


PATH_VQA = [
    {
        "img_id": "train_0422",
        "sent": "Where are  liver cells?",
        "question_id": 100422000,
        "label": {"in the center": 1},
        "answer_type": "other",
    },
    {"img_id": "train_0422", "sent": "Is it normal?", "question_id": 100422001, "label": {"no": 1, "yes": 0.3}, "answer_type": "yes/no"},
]


def path_vqa(root, rows=PATH_VQA):
    picture(root / "images" / "train" / "train_0422.jpg")
    write(root / "train_vqa.json", rows)
    return root


REPORTS = [
    {"id": "a", "study_id": 1, "subject_id": 10, "image_path": ["p10/a.jpg", "p10/b.jpg"], "report": " Heart\n normal.", "split": "train"},
    {"id": "b", "study_id": 2, "subject_id": 10, "image_path": ["p10/a.jpg"], "report": "Clear.", "split": "train"},
]


def reports(root, records=REPORTS):
    picture(root / "files" / "p10" / "a.jpg")
    write(root / "annotation.json", {"train": records, "val": [], "test": []})
    return root


CAPTIONS = 'name,context,type\na.png,"A mass,\nin the liver",caption\nb.png,Two,caption\na.png,What is it?,vqa\n'


def medpix(root, text=CAPTIONS):
    picture(root / "a.png")
    picture(root / "images" / "b.png")
    write(root / "MedPix_single_train.csv", text)
    return root


MEDQA = [
    {"question": "What helps?", "answer": "Rest", "options": {"A": "Rest", "B": "Ampicillin"}, "meta_info": "step1", "answer_idx": "A"},
    {"question": "Which bone?", "answer": "Femur", "options": {"A": "Tibia", "B": "Femur"}, "meta_info": "step1", "answer_idx": "B"},
]


def medqa(root, rows=MEDQA):
    write(root / "questions" / "US" / "train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return root


PUBMEDQA = {
    "21645374": {"QUESTION": "Do mitochondria play a role?", "CONTEXTS": ["First part.", "Second."], "final_decision": "yes"},
    "12377809": {"QUESTION": "Is it safe?", "CONTEXTS": ["Third."], "final_decision": "no"},
}


def pubmedqa(root, rows=PUBMEDQA):
    write(root / "train_set.json", rows)
    return root


def medmnist(root, name="organsmnist_28", labels=((4,), (5,), (10,))):
    root.mkdir(parents=True, exist_ok=True)
    images = np.arange(len(labels) * 28 * 28, dtype=np.uint32).reshape(-1, 28, 28).astype(np.uint8)
    np.savez(root / f"{name}.npz", train_images=images, train_labels=np.array(labels))
    return root


VQA_RAD = [
    {"qid": 0, "image_name": "a.jpg", "question": "Is it  normal?", "answer": "No", "answer_type": "CLOSED ", "phrase_type": "freeform"},
    {"qid": 1, "image_name": "a.jpg", "question": "How many?", "answer": 4, "answer_type": "OPEN", "phrase_type": "test_freeform"},
    {"qid": 2, "image_name": "b.jpg", "question": "Where?", "answer": "Left", "answer_type": "OPEN", "phrase_type": "para"},
]


def vqa_rad(root, rows=VQA_RAD):
    picture(root / "VQA_RAD Image Folder" / "a.jpg")
    picture(root / "VQA_RAD Image Folder" / "b.jpg", (30, 20))
    write(root / "VQA_RAD Dataset Public.json", rows)
    return root


LAYOUTS = {
    "slake": slake, "published slake": published_slake, "sa-med2d": sa_med2d, "path-vqa": path_vqa, "mimic-cxr": reports, "medpix": medpix,
    "medqa": medqa, "pubmedqa": pubmedqa, "medmnist": medmnist, "vqa-rad": vqa_rad,
}  # fmt: skip


def mutated(value, draw, junk):
    """A copy of a JSON value with one place deleted, or replaced by what ``junk`` draws."""
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    value = copy.deepcopy(value)
    walk(value)
    if not places:
        return draw(junk)
    node, key = draw(st.sampled_from(places))
    if draw(st.integers(0, 4)) == 0:
        del node[key]
    else:
        node[key] = draw(junk)
    return value
