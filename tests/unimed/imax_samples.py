"""Small folders in the layouts of the sources that build-imax joins, column by column as their public pages give them."""

import csv
import gzip
import json

import numpy as np
from PIL import Image

from unimed.datasets.sources import masks
from unimed.datasets.sources.mimic_cxr_jpg import CHEXPERT

WIDTH, HEIGHT = 200, 160
STUDIES = {"a1": ("10000032", "50414267"), "b2": ("10000032", "50414268"), "c3": ("11000033", "51414269")}
HEART, RIGHT, LEFT = (80, 60, 140, 120), (20, 30, 80, 130), (120, 30, 190, 130)  # x1, y1, x2, y2: widths 60 of 170
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  Cough.

 FINDINGS:

 The heart is enlarged. No pleural effusion or
 pneumothorax is seen.

 IMPRESSION:

 Cardiomegaly.
"""


def table(path, rows, packed=False):
    """A CSV file of dicts; gzipped as *.gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(f"{path}.gz", "wt", newline="") if packed else path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def picture(path, size=(WIDTH, HEIGHT), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def mask(box, size=(WIDTH, HEIGHT)):
    found = np.zeros((size[1], size[0]), bool)
    found[box[1] : box[3], box[0] : box[2]] = True
    return found


def mimic(root, keys=tuple(STUDIES)):
    """MIMIC-CXR-JPG with three images of three studies and two patients."""
    metadata, split, labels = [], [], []
    for number, key in enumerate(keys):
        subject, study = STUDIES[key]
        tree = root / "files" / f"p{subject[:2]}" / f"p{subject}"
        picture(tree / f"s{study}" / f"{key}.jpg", seed=number)
        (tree / f"s{study}.txt").write_text(REPORT)
        view = "PA" if number % 2 == 0 else "AP"
        ids = {"dicom_id": key, "subject_id": subject, "study_id": study}
        metadata.append({**ids, "PerformedProcedureStepDescription": "CHEST", "ViewPosition": view, "Rows": HEIGHT, "Columns": WIDTH})
        split.append({"dicom_id": key, "study_id": study, "subject_id": subject, "split": "train" if subject[1] == "0" else "validate"})
        states = dict.fromkeys(CHEXPERT, "") | {"Cardiomegaly": "1.0", "Pneumothorax": "0.0", "Edema": "-1.0"}
        labels.append({"subject_id": subject, "study_id": study, **states})
    for name, rows in (("metadata", metadata), ("split", split), ("chexpert", labels)):
        table(root / f"mimic-cxr-2.0.0-{name}.csv", rows, packed=True)
    return root


def mask_row(key, heart=HEART, right=RIGHT, left=LEFT, size=(WIDTH, HEIGHT), dice=0.9, name="dicom_id"):
    runs = {
        title: masks.encode(mask(box, size)) if box else "" for title, box in (("Left Lung", left), ("Right Lung", right), ("Heart", heart))
    }
    return {name: key, "Dice RCA (Mean)": dice, "Dice RCA (Max)": 0.95, "Landmarks": "[]", **runs, "Height": size[1], "Width": size[0]}


def chexmask(root, rows=None):
    table(root / "OriginalResolution" / "MIMIC-CXR-JPG.csv", rows or [mask_row(key) for key in STUDIES])
    return root


def scene_graph(root, key="a1", attributes=None):
    corners = {"original_x1": 78, "original_y1": 58, "original_x2": 141, "original_y2": 121, "x1": 80, "y1": 60, "x2": 150, "y2": 150}
    objects = [{"object_id": f"{key}_heart", "bbox_name": "cardiac silhouette", **corners}]
    phrases = attributes or [
        ["anatomicalfinding|yes|enlarged cardiac silhouette", "nlp|yes|abnormal"],
        ["anatomicalfinding|no|pneumothorax"],
    ]
    found = [{"bbox_name": "cardiac silhouette", "attributes": phrases, "phrases": ["x"] * len(phrases)}]
    place = root / "silver_dataset" / "scene_graph"
    place.mkdir(parents=True, exist_ok=True)
    graph = {"image_id": key, "study_id": 1, "patient_id": 2, "objects": objects, "attributes": found}
    (place / f"{key}_SceneGraph.json").write_text(json.dumps(graph))
    return root


def ms_cxr(root):
    row = {
        "category_name": "Cardiomegaly",
        "label_text": "The heart is enlarged",
        "path": "files/p10/x.jpg",
        "x": 78,
        "y": 58,
        "w": 64,
        "h": 64,
    }
    table(
        root / "MS_CXR_Local_Alignment_v1.1.0.csv",
        [{"dicom_id": "a1", **row, "image_width": WIDTH, "image_height": HEIGHT, "split": "val"}],
    )
    return root


def vindr(root):
    for key in ("v1", "v2"):
        picture(root / "train" / f"{key}.png", seed=9)
    none = dict.fromkeys(("x_min", "y_min", "x_max", "y_max"), "")
    boxes = [{"image_id": "v1", "rad_id": f"R{n}", "class_name": "Cardiomegaly", "x_min": 70 + n, "y_min": 50, "x_max": 150, "y_max": 120}
             for n in (1, 2)]  # fmt: skip
    boxes += [{"image_id": key, "rad_id": "R3", "class_name": "No finding", **none} for key in ("v1", "v2")]
    table(root / "annotations" / "annotations_train.csv", boxes)
    votes = [("v1", 1, 1, 0), ("v1", 1, 0, 0), ("v1", 0, 0, 0), ("v2", 0, 0, 0)]
    rows = [{"image_id": key, "rad_id": f"R{n}", "Cardiomegaly": a, "Edema": b, "Pneumothorax": c, "Other diseases": 0, "No finding": 0}
            for n, (key, a, b, c) in enumerate(votes)]  # fmt: skip
    table(root / "annotations" / "image_labels_train.csv", rows)
    return root


def nih(root):
    picture(root / "images" / "00000001_000.png", (1024, 1024))
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,", "00000001_000.png,Infiltrate,100.5,200,50,60,,,"]
    (root / "BBox_List_2017.csv").write_text("\n".join(lines) + "\n")
    heading = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    heading += ",OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    (root / "Data_Entry_2017_v2020.csv").write_text(f"{heading}\n00000001_000.png,Infiltration|Mass,0,1,57,M,PA,2048,3072,0.1,0.2\n")
    (root / "test_list.txt").write_text("00000001_000.png\n")
    return root


def padchest(root):
    common = {
        "ImageDir": 0,
        "StudyID": "s",
        "PatientID": "p",
        "Projection": "PA",
        "Rows_DICOM": HEIGHT,
        "Columns_DICOM": WIDTH,
        "Report": "",
    }
    rows = [{"ImageID": "x1.png", "Labels": "['cardiomegaly', 'pleural effusion']"}, {"ImageID": "x2.png", "Labels": "['normal']"}]
    for number, row in enumerate(rows):
        picture(root / "0" / row["ImageID"], seed=number)
    table(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", [{**common, **row} for row in rows])
    return root


def edema(root):
    rows = {"consensus_image": [("a1", 0)], "regex_report": [("a1", 2), ("b2", 3)]}
    for name, grades in rows.items():
        found = [{"subject_id": STUDIES[key][0], "study_id": STUDIES[key][1], "dicom_id": key, "edema_severity": g} for key, g in grades]
        table(root / f"{name}_edema_severity.csv", found)
    return root
