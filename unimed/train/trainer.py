"""transformers.Trainer with Uni-Med's sampler, schedule, parameter groups, router telemetry and whole checkpoints."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from unimed import io
from unimed.errors import UserError
from unimed.models.adapter import UniMedPeftModel
from unimed.models.unimed.processing import UniMedProcessor
from unimed.train import schedule
from unimed.train.collate import Collator, TrainingSet
from unimed.train.folder import Run
from unimed.train.probe import HALF, InterferenceProbe, halves_of
from unimed.train.recipe import Recipe
from unimed.train.sampler import TaskRatioSampler, by_set, group
from unimed.train.telemetry import Telemetry

log = logging.getLogger("unimed.train")


def arguments(recipe: Recipe, run: Path) -> TrainingArguments:
    """What the Trainer is told. Under torchrun this starts the process group."""
    train, optim = recipe.train, recipe.optim
    if train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision='fp16': needs a GPU, and there is none; use bf16 or fp32")
    if "wandb" in train.report_to:
        os.environ.setdefault("WANDB_PROJECT", "unimed")
    settings = TrainingArguments(
        output_dir=str(run),
        max_steps=train.max_steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulate,
        learning_rate=optim.lr,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip,
        seed=train.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        activation_checkpointing=train.gradient_checkpointing,
        logging_steps=min(train.log_every, train.max_steps),
        logging_nan_inf_filter=False,
        save_steps=train.save_every,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # a batch without an image still passes through every parameter
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=list(train.report_to) or "none",
        project="unimed",
        run_name=recipe.name,
    )
    # A process takes one GPU: nn.DataParallel would deal out texts and images apart. Several GPUs are for torchrun.
    settings._n_gpu = min(settings.n_gpu, 1)
    return settings


class UniMedTrainer(Trainer):
    """`data` draws by task ratio; `sample_tasks` of the collator says which task each row of a batch is."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        processor: Any,
        data: TrainingSet,
        run: Path,
        callbacks: list[TrainerCallback] | None = None,
        settings: TrainingArguments | None = None,
    ):
        super().__init__(
            model=model,
            args=settings or arguments(recipe, run),
            train_dataset=data,
            data_collator=Collator(processor),
            processing_class=processor,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.logging_dir = str(Run(run).path / "tensorboard")
        self.recipe, self.folder = recipe, Run(run)
        assert isinstance(processor, UniMedProcessor)
        self.telemetry = Telemetry(processor.tasks)
        self.probe: InterferenceProbe | None = None
        if recipe.train.probe_every and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            log.warning("train.probe_every: left out, since the weights are dealt out over processes")
        elif recipe.train.probe_every:
            most = min(HALF, recipe.train.batch_size)
            self.probe = InterferenceProbe(recipe.train.probe_every, lambda: halves_of(data, self.data_collator, most), self.folder.probe)
            self.add_callback(self.probe)
        self._beside: Path | None = None
        self.images_in_step: Tensor | None = None  # images of the optimiser step, over all its batches and processes
        self._start, self._seconds_before = time.perf_counter(), 0.0

    def seconds(self) -> float:
        """Training time so far, that before a resume included."""
        return self._seconds_before + time.perf_counter() - self._start

    def whole_weights(self) -> dict[str, Tensor] | None:
        """All weights, in the main process, where FSDP or DeepSpeed deal them out; else None. Every process calls it."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return self.accelerator.get_state_dict(self.model_wrapped) if sharded else None

    # Data

    def get_train_dataloader(self) -> DataLoader:
        recipe, data = self.recipe, self.train_dataset
        assert isinstance(data, TrainingSet)
        sets = {name: one.ratio for name, one in recipe.data.sets.items()}
        members, probabilities = group(data.items, by_set(recipe.sampler.ratios, data.items, sets))
        batches = recipe.train.max_steps * recipe.train.accumulate * self.accelerator.num_processes
        sampler = TaskRatioSampler(members, probabilities, recipe.train.batch_size, batches, recipe.train.seed, recipe.sampler.mode)
        workers = recipe.data.workers
        if workers:  # the tokenizer's threads and forked workers do not go together
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # On resuming, the Trainer skips the batches already seen: the sampler gives their indices, no image is read.
        loader = DataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            num_workers=workers,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one optimiser step, with the learned tokens in all of them; images are counted, too."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        images = torch.tensor(sum(_count_images(batch) for batch in batches), device=device)
        self.images_in_step = self.accelerator.gather(images).sum()
        return batches, tokens

    # Optimiser

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        words = self.recipe.optim.no_decay
        return [name for name, p in model.named_parameters() if p.ndim >= 2 and not any(word in name for word in words)]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            optim = self.recipe.optim
            # LambdaLR multiplies the optimiser's rate, which is optim.lr.
            factor = (lambda step: schedule.rate(step, num_training_steps, optim) / optim.lr) if optim.lr else (lambda step: 0.0)
            used = optimizer or self.optimizer
            assert used is not None
            self.lr_scheduler = LambdaLR(used, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Loss and telemetry

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The batch's part of the step's loss: tokens weigh alike, wherever they are, and so do images in the auxiliary losses."""
        inputs = dict(inputs)
        tasks = inputs.pop("sample_tasks")
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, num_images_in_batch=self.images_in_step)
        if model.training:
            self.telemetry.observe(outputs, inputs, tasks, self.images_in_step)
        loss = outputs.loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients and not self.images_in_step:
            # A step without any image leaves tower and connector as they are, as it does in one process.
            for name, parameter in model.named_parameters():
                if "language_model" not in name:
                    parameter.grad = None
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.telemetry.collect(self.state.global_step))
            logs["seconds"] = round(self.seconds(), 2)
        super().log(logs, start_time)
        if self.args.should_save:
            io.append_json_line(self.folder.log, self.state.log_history[-1])
            if "loss" not in logs:  # the last one
                io.write_json(self.folder.router, self.telemetry.router.entries)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._beside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything is written into a folder beside, sealed with a manifest, then renamed."""
        target = self.folder.checkpoint(self.state.global_step)
        with self.folder.writing(target):
            self._write_checkpoint(model, trial, target)
        for old in self.folder.checkpoints()[: -self.recipe.train.keep] if self.args.should_save else []:
            shutil.rmtree(old, ignore_errors=True)

    def _write_checkpoint(self, model: nn.Module, trial: Any, target: Path) -> None:
        beside = self.folder.path / ".checkpoint.partial"
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._beside = beside
        adapter = self.model if isinstance(self.model, UniMedPeftModel) else None
        try:
            if adapter:
                adapter.home = target
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        finally:
            self._beside = None
            if adapter:
                adapter.home = None
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        for file in (beside / target.name / self.folder.router.name, self.folder.router):
            io.write_json(file, self.telemetry.router.entries)
        io.place_folder(beside / target.name, target)
        shutil.rmtree(beside, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the TrainingArguments: recipe.yaml says the same, and a pickle is not safe to load.
        (Path(output_dir or self.folder.path) / "training_args.bin").unlink(missing_ok=True)

    def resume(self, checkpoint: Path) -> None:
        """Goes on from a verified checkpoint."""
        self.telemetry.router.entries = io.read_json(checkpoint / self.folder.router.name)
        history = io.read_json(checkpoint / "trainer_state.json")["log_history"]
        if self.args.should_save:  # lines logged after the checkpoint will come again
            io.write_text(self.folder.log, "".join(map(io.json_line, history)))
        self._seconds_before, self._start = max((entry.get("seconds", 0.0) for entry in history), default=0.0), time.perf_counter()
        self.train(resume_from_checkpoint=str(checkpoint))


def _count_images(batch: dict[str, Any]) -> int:
    return len(batch["pixel_values"]) if "pixel_values" in batch else 0
