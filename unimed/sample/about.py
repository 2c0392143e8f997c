"""What tables and reports must say of the built-in sample, and of no other data."""

NAME = "sample"  # of the data set, and the source of its records
BRAIN = "brain"  # of the data set that `unimed sample brain` makes
BRAIN_BY = "unimed sample brain"
SAMPLE_FILE = "sample.json"  # stands at the root of the sample, and of nothing else

SPLIT_NAMES = {"train": "training slices", **dict.fromkeys(("slab", "val"), "held-out slabs")}
SPLIT_NAMES |= dict.fromkeys(("subject", "test"), "held-out subject")

BOX_NOTE = "True boxes are from the masks. Radiological view: the patient's right is on the left."
LIMITS = (
    "This is the built-in sample: slices of a few CT and MR volumes. Held-out slabs are other slices of the volumes in training, with a "
    "gap of slices between; the held-out subject is one more CT.",
    "Masks, boxes and organ names are automatic: they come from TotalSegmentator's own test data, not from annotation by people.",
    "Text QA asks about a small table of anatomy facts that training saw in other words.",
)
SYNTHETIC = (
    "The reports are synthetic: sentences composed from facts of the organ masks. They are not radiologists' reports, and scores against "
    "them say nothing about report writing."
)
