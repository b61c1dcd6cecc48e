"""What every stage on a TRL trainer shares: loading, checkpoints to be trusted, resuming, figures, saving.

    class SFTTrainer(StageTrainer, trl.SFTTrainer): ...

    trainer = SFTTrainer(model, args=trainer_config(SFTConfig, run), ...)
    metrics = fit(trainer, run)
    publish(trainer, run, metrics)

The trainer lives in the run's work directory. A checkpoint counts once its checksums are there, written last:
one cut off by a kill is never resumed from, nor one that was damaged since.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trueup.base.adapters import is_adapter, merge
from trueup.base.checkpoint import CHECKSUMS, checksums_of, problem_of
from trueup.base.curves import draw_curve
from trueup.base.device import bound_kernel_caches, keep_freed_memory
from trueup.base.interrupt import Interrupted, StopRequest
from trueup.base.progress import TrainingProgress, show
from trueup.recipes.directory import ModelDirectory, write_json, writing
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.run import Run, is_main_process

LOG = "log.jsonl"
POOL = 50  # batches that are sorted by length together: more would make them more alike, and less random
# Of a checkpoint, and PPO's or a moving reference's own; the rest is a model directory.
RESUME_FILES = (
    "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "trainer_state.json",
    "checksums.json", "value_model.safetensors", "ppo_state.json", "reference.safetensors",
)  # fmt: skip


# ---------------------------------------------------------------- checkpoints


def checkpoints(work_dir: Path) -> list[Path]:
    """All `checkpoint-N` directories, the newest first, complete or not."""
    found = [path for path in work_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def newest_checkpoint(work_dir: Path) -> Path | None:
    """The newest whole checkpoint; those that are not whole are named and removed."""
    for checkpoint in checkpoints(work_dir):
        found = problem_of(checkpoint)
        if not found:
            return checkpoint
        print(f"{checkpoint}: {found}; removed, going on from the one before", flush=True)
        shutil.rmtree(checkpoint)
    return None


def clear_checkpoints(work_dir: Path, keep_models: bool) -> None:
    """Remove the checkpoints, or from each of them what only a resume needs: a model (or adapter) stays."""
    for checkpoint in checkpoints(work_dir):
        if not keep_models:
            shutil.rmtree(checkpoint)
            continue
        for pattern in RESUME_FILES:
            for path in checkpoint.glob(pattern):
                path.unlink()


class StageTrainer(Trainer):
    """A Trainer whose checkpoints carry checksums and whose loss is watched. Put it before TRL's class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound_kernel_caches()
        super().__init__(*args, **kwargs)
        # Trainer deletes old checkpoints before the new one is whole: a kill there would leave none.
        self.checkpoints_kept = self.args.save_total_limit
        self.args.save_total_limit = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (checkpoint / CHECKSUMS).unlink(missing_ok=True)
        with writing(checkpoint):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_json(checkpoint / CHECKSUMS, checksums_of(checkpoint))
                self._delete_old_checkpoints()

    def _delete_old_checkpoints(self) -> None:
        if not self.checkpoints_kept:
            return
        best = self.state.best_model_checkpoint
        for old in checkpoints(Path(self.args.output_dir))[self.checkpoints_kept :]:
            if best is None or old != Path(best):
                shutil.rmtree(old)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Not here: TRL writes one at every checkpoint; ours is made when the model is published."""

    @contextlib.contextmanager
    def language_model(self) -> Iterator[Any]:
        """The model as others may use it: without what distribution puts around it, sharded parameters put
        together."""
        with whole(self, self.model_wrapped) as model:
            yield model

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss is {loss.item()}")
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Checked before the optimizer steps, so that no checkpoint holds spoiled weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(grad_norm):  # fp16's scaler skips such steps
            raise self._not_finite(f"the gradient's norm is {float(grad_norm)}")
        return grad_norm

    def _not_finite(self, what: str) -> TrueupError:
        rate = self._get_learning_rate()
        return TrueupError(
            f"step {self.state.global_step + 1}: {what} (learning rate {rate:.3g}). Lower learning_rate or "
            f"lengthen warmup_steps; with fp16, try bf16. The last checkpoint is from before: "
            f"{self.args.output_dir}"
        )


@contextlib.contextmanager
def whole(trainer: Trainer, model: Any) -> Iterator[Any]:
    """A Trainer's model without what distribution puts around it; sharded parameters are put together."""
    with contextlib.ExitStack() as stack:
        if trainer.is_fsdp_enabled:
            from torch.distributed.fsdp import FullyShardedDataParallel

            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=False))
        elif trainer.is_deepspeed_enabled:
            from trl.models import unwrap_model_for_generation

            model = stack.enter_context(unwrap_model_for_generation(model, trainer.accelerator))
        # A compiled model would be compiled anew for each length.
        yield trainer.accelerator.unwrap_model(model, keep_torch_compile=False)


class LengthGroups(Sampler[int]):
    """Rows of like length in one batch, the batches in random order: all decided by seed and epoch.

    Transformers' own takes its order from the global random numbers, which stand elsewhere after a resume,
    and goes from long rows to short ones again and again.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = torch.tensor(lengths), batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer at the beginning of each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        pools = torch.randperm(len(self), generator=generator).split(POOL * self.batch_size)
        sorted_pools = torch.cat([pool[self.lengths[pool].argsort()] for pool in pools])
        batches = sorted_pools.split(self.batch_size)
        whole = len(self) // self.batch_size  # what is left over stays last, or it would shift all others
        order = [*torch.randperm(whole, generator=generator).tolist(), *range(whole, len(batches))]
        return iter(torch.cat([batches[place] for place in order]).tolist())


# ---------------------------------------------------------------- watching


class Progress(TrainerCallback):
    """Shows the run through TrainingProgress, with loss and speed; a line for each evaluation."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.shown: TrainingProgress | None = None
        self.batches = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.shown = TrainingProgress(
            self.title, state.max_steps, state.global_step, state.is_world_process_zero
        )
        self.shown.__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.shown is not None:
            self.shown.advance(state.global_step)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self.batches += 1
        if self.shown is not None:
            self.shown.bar.update(self.shown.task, figures=f"evaluating, batch {self.batches}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        figures = {k: v for k, v in logs.items() if k.startswith("eval_") and not k.endswith(_SPEED)}
        self.batches = 0
        if figures and state.is_world_process_zero:
            shown = "  ".join(f"{name} {show(value)}" for name, value in figures.items())
            line = f"step {state.global_step}: {shown}"
            self.shown.say(line) if self.shown is not None else print(line, flush=True)
        elif "loss" in logs and self.shown is not None:
            named = {"loss": logs["loss"], "lr": logs["learning_rate"]}
            if "train_tokens_per_second" in logs:
                named["tokens/s"] = logs["train_tokens_per_second"]
            self.shown.report(state.global_step, named)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, its cursor too; also when training failed."""
        if self.shown is not None:
            self.shown.__exit__(None, None, None)
            self.shown = None


_SPEED = ("_runtime", "_per_second", "_seen")


class LogFile(TrainerCallback):
    """`log.jsonl`: one line per logging event. A resumed run takes over the checkpoint's own history, so no
    step stands in it twice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            write_log(self.path, state.log_history)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def write_log(path: Path, history: list[dict[str, Any]]) -> None:
    """The logged events as JSON lines."""
    path.write_text("".join(json.dumps(event) + "\n" for event in history), encoding="utf-8")


class Measuring(TrainerCallback):
    """Logs what `Run.measure` says of the model, before the first step and at each evaluation."""

    def __init__(self, trainer: StageTrainer, measure: Callable[[Any, Any], dict[str, float]]) -> None:
        self.trainer, self.measure = trainer, measure

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._log()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log()

    def _log(self) -> None:
        with self.trainer.language_model() as model, self.trainer.accelerator.autocast():
            figures = self.measure(model, self.trainer.processing_class)
        self.trainer.log({f"eval_{name}": value for name, value in figures.items()})


class StopWhenAsked(TrainerCallback):
    """Turns a signal into: finish this step, save, stop. `asked` is its number, 0 if the run went on."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.asked = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        number = self.request.number
        if args.world_size > 1:  # it may reach the processes at different steps; all stop at the same one
            shared = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            number = int(shared)
        if number and state.global_step < state.max_steps:
            self.asked = number
            control.should_save = control.should_training_stop = True


# ---------------------------------------------------------------- running


def fit(trainer: StageTrainer, run: Run) -> dict[str, float]:
    """Train, going on from the newest whole checkpoint, and evaluate at the end.

    Returns:
        The final figures: `train_loss` (of the last logging window), `eval_*`, `steps`, `epochs`,
        `tokens_per_second` (of this process, trained tokens and their context, padding not counted).

    Raises:
        Interrupted: stopped by a signal, after saving a checkpoint.
        TrueupError: the loss or the gradient is not finite, or the disk is full.
    """
    if trainer.args.device.type == "cpu":
        keep_freed_memory()
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    progress = Progress(run.recipe.stage)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(progress)
    trainer.add_callback(LogFile(run.work_dir / LOG))
    if run.measure is not None:
        trainer.add_callback(Measuring(trainer, run.measure))
    checkpoint = _starting_point(trainer.args, run.work_dir) if is_main_process() else None
    [checkpoint] = broadcast_object_list([checkpoint])
    try:
        seconds, tokens = _train_or_reload(trainer, checkpoint)
    finally:
        progress.close()
    best = trainer.args.load_best_model_at_end  # then the weights are not those of the last step
    if trainer.eval_dataset is not None and (best or not _evaluated_at(trainer.state)):
        trainer.evaluate()
    figures = _final_figures(trainer.state)
    return figures | ({"tokens_per_second": tokens / seconds} if tokens else {})


def _starting_point(args: TrainingArguments, work_dir: Path) -> Path | None:
    """What `resume_from_checkpoint` means: the newest whole one (by default), none, or the one named."""
    wanted = args.resume_from_checkpoint
    if isinstance(wanted, str):
        if found := problem_of(Path(wanted)):
            raise UsageError(f"resume_from_checkpoint: {wanted}: {found}")
        return Path(wanted)
    if wanted is False:
        for checkpoint in checkpoints(work_dir):
            shutil.rmtree(checkpoint)
    return newest_checkpoint(work_dir)


def _train_or_reload(trainer: StageTrainer, checkpoint: Path | None) -> tuple[float, int]:
    """Train to the end; returns the seconds and tokens of this process."""
    before = TrainerState()
    if checkpoint is not None:
        before = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if is_main_process():
            print(f"{checkpoint}: going on from step {before.global_step} of {before.max_steps}", flush=True)
    if checkpoint is not None and before.global_step >= before.max_steps:
        # Trained to the end, and stopped before the directory was written. train() would take one step more.
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = before
        if trainer.args.load_best_model_at_end and before.best_model_checkpoint:
            trainer._load_best_model()
        return 0.0, 0
    started = time.monotonic()
    with StopRequest() as request:
        stop = StopWhenAsked(request)
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.asked:
        raise Interrupted(stop.asked, trainer.state.global_step, trainer.state.max_steps)
    return time.monotonic() - started, trainer.state.num_input_tokens_seen - before.num_input_tokens_seen


def _evaluated_at(state: TrainerState) -> bool:
    return any(
        event["step"] == state.global_step and any(name.startswith("eval_") for name in event)
        for event in state.log_history
    )


def _final_figures(state: TrainerState) -> dict[str, float]:
    figures: dict[str, float] = {}
    for event in state.log_history:
        if "loss" in event:
            figures["train_loss"] = event["loss"]
        figures |= {k: v for k, v in event.items() if k.startswith("eval_") and not k.endswith(_SPEED)}
    return figures | {"steps": state.global_step, "epochs": round(state.epoch or 0.0, 4)}


# ---------------------------------------------------------------- saving


def publish(
    trainer: StageTrainer,
    run: Run,
    metrics: dict[str, float],
    probe: dict[str, torch.Tensor],
    beside: Sequence[Path] = (),
    keep_models: bool = False,
) -> ModelDirectory | None:
    """Write the model directory: with LoRA the merged model, and the adapter in `adapter/`.

    Args:
        probe: a small batch (`input_ids`, ...) on which merged and adapted model must agree.
        beside: files of the work directory that go along.
        keep_models: of the checkpoints, which otherwise go.

    Returns:
        The directory, on the process that writes; None on the others.

    Raises:
        TrueupError: merging changed the model.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not is_main_process():
        return None
    # Without autocast's wrapper: in bf16 no merge could be checked.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    tokenizer = trainer.processing_class

    def save(path: Path) -> None:
        if is_adapter(model):
            model.save_pretrained(path / "adapter")
            save_model(merge(model, probe), tokenizer, path)
        else:
            save_model(model, tokenizer, path, state_dict=weights)
        draw_curve(trainer.state.log_history, path / "loss.png")
        for file in beside:
            shutil.copy(file, path / file.name)

    directory = run.publish(save, metrics, tokens=trainer.state.num_input_tokens_seen)
    clear_checkpoints(run.work_dir, keep_models)
    return directory


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, **options: Any
) -> None:
    """A full checkpoint that the Auto classes open on its own: weights, configuration, the model's code,
    tokenizer with its chat template, generation configuration."""
    model.config.use_cache = True  # Trainer turns it off while it trains, and would save it so
    model.save_pretrained(path, **options)
    tokenizer.save_pretrained(path)
