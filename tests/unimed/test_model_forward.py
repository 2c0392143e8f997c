import pytest
import torch
from model_samples import QA, REFER, VQA, batch, lively, picture, small
from torch.nn import functional

from unimed.models.unimed import UniMedForConditionalGeneration


def test_loss_is_the_shifted_cross_entropy_of_the_answers_plus_the_auxiliary_loss():
    model, processor = small()
    rows = batch(processor)
    out = model(**rows)
    predicted, wanted = [], []
    for row, labels in enumerate(rows.labels):
        for place in range(1, labels.shape[0]):
            if labels[place] != -100:
                predicted.append(out.logits[row, place - 1])
                wanted.append(labels[place])
    by_hand = functional.cross_entropy(torch.stack(predicted), torch.stack(wanted))
    assert len(wanted) == (rows.labels != -100).sum()
    torch.testing.assert_close(out.lm_loss, by_hand)
    assert out.aux_losses.keys() == {"importance"}
    torch.testing.assert_close(out.aux_loss, 0.1 * out.aux_losses["importance"])
    torch.testing.assert_close(out.loss, by_hand + out.aux_loss)
    assert out.gates.shape == (2, 4, 5)
    torch.testing.assert_close(out.gates.sum(-1), torch.ones(2, 4))


def test_parts_of_an_optimiser_step_add_up_to_the_whole():
    model, processor = small(connector={"hidden_features": 24, "router_features": 12, "task_features": 8})
    texts, images, answers = [REFER, VQA, QA], [picture(1), picture(2), None], ["{<1><2><3><4>}", "CT", "left"]
    whole = processor(text=texts, images=images, answers=answers)
    total = (whole.labels != -100).sum()
    parts = [
        model(**processor(text=[t], images=[i], answers=[a]), num_items_in_batch=total).loss
        for t, i, a in zip(texts, images, answers, strict=True)
    ]
    torch.testing.assert_close(sum(parts), model(**whole).loss)


def test_the_auxiliary_loss_of_a_part_weighs_by_its_tokens():
    model, processor = small()
    rows = batch(processor)
    learned = (rows.labels != -100).sum()
    out = model(**rows, num_items_in_batch=4 * learned)
    torch.testing.assert_close(out.loss, out.lm_loss + out.aux_loss / 4)


def test_the_auxiliary_loss_of_a_part_weighs_by_its_images_where_they_are_counted():
    model, processor = small()
    rows = batch(processor)
    out = model(**rows, num_items_in_batch=4 * (rows.labels != -100).sum(), num_images_in_batch=8)
    torch.testing.assert_close(out.loss, out.lm_loss + out.aux_loss * 2 / 8)


def test_nothing_to_learn_gives_zero_not_nan():
    model, processor = small()
    rows = batch(processor)
    rows["labels"] = torch.full_like(rows.labels, -100)
    assert model(**rows).lm_loss == 0
    for items in (0, torch.tensor(0)):
        out = model(**rows, num_items_in_batch=items)
        assert out.loss == out.lm_loss == 0
        out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_rows_of_a_mixed_batch_are_what_they_are_alone():
    model, processor = small()
    rows = batch(processor)
    logits = model(**rows).logits
    alone = [
        processor(text=[REFER], images=[picture(1)], answers=["{<10><20><30><40>}"]),
        processor(text=[QA], answers=["in the left upper abdomen"]),
        processor(text=[VQA], images=[picture(2)], answers=["CT"]),
    ]
    for side in ("right", "left"):
        replies = ["{<10><20><30><40>}", "in the left upper abdomen", "CT"]
        rows = processor(text=[REFER, QA, VQA], images=[picture(1), picture(2)], answers=replies, padding_side=side)
        logits = model(**rows).logits
        for row, single in enumerate(alone):
            kept = logits[row][rows.attention_mask[row] == 1]
            torch.testing.assert_close(kept, model(**single).logits[0], atol=2e-5, rtol=1e-4)


def test_images_and_tasks_reach_the_rows_they_belong_to():
    model, processor = small()
    lively(model)
    rows = batch(processor)
    before = model(**rows).logits
    other = rows["pixel_values"].clone()
    other[1] += 1
    after = model(**{**rows, "pixel_values": other}).logits
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])
    tasks = model(**{**rows, "task_ids": torch.tensor([4, 0])}).logits
    assert not torch.allclose(before[0], tasks[0])
    assert torch.equal(before[1:], tasks[1:])


def test_features_are_normalised_as_released_and_have_no_class_token():
    model, _ = small()
    pixels = torch.randn(2, 3, 32, 32)
    tower = model.vision_tower
    raw = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
    wanted = functional.layer_norm(raw, (32,), eps=1e-5)[:, 1:]  # an untrained norm: weight 1, bias 0
    torch.testing.assert_close(model.encode_images(pixels), wanted)
    assert model.encode_images(pixels).shape == (2, 16, 32)


def test_every_trainable_tensor_gets_a_gradient():
    model, processor = small()
    model.train()
    model(**batch(processor)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_a_frozen_tower_records_no_graph_and_gets_no_gradient():
    model, processor = small()
    model.config.freeze_vision = True
    model = UniMedForConditionalGeneration(model.config).train()
    assert model.vision_is_frozen
    assert not model.vision_tower.training
    assert model.connector.training
    rows = batch(processor)
    assert not model.encode_images(rows.pixel_values).requires_grad
    model(**rows).loss.backward()
    assert all(p.grad is None for p in model.vision_tower.parameters())
    others = {name for name, p in model.named_parameters() if p.grad is None}
    assert others == {f"vision_tower.{name}" for name, _ in model.vision_tower.named_parameters()}


@pytest.mark.parametrize("freeze", [False, True])
def test_gradient_checkpointing_changes_no_gradient(freeze):
    model, processor = small()
    if freeze:
        model.vision_tower.requires_grad_(False)
    model.train()
    rows = batch(processor)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.language_model.model.layers[0].gradient_checkpointing
        model.zero_grad()
        model(**rows, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_bf16_weights():
    model, processor = small()
    reference = model(**batch(processor)).loss
    loss = model.to(torch.bfloat16)(**batch(processor)).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, atol=0.05, rtol=0.02)


def test_bf16_autocast():
    model, processor = small()
    model.train()
    rows = batch(processor)
    model(**rows).loss.backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model(**rows).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert functional.cosine_similarity(p.grad.flatten(), exact[name].flatten(), dim=0) > 0.97, name


def test_wrong_tensors_are_named():
    model, processor = small()
    rows = batch(processor)
    with pytest.raises(ValueError, match="input_ids hold 8 image tokens, 1 images of 4 tokens each need 4"):
        model(**{**rows, "pixel_values": rows.pixel_values[:1], "task_ids": rows.task_ids[:1]})
    with pytest.raises(ValueError, match="task is missing"):
        model(**{**rows, "task_ids": None})
    with pytest.raises(ValueError, match=r"pixel_values are \[2, 3, 32, 16\], they must be \[images, 3, 32, 32\]"):
        model(**{**rows, "pixel_values": rows.pixel_values[..., :16]})
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(pixel_values=rows.pixel_values)


def test_constructed_the_same_for_the_same_seed():
    one, two, three = small()[0], small()[0], small(seed=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(one.connector.experts.w1, three.connector.experts.w1)
    bound = one.connector.config.features**-0.5  # torch.nn.Linear's initialisation, as released
    assert 0.9 * bound < one.connector.experts.w1.abs().max() <= bound


def test_neighbouring_coordinates_start_alike():
    model, processor = small()
    ids = processor.tokenizer.convert_tokens_to_ids([f"<{number}>" for number in range(101)])
    rows = model.get_input_embeddings().weight[ids]
    near, far = (functional.cosine_similarity(rows[:-step], rows[step:]) for step in (1, 40))
    assert near.min() > 0.85
    assert far.abs().mean() < 0.5
    assert 0.8 < rows.std() / model.config.text_config.initializer_range < 1.2
