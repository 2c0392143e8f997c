"""The benchmark of an answer: what its sides compute, what it refuses and writes."""

import pytest
import torch

from benchmarks import answers, record, training
from tests.benchmarks.test_training import SMALL
from unimed.train import recipe as recipes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_sides_give_an_answer_of_the_same_model(precision):
    found = answers.measure("small", 3, 0.01, [*SMALL, f"train.precision={precision}"], 20)
    assert list(found["first_token"]) == ["kernels", "prepacked", "int8", "reference"]
    assert all(one["calls"] >= 3 for one in found["first_token"].values())
    assert found["prompt_tokens"] == 4 + training.TEXT
    assert found["next_tokens_per_second"] > 0


def test_answers_have_as_many_tokens_as_asked_for():
    model, inputs = training.prepare(recipes.load("tiny", SMALL), 1)
    model.eval().requires_grad_(False)
    del inputs["labels"]
    by_side, _ = answers.sides(model, inputs)
    assert {name: answer(5).shape[1] - inputs["input_ids"].shape[1] for name, answer in by_side.items()} == dict.fromkeys(by_side, 5)


def test_a_side_that_computes_something_else_gets_no_time():
    made = {name: torch.ones(4) for name in ("reference", "kernels", "prepacked", "int8")}
    assert answers.check(lambda name: made[name], bf16=False)["int8"] == 0
    made["prepacked"] = torch.full((4,), 1.1)
    with pytest.raises(ValueError, match=r"prepacked: the image embeddings are 1.00e-01 away from those of plain PyTorch, at most 1e-05"):
        answers.check(lambda name: made[name], bf16=False)


def test_readme_has_what_was_measured():
    (document,) = record.documents(suites=[answers.SUITE])
    assert answers.row(document) in (record.machine.ROOT / "README.md").read_text()
