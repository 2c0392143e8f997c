"""transformers.Trainer with Uni-Med's sampler, schedule, parameter groups, router telemetry and whole checkpoints."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from unimed import io
from unimed.errors import UserError
from unimed.models.adapter import UniMedPeftModel
from unimed.models.unimed.processing import UniMedProcessor
from unimed.report.router import RouterHistory
from unimed.tasks import TASKS
from unimed.train import processes, schedule
from unimed.train.collate import Collator, TrainingSet
from unimed.train.config import Recipe
from unimed.train.sampler import TaskRatioSampler, by_set, group

METRICS_FILE, ROUTER_FILE = "metrics.jsonl", "router.json"


def arguments(recipe: Recipe, run: Path) -> TrainingArguments:
    """What the Trainer is told. Under torchrun this starts the process group."""
    train, optim = recipe.train, recipe.optim
    if train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision='fp16': needs a GPU, and there is none; use bf16 or fp32")
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
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        save_steps=train.save_every,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # a batch without an image still passes through every parameter
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
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
        self.recipe, self.run = recipe, run
        self.router = RouterHistory()
        self._beside: Path | None = None
        self.images_in_step: Tensor | None = None  # images of the optimiser step, over all its batches and processes
        # Observed since the last log: by task the sum and number of the answers' losses; each batch's auxiliary losses with
        # their weights; each batch's task_ids [I] and gates [I, N, E].
        self._losses = torch.zeros(len(TASKS), 2, dtype=torch.float64)
        self._aux: dict[str, list[Tensor]] = {}
        self._gates: list[tuple[Tensor, Tensor]] = []
        self._start, self._seconds_before = time.perf_counter(), 0.0

    def seconds(self) -> float:
        """Training time so far, that before a resume included."""
        return self._seconds_before + time.perf_counter() - self._start

    # Data

    def get_train_dataloader(self) -> DataLoader:
        recipe, data = self.recipe, self.train_dataset
        assert isinstance(data, TrainingSet)
        sets = {name: one.ratio for name, one in recipe.data.sets.items()}
        members, probabilities = group(data.examples, by_set(recipe.sampler.ratios, data.examples, sets))
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
            self._observe(outputs, inputs, tasks)
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

    @torch.no_grad()
    def _observe(self, outputs: Any, inputs: dict[str, Any], tasks: Tensor) -> None:
        labels = inputs["labels"][:, 1:]
        learned = labels != -100
        # Only the answers' tokens: a batch is mostly prompt, image and padding.
        losses = cross_entropy(outputs.logits[:, :-1][learned].float(), labels[learned], reduction="none").double()
        of_token = one_hot(tasks[:, None].expand_as(labels)[learned], len(TASKS)).double()
        self._losses = self._losses.to(losses.device) + of_token.T @ torch.stack([losses, torch.ones_like(losses)], dim=1)
        if outputs.gates is None:
            return
        share = _count_images(inputs) / self.images_in_step if self.images_in_step is not None else torch.tensor(1.0)
        for name, value in (outputs.aux_losses or {}).items():
            self._aux.setdefault(name, []).append(torch.stack([value.double() * share, share.double()]))
        task_ids = inputs["task_ids"]
        self._gates.append((task_ids, outputs.gates.detach().reshape(len(task_ids), -1, outputs.gates.shape[-1])))

    def _telemetry(self) -> dict[str, float]:
        """Mean loss by task and auxiliary losses since the last log, over all processes; gates go into the router's history."""
        assert isinstance(self.processing_class, UniMedProcessor)
        tasks = self.processing_class.tasks
        gates: dict[str, list[Tensor]] = {}
        for task_ids, batch in self._gates:
            for index in task_ids.unique().tolist():
                gates.setdefault(tasks[index], []).append(batch[task_ids == index].cpu())
        mine: dict[str, Any] = {
            "losses": self._losses.cpu(),
            "aux": {name: torch.stack(parts).sum(0).cpu() for name, parts in self._aux.items()},
            "gates": gates,
        }
        self._losses, self._aux, self._gates = torch.zeros_like(self._losses), {}, []
        everyone = processes.gather(mine)
        found: dict[str, float] = {}
        sums = {f"loss/{task}": [part["losses"][index] for part in everyone] for index, task in enumerate(TASKS)}
        for name in {name for part in everyone for name in part["aux"]}:
            sums[f"aux/{name}"] = [part["aux"][name] for part in everyone if name in part["aux"]]
        for name, parts in sorted(sums.items()):
            total, weight = torch.stack(parts).sum(0).tolist()
            if weight:
                found[name] = total / weight
        for part in everyone:
            for task, seen in part["gates"].items():
                for one in seen:
                    self.router.add(task, one)
        entropies = self.router.close(self.state.global_step)
        return found | {f"router_entropy/{task}": entry["entropy"] for task, entry in entropies.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._telemetry())
            logs["seconds"] = round(self.seconds(), 2)
        super().log(logs, start_time)
        if self.args.should_save:
            io.append_json_line(self.run / METRICS_FILE, self.state.log_history[-1])
            if "loss" not in logs:  # the last one
                io.write_json(self.run / ROUTER_FILE, self.router.entries)

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
        adapter = self.model if isinstance(self.model, UniMedPeftModel) else None
        try:
            if adapter:
                adapter.home = run / name
            super()._save_checkpoint(model, trial)
        finally:
            self._beside = None
            if adapter:
                adapter.home = None
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        for folder in (beside / name, run):
            io.write_json(folder / ROUTER_FILE, self.router.entries)
        io.place_folder(beside / name, run / name)
        shutil.rmtree(beside, ignore_errors=True)
        for old in checkpoints(run)[: -self.recipe.train.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the TrainingArguments: recipe.yaml says the same, and a pickle is not safe to load.
        (Path(output_dir or self.run) / "training_args.bin").unlink(missing_ok=True)

    def resume(self, checkpoint: Path) -> None:
        """Goes on from a verified checkpoint."""
        self.router.entries = io.read_json(checkpoint / ROUTER_FILE)
        history = io.read_json(checkpoint / "trainer_state.json")["log_history"]
        if self.args.should_save:  # lines logged after the checkpoint will come again
            io.write_text(self.run / METRICS_FILE, "".join(map(io.json_line, history)))
        self._seconds_before, self._start = max((entry.get("seconds", 0.0) for entry in history), default=0.0), time.perf_counter()
        self.train(resume_from_checkpoint=str(checkpoint))


def _count_images(batch: dict[str, Any]) -> int:
    return len(batch["pixel_values"]) if "pixel_values" in batch else 0


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
