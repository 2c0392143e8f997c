"""transformers.Trainer with Uni-Med's sampler, schedule, parameter groups, router telemetry and whole checkpoints."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from unimed.analysis.router import RouterHistory
from unimed.data.example import IMAGE_TASKS, TASKS
from unimed.errors import UserError
from unimed.train import files, schedule
from unimed.train.collate import Collator, TrainingSet
from unimed.train.config import Recipe
from unimed.train.sampler import TaskRatioSampler, group

ROUTER_FILE = "router.json"


def arguments(recipe: Recipe, run: Path) -> TrainingArguments:
    train, optim = recipe.train, recipe.optim
    if train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision='fp16': needs a GPU, and there is none; use bf16 or fp32")
    return TrainingArguments(
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
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        save_steps=train.save_every,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


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
    ):
        super().__init__(
            model=model,
            args=arguments(recipe, run),
            train_dataset=data,
            data_collator=Collator(processor),
            processing_class=processor,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # The model's loss is the mean over one batch, also under accumulation: the Trainer divides it by the number of batches.
        self.model_accepts_loss_kwargs = False
        self.recipe, self.run = recipe, run
        self.router = RouterHistory()
        self._beside: Path | None = None
        self._sums: dict[str, list[float]] = {}  # name -> [sum, weight] since the last log
        self._start, self._seconds_before = time.perf_counter(), 0.0

    def seconds(self) -> float:
        """Training time so far, that before a resume included."""
        return self._seconds_before + time.perf_counter() - self._start

    # Data

    def get_train_dataloader(self) -> DataLoader:
        recipe, data = self.recipe, self.train_dataset
        assert isinstance(data, TrainingSet)
        members, probabilities = group(data.examples, recipe.sampler.ratios)
        batches = recipe.train.max_steps * recipe.train.accumulate * self.accelerator.num_processes
        sampler = TaskRatioSampler(members, probabilities, recipe.train.batch_size, batches, recipe.train.seed, recipe.sampler.mode)
        # On resuming, the Trainer skips the batches already seen: the sampler gives their indices, no image is read.
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=self.data_collator, pin_memory=self.args.dataloader_pin_memory)
        return self.accelerator.prepare(loader)

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
        inputs = dict(inputs)
        tasks = inputs.pop("sample_tasks")
        outputs = model(**inputs)
        if model.training:
            self._observe(outputs, inputs, tasks)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    @torch.no_grad()
    def _observe(self, outputs: Any, inputs: dict[str, Any], tasks: torch.Tensor) -> None:
        labels = inputs["labels"][:, 1:]
        learned = labels != -100
        # Only the answers' tokens: a batch is mostly prompt, image and padding.
        losses = cross_entropy(outputs.logits[:, :-1][learned].float(), labels[learned], reduction="none")
        of_token = tasks[:, None].expand_as(labels)[learned]
        for task in tasks.unique().tolist():
            mine = losses[of_token == task]
            if len(mine):
                self._add(f"loss/{TASKS[task]}", float(mine.mean()), len(mine))
        for name, value in (outputs.aux_losses or {}).items():
            self._add(f"aux/{name}", float(value), 1)
        if outputs.gates is not None and inputs.get("task_ids") is not None:
            gates, task_ids = outputs.gates, inputs["task_ids"]
            gates = gates.reshape(len(task_ids), -1, gates.shape[-1])
            for index in task_ids.unique().tolist():
                self.router.add(IMAGE_TASKS[index], gates[task_ids == index])

    def _add(self, name: str, value: float, weight: float) -> None:
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += value * weight
        entry[1] += weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({name: total / weight for name, (total, weight) in sorted(self._sums.items()) if weight})
            logs.update({f"router_entropy/{task}": entry["entropy"] for task, entry in self.router.close(self.state.global_step).items()})
            logs["seconds"] = round(self.seconds(), 2)
            self._sums = {}
        super().log(logs, start_time)
        if self.args.should_save:
            files.write_text(self.run / "metrics.jsonl", "".join(f"{files.json_line(entry)}\n" for entry in self.state.log_history))
            files.write_json(self.run / ROUTER_FILE, self.router.entries)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._beside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything is written into a folder beside, sealed with a manifest, then renamed."""
        run, name = self.run, f"checkpoint-{self.state.global_step}"
        beside = run / ".checkpoint.partial"
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._beside = beside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._beside = None
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        files.write_json(beside / name / ROUTER_FILE, self.router.entries)
        files.place_folder(beside / name, run / name)
        shutil.rmtree(beside, ignore_errors=True)
        for old in checkpoints(run)[: -self.recipe.train.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the TrainingArguments: recipe.yaml says the same, and nobody should have to load a pickle.
        (Path(output_dir or self.run) / "training_args.bin").unlink(missing_ok=True)

    def resume(self, checkpoint: Path) -> None:
        files.verify_folder(checkpoint)
        self.router.entries = files.read_json(checkpoint / ROUTER_FILE)
        history = files.read_json(checkpoint / "trainer_state.json")["log_history"]
        self._seconds_before, self._start = max((entry.get("seconds", 0.0) for entry in history), default=0.0), time.perf_counter()
        self.train(resume_from_checkpoint=str(checkpoint))


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
