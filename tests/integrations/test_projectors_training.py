"""Swapped models in what trains and serves models: Trainer, peft, checkpointing, compile, processors."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, apply_activation_checkpointing, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText

import cmoe_kernels.integrations.transformers as cmoe
from cmoe_kernels import CMoEConfig
from tests.integrations import tiny_models as tiny
from tests.integrations.test_projectors import SETTINGS, TASKS, connectors_of, gradients, swapped


def families(*sampled):
    """Every family; CI runs those that are named."""
    others = [pytest.param(f, marks=pytest.mark.full) for f in tiny.FAMILIES if f not in sampled]
    return pytest.mark.parametrize("family", [*sampled, *others])


some_families = families("llava_next", "qwen3_vl")


def undropped(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@some_families
def test_gradient_checkpointing(family):
    model, images = swapped(family, init="random")
    batch = tiny.batch(model, images, labels=True)
    undropped(model).train()
    model(**batch, task=list(TASKS)).loss.backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items() if grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch, task=list(TASKS), use_cache=False).loss.backward()
    assert all(grad.any() for name, grad in expected.items() if name.startswith(tuple(cmoe.projectors(model))))
    for name, grad in gradients(model).items():
        if name in expected:
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def by_forward(model, reentrant):
    for projector in cmoe.projectors(model).values():
        projector.forward = functools.partial(checkpoint, projector.forward, use_reentrant=reentrant)


def by_wrapper(model, reentrant):
    """As accelerate's FSDP plugin does with activation_checkpointing=True."""
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: isinstance(module, cmoe.CMoEProjector))


@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
@pytest.mark.parametrize("wrap", [by_forward, by_wrapper])
@some_families
def test_a_checkpoint_around_the_projector(family, wrap, reentrant):
    """In backward the task is that of the forward pass, whatever task is named by then, and on whichever thread."""
    aux = {} if reentrant else {"importance": 0.5}
    model, images = swapped(family, init="random", aux_losses=aux)
    batch = tiny.batch(model, images, labels=True)
    undropped(model).train()
    model(**batch, task=list(TASKS)).loss.backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items() if grad is not None}
    count = len(cmoe.projectors(model))
    wrap(model, reentrant)
    for backward in (lambda loss: loss.backward(), in_a_thread):
        model.zero_grad()
        with cmoe.use_task("photo"):
            out = model(**batch, task=list(TASKS))
            model(**batch)
            backward(out.loss)
        assert len(out.gates) == count
        found = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients(model).items()}
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def in_a_thread(loss):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()


def projector():
    torch.manual_seed(0)
    return cmoe.CMoEProjector(CMoEConfig(in_features=4, out_features=5, num_experts=3, router_features=8, resample="none", tasks=TASKS))


class Recomputed(torch.autograd.Function):
    """A checkpoint as other libraries have it."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


CHECKPOINTS = {
    "not_reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "another": Recomputed.apply,
}


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_each_checkpointed_call_keeps_its_own_task(how):
    """The same features under several tasks: nested, within one region and in two, over a graph that is kept."""
    module, keep = projector(), CHECKPOINTS[how]
    x = torch.randn(2, 3, 4, requires_grad=True)

    def both(x):
        with cmoe.use_task("chart"):
            first = module(x)
            with cmoe.use_task("photo"):
                return first + 2 * module(x)

    def one(x):
        return module(x).tanh()

    calls = {
        "inner": lambda x: keep(both, x),
        "outer": lambda x: keep(lambda x: keep(both, x).tanh() + keep(module, x), x),
        "again": lambda x: keep(one, x) + keep(lambda x: keep(one, 2 * x), x),
    }
    plain = {
        "inner": both,
        "outer": lambda x: both(x).tanh() + module(x),
        "again": lambda x: one(x) + one(2 * x),
    }

    def run(calls, task, twice):
        with cmoe.use_task(task):
            losses = [call(x).square().sum() for call in calls.values()]
            with cmoe.use_task("photo"):
                losses.append(calls["again"](x).sum())
        with cmoe.use_task("chart"):
            total = sum(losses)
            if twice:
                total.backward(retain_graph=True)
            total.backward()

    def grads(calls, twice):
        for task in TASKS:
            run(calls, task, twice)
        found = [p.grad.clone() for p in (x, *module.parameters())]
        for p in (x, *module.parameters()):
            p.grad = None
        return found

    for twice in (False, True):
        for got, want in zip(grads(calls, twice), grads(plain, twice), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointed_calls_of_two_threads(how):
    module, meet = projector(), threading.Barrier(2)
    x = torch.randn(2, 3, 4)

    def gradient(task, wait):
        leaf = x.clone().requires_grad_()
        with cmoe.use_task(task):
            y = CHECKPOINTS[how](module, leaf)
        wait()
        y.square().sum().backward()
        return leaf.grad

    expected = [gradient(task, lambda: None) for task in TASKS]
    assert not torch.equal(*expected)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda task: gradient(task, meet.wait), TASKS))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_checkpoint_around_the_whole_model():
    """Its call is recomputed with it, and only once among the outputs."""
    model, images = swapped("llava", init="random", aux_losses={"importance": 0.5})
    batch = tiny.batch(model, images, labels=True)
    undropped(model).train()
    expected = model(**batch, task=list(TASKS))
    expected.loss.backward()
    grads = {name: grad.clone() for name, grad in gradients(model).items() if grad is not None}
    model.zero_grad()
    out = checkpoint(model, **batch, task=list(TASKS), use_cache=False, use_reentrant=False)
    torch.testing.assert_close(out.loss, expected.loss)
    with cmoe.use_task("photo"):
        out.loss.backward()
    for name, grad in grads.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-5, atol=1e-6)


def test_an_auxiliary_loss_that_a_reentrant_checkpoint_loses_is_warned_about():
    model, images = swapped("llava", init="random", aux_losses={"importance": 0.5})
    batch = tiny.batch(model, images, labels=True)
    by_forward(undropped(model).train(), True)
    with pytest.warns(UserWarning, match="aux_losses get no gradient inside a checkpoint with use_reentrant=True"):
        model(**batch, task="chart")


@pytest.mark.parametrize("items", [0, torch.tensor(0)], ids=["int", "tensor"])
def test_a_step_without_a_learned_token(items):
    model, images = swapped("llava", init="random", aux_losses={"importance": 0.5})
    batch = tiny.batch(model, images, labels=True)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    out = model(**batch, task="chart", num_items_in_batch=items)
    assert out.loss == 0
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@some_families
def test_lora_and_connector_in_one_adapter(family, tmp_path):
    peft = pytest.importorskip("peft")
    model, images = swapped(family)
    model.save_pretrained(tmp_path / "base")
    batch = tiny.batch(model, images, labels=True)
    lora = peft.LoraConfig(target_modules=r".*(language_model|text_model).*\.(q_proj|v_proj)", modules_to_save=list(cmoe.projectors(model)))
    wrapped = peft.get_peft_model(model, lora)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {"lora_" in name or "router" in name or "experts" in name for name in trained} == {True}
    assert any("lora_A" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.01)
    before = wrapped(**batch, task=list(TASKS)).loss
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(**batch, task=list(TASKS)).loss.backward()
        optimizer.step()
    wrapped.save_pretrained(tmp_path / "adapter")
    assert len(list((tmp_path / "adapter").glob("*.safetensors"))) == 1
    with torch.no_grad():
        expected = wrapped(**batch, task=list(TASKS))
        assert expected.loss < before
        base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(again(**batch, task=list(TASKS)).logits, expected.logits, rtol=0, atol=1e-6)
        merged = again.merge_and_unload()
        assert type(merged) is type(base)
        torch.testing.assert_close(merged(**batch, task=list(TASKS)).logits, expected.logits, rtol=0, atol=1e-4)
    generated = merged.generate(**{k: v for k, v in batch.items() if k != "labels"}, task=list(TASKS), max_new_tokens=2)
    assert len(generated) == 2


def test_lora_comes_after():
    peft = pytest.importorskip("peft")
    model, _ = tiny.build("llava")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="add LoRA afterwards"):
        cmoe.replace_projector(wrapped, **SETTINGS)


@pytest.mark.parametrize("accumulate", [1, 2])
@families("llava")
def test_trainer_adds_and_logs_the_auxiliary_loss(family, accumulate, tmp_path):
    pytest.importorskip("accelerate")
    model, images = swapped(family, router="sparse", aux_losses={"switch": 0.5, "z": 0.01})
    undropped(model)
    batches = [tiny.batch(model, images, per_sample=counts, labels=True, seed=seed) for seed, counts in ((1, (1, 1)), (2, (2, 1)))]
    outputs, learned = [], []
    for batch in batches[:accumulate]:
        outputs.append(model(**batch, task=list(TASKS)))
        learned.append((batch["labels"][:, 1:] != -100).sum())
    # Families whose loss does not take the number of learned tokens say so; Trainer then averages over the steps.
    by_token = getattr(model, "accepts_loss_kwargs", True)
    shares = torch.stack(learned) / sum(learned) if by_token else [1 / accumulate] * accumulate
    loss = sum(share * (out.lm_loss + out.aux_loss) for share, out in zip(shares, outputs, strict=True))
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    seen = {}

    class Trainer(cmoe.AuxLossLogging, transformers.Trainer):
        def optimizer_step_seen(self, *_):
            seen.update({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})

    trainer = Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            report_to="none",
            seed=0,
        ),
        train_dataset=list(range(accumulate)),
        data_collator=lambda rows: {**batches[rows[0]], "task": list(TASKS)},
    )
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(trainer.optimizer_step_seen)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert entry["aux_loss"] == pytest.approx(float(sum(out.aux_loss for out in outputs) / accumulate), rel=1e-4)
    for name in ("switch", "z"):
        assert entry[f"aux/{name}"] == pytest.approx(float(sum(out.aux_losses[name] for out in outputs) / accumulate), rel=1e-4)
    assert set(seen) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(seen[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["photo", list(TASKS)], ids=["one", "mixed"])
@families("qwen2_vl")
def test_the_connector_compiles_whole(family, task):
    model, images = swapped(family, init="random", router="sparse", aux_losses={"switch": 0.1})
    batch = tiny.batch(model, images, labels=True)
    expected = model(**batch, task=task)
    expected.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    for connector in connectors_of(model).values():
        connector.compile(fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    out = model(**batch, task=task)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-5)
    out.loss.backward()
    for name, grad in grads.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-4, atol=1e-6)


def test_processor_and_pipeline(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "what", "is", "this", "a", "chart", "photo", "<unk>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({**words, "<image>": tiny.IMAGE}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    looks = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(**looks),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    model, _ = swapped("llava", init="random")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    image = transformers.image_utils.PIL.Image.new("RGB", (12, 9), (200, 30, 60))
    loaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path), transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    inputs = again(images=[image, image], text=["what is <image>", "<image> a chart"], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = loaded(**inputs, task=list(TASKS))
        torch.testing.assert_close(out.logits, model(**inputs, task=list(TASKS)).logits, rtol=0, atol=1e-6)
    pipe = transformers.pipeline("image-text-to-text", model=loaded, processor=again)
    answers = []
    for task in TASKS:
        with cmoe.use_task(task):
            (answer,) = pipe(images=[image], text=["what is <image>"], max_new_tokens=3, return_full_text=False)
        answers.append(answer)
    assert all("generated_text" in str(answer) for answer in answers)
