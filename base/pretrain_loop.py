"""Pretraining, to be read from top to bottom: prepare, then step, evaluate, save, and publish.

Order and dropout of a step are functions of (seed, step). So a checkpoint has to remember weights, optimizer
and the number of steps done, and a resumed run is, bit for bit on a CPU, the run that was never stopped.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from trueup.base.batches import Batch, Batches, PackedBatches, Shares, StreamBatches, held_out_batches
from trueup.base.checkpoint import Checkpoints
from trueup.base.curves import TrainingLog, draw_curve
from trueup.base.device import keep_freed_memory, peak_flops, peak_memory
from trueup.base.flops import flops_per_token
from trueup.base.interrupt import Interrupted, StopRequest
from trueup.base.loss import linear_cross_entropy
from trueup.base.modeling_gpt import GPTForCausalLM
from trueup.base.optimizers import build_optimizers, set_learning_rate
from trueup.base.presets import Derivation
from trueup.base.pretrain import PretrainRecipe
from trueup.base.pretrain_inputs import Plan, read_inputs
from trueup.base.progress import TrainingProgress, show
from trueup.base.schedule import learning_rate_factor
from trueup.base.tokenizer import default_generation_config
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.run import Run

# Here every process holds all weights; elsewhere they are shared out, and only training can reach them.
PLAIN_TYPES = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
SAMPLE_TOKENS = 64
LOG = "log.jsonl"


def pretrain(recipe: PretrainRecipe, run: Run) -> None:
    """Train as the recipe says, and publish the model directory. See `trueup.recipes.stages.Stage.run`."""
    keep_freed_memory()
    Pretraining(recipe, run).train()


class NextTokenLoss(nn.Module):
    """Model and training loss in one module, so that DDP, FSDP and DeepSpeed see the whole forward pass."""

    def __init__(self, model: GPTForCausalLM, one_row: bool = False):
        super().__init__()
        self.model = model
        self.one_row = one_row  # flash attention tells packed documents apart in a single row only
        self._no_split_modules = model._no_split_modules  # where FSDP cuts

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """The summed loss in nats of rows (B, T), all int64; `labels` are shifted already."""
        if self.one_row:
            input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
        # Without a cache and a mask the model tells documents apart by their positions.
        hidden = self.model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
        hidden = hidden.flatten(0, 1) * self.model.config.logit_scale
        return linear_cross_entropy(hidden, self.model.lm_head.weight, labels.flatten())


# ---------------------------------------------------------------- the loop


class Pretraining:
    """One run: everything that is built before the first step, and what happens at each."""

    def __init__(self, recipe: PretrainRecipe, run: Run):
        self.recipe, self.run = recipe, run
        self.accelerator = build_accelerator(recipe, run)
        self.device = self.accelerator.device
        main = self.accelerator.is_main_process
        self.inputs = read_inputs(recipe, run, self.accelerator, self._say)
        self.plan = Plan.of(
            recipe,
            None if self.inputs.packed is None else len(self.inputs.packed),
            self.accelerator.num_processes,
            self.accelerator.process_index,
        )
        torch.manual_seed(recipe.seed)
        model = build_model(recipe, self.inputs.tokenizer)
        if recipe.size:
            for line in Derivation(model.config, recipe.max_length).lines():
                self._say(f"size {recipe.size}: {line}")
        for line in self.plan.lines(recipe, self.inputs, model):
            self._say(line)
        self.prepare(model)
        self.checkpoints = Checkpoints(self.accelerator, run.work_dir, recipe.save_total_limit, self._say)
        state = self.checkpoints.load(recipe.resume_from_checkpoint) or {"step": 0, "tokens": 0, "own": {}}
        self.first, self.tokens = self._resumed(state)
        self.log = TrainingLog(run.work_dir / LOG, self.first, main)
        self.batches = self.build_batches(state["own"])
        self.progress = TrainingProgress("pretrain", self.plan.steps, self.first, main)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            self.accelerator.mixed_precision, torch.float32
        )
        self.peak, source = peak_flops(self.device, dtype)
        self._say(
            f"peak             {self.peak / 1e12:.2f} TFLOP/s per process ({source}): MFU is a share of it"
        )

    def prepare(self, model: GPTForCausalLM) -> None:
        """Model and optimizers, made ready for the devices by Accelerate."""
        recipe, accelerator = self.recipe, self.accelerator
        if recipe.activation_checkpointing:
            model.activation_checkpointing_enable()
        flash = (model.config._attn_implementation or "").startswith("flash")
        loss = NextTokenLoss(model, one_row=flash)
        if recipe.torch_compile:
            loss.compile(dynamic=False)  # in place: no `_orig_mod.` gets into the names of the weights
        optimizers = build_optimizers(
            model,
            recipe.optim,
            recipe.learning_rate,
            recipe.muon_learning_rate,
            recipe.weight_decay,
            (recipe.adam_beta1, recipe.adam_beta2),
            recipe.adam_epsilon,
            model.config.logit_scale if model.config.init == "mup" else 1.0,
        )
        if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it wants to know this beforehand
            settings = accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = recipe.per_device_train_batch_size
            settings["gradient_clipping"] = recipe.max_grad_norm
        self.loss, *self.optimizers = accelerator.prepare(loss, *optimizers)
        self.flops_per_token = flops_per_token(model.config, recipe.max_length)

    def build_batches(self, state: dict[str, Any]) -> Batches:
        recipe, inputs, shares = self.recipe, self.inputs, self.plan.shares
        if inputs.packed is not None:
            return PackedBatches(inputs.packed, shares, recipe.seed)
        from datasets.distributed import split_dataset_by_node

        texts = split_dataset_by_node(inputs.texts, shares.rank, shares.world)
        return StreamBatches(texts, inputs.tokenizer, recipe.max_length, shares, recipe.seed, state)

    def train(self) -> None:
        """All steps that are left, then the model directory.

        Raises:
            Interrupted: SIGTERM or Ctrl-C; the step was finished and a checkpoint written.
            TrueupError: loss or gradient are no longer finite.
        """
        try:
            self._steps()
            self.publish()
        finally:
            self.accelerator.end_training()  # trackers write what they hold back

    def _steps(self) -> None:
        plan = self.plan
        with self.progress, StopRequest() as stop:
            for step in range(self.first, plan.steps):
                figures, stopping = self.step(step, stop)
                done, last = step + 1, step + 1 == plan.steps
                self.progress.advance(done)
                if done % plan.log_every == 0 or last:
                    self.report(done, figures)
                if done % plan.eval_every == 0 or last:
                    self.evaluate(done)
                if done % plan.save_every == 0 or last or stopping:
                    self.checkpoints.save(done, self._state(), self.batches.state())
                if stopping:
                    raise Interrupted(stopping, done, plan.steps)

    def step(self, step: int, stop: StopRequest) -> tuple[dict[str, float], int]:
        """One optimizer step; its figures, and the signal that any process was asked to stop by (0: none)."""
        accelerator, started = self.accelerator, time.perf_counter()
        batches = self.batches.step(step)
        torch.manual_seed(step_seed(self.recipe.seed, step, accelerator.process_index))
        factor = self.learning_rate_factor(step)
        set_learning_rate(self.optimizers, factor)
        # Every target of the step weighs the same, in whichever micro-batch and process it is. Accelerate
        # divides by the micro-batches and DDP by the processes, so both are multiplied back in.
        targets = int(self._sum(sum(batch.targets for batch in batches)))
        weight = len(batches) * accelerator.num_processes / targets
        nats = torch.zeros((), device=self.device)
        norm: Any = None
        for batch in batches:
            with accelerator.accumulate(self.loss):
                loss = self.loss(**self._tensors(batch))
                accelerator.backward(loss * weight)
                nats += loss.detach()
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.loss.parameters(), self.recipe.max_grad_norm)
        mean, stopping = float(self._sum(nats)) / targets, self._max(stop.number)
        figures = {
            "loss": mean,
            "grad_norm": float(norm or 0.0),
            "learning_rate": self.recipe.learning_rate * factor,
        }
        self.check_finite(step, figures, batches)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.tokens += targets
        self.log.spent(targets, time.perf_counter() - started)
        return figures, stopping

    def learning_rate_factor(self, step: int) -> float:
        recipe = self.recipe
        return learning_rate_factor(
            step, self.plan.steps, self.plan.warmup, recipe.lr_scheduler_type, recipe.lr_scheduler_kwargs
        )

    def check_finite(self, step: int, figures: dict[str, float], batches: list[Batch]) -> None:
        """Stop before a step that would destroy the weights.

        With loss scaling a gradient may overflow: the scaler then skips that step and lowers the scale.
        """
        watched = ["loss"] if self.accelerator.scaler is not None else ["loss", "grad_norm"]
        bad = [name for name in watched if not math.isfinite(figures[name])]
        if not bad:
            return
        documents = sorted({number for batch in batches for number in batch.documents})
        shown = ", ".join(map(str, documents[:20])) + (", ..." if len(documents) > 20 else "")
        raise TrueupError(
            f"step {step + 1}: {' and '.join(bad)} not finite. The batch was made of the documents {shown} "
            f"(counted from 0). Lower learning_rate (now {self.recipe.learning_rate:g}) or lengthen "
            "warmup_steps; look at those documents if it happens at the same step again. The last checkpoint "
            "is whole"
        )

    # ------------------------------------------------------------ measuring

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Training figures to terminal, log and trackers."""
        speed = self.log.speed()
        row = figures | {
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / (self.peak * self.accelerator.num_processes),
            "tokens": self.tokens,
        }
        self.log.add(step, row)
        self.accelerator.log(row, step=step)
        self.progress.report(
            step,
            {
                "loss": row["loss"],
                "norm": row["grad_norm"],
                "lr": row["learning_rate"],
                "tok/s": speed,
                "MFU": f"{row['mfu']:.1%}",
            },
        )

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Held-out bits per byte: what the model needs to write down each document, its end included, per
        byte of text (special tokens are no bytes). Comparable across tokenizers.
        """
        packed = self.inputs.held_out
        shares = Shares(
            self.recipe.per_device_eval_batch_size,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        self.loss.eval()
        nats = 0.0
        for batch in held_out_batches(packed, shares):
            nats += float(self.loss(**self._tensors(batch)))
        nats = float(self._sum(nats))
        row: dict[str, Any] = {
            "bits_per_byte": nats / math.log(2) / packed.documents.text_bytes,
            "held_out_loss": nats / packed.targets,
        }
        if self.inputs.floor is not None:
            row |= {"floor": self.inputs.floor, "above_floor": row["bits_per_byte"] - self.inputs.floor}
        if self.run.measure is not None:
            with self.accelerator.autocast():
                row |= self.run.measure(self.model, self.inputs.tokenizer)
        self.progress.say(
            f"step {step}: held out  " + "  ".join(f"{name} {show(v)}" for name, v in row.items())
        )
        self.accelerator.log(row, step=step)
        samples = self.samples()
        for sample in samples:
            self.progress.say(f"    {json.dumps(sample, ensure_ascii=False)}")
        self.log.add(step, {**row, "samples": samples})
        self.loss.train()

    def samples(self) -> list[str]:
        """What the model makes of the prompts, with the same random numbers each time; none if sharded."""
        if self.accelerator.distributed_type not in PLAIN_TYPES or not self.accelerator.is_main_process:
            return []
        tokenizer, model = self.inputs.tokenizer, self.model
        prompts = self.inputs.openings if self.recipe.sample_prompts is None else self.recipe.sample_prompts
        context = self.recipe.max_length
        config = GenerationConfig(
            max_new_tokens=min(SAMPLE_TOKENS, context // 2), do_sample=True, temperature=0.8,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        samples = []
        torch.manual_seed(self.recipe.seed)  # every step draws from a seed of its own: nothing is disturbed
        for prompt in prompts:
            text = tokenizer(prompt, add_special_tokens=False)["input_ids"][: (context - 1) // 2]
            ids = torch.tensor([[tokenizer.bos_token_id, *text]], device=self.device)
            with self.accelerator.autocast():
                made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            samples.append(tokenizer.decode(made[0], skip_special_tokens=True))
        return samples

    # ------------------------------------------------------------ the end

    @property
    def model(self) -> GPTForCausalLM:
        """The model without what Accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.loss, keep_torch_compile=False).model

    def publish(self) -> None:
        """The model directory, then the checkpoints are no longer needed."""
        weights = None
        if self.accelerator.distributed_type not in PLAIN_TYPES:  # gathered from all processes
            gathered = self.accelerator.get_state_dict(self.loss)
            weights = {name.removeprefix("model."): tensor for name, tensor in gathered.items()}
        if self.accelerator.is_main_process:
            metrics = self.log.newest() | {"peak_memory_bytes": peak_memory(self.device)}
            self.run.publish(lambda path: self.save(path, weights), metrics, self.tokens)
        self.accelerator.wait_for_everyone()
        self.checkpoints.clear()

    def save(self, path: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """Everything but the record, into a directory."""
        model = self.model
        model.generation_config = default_generation_config(self.inputs.tokenizer)
        model.save_pretrained(path, state_dict=weights)
        self.inputs.tokenizer.save_pretrained(path)
        draw_curve(self.log.rows, path / "loss.png", self.inputs.floor)
        (path / LOG).write_text("".join(json.dumps(row) + "\n" for row in self.log.rows), encoding="utf-8")

    # ------------------------------------------------------------ small things

    def _state(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "rows_per_step": self.plan.shares.rows_per_step}

    def _resumed(self, state: dict[str, Any]) -> tuple[int, int]:
        """Steps done and tokens seen."""
        rows, now = state.get("rows_per_step"), self.plan.shares.rows_per_step
        if rows not in (None, now):
            raise UsageError(
                f"resume_from_checkpoint: the checkpoint was trained with {rows} rows a step, and this run "
                f"would take {now}; use the same number of processes x gradient_accumulation_steps"
            )
        return int(state["step"]), int(state["tokens"])

    def _tensors(self, batch: Batch) -> dict[str, torch.Tensor]:
        arrays = {name: getattr(batch, name) for name in ("input_ids", "position_ids", "labels")}
        return {name: torch.from_numpy(a).to(self.device, non_blocking=True) for name, a in arrays.items()}

    def _sum(self, value: Any) -> torch.Tensor:
        """Over all processes, in float64 where the device has it."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        tensor = torch.as_tensor(value, dtype=dtype, device=self.device)
        return self.accelerator.reduce(tensor, reduction="sum")

    def _max(self, value: int) -> int:
        return int(self.accelerator.reduce(torch.tensor(value, device=self.device), reduction="max"))

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            print(line, flush=True)


# ---------------------------------------------------------------- building


def build_accelerator(recipe: PretrainRecipe, run: Run) -> Accelerator:
    """Devices and precision; `accelerate launch` or torchrun say how many processes there are.

    Raises:
        UsageError: a tracker is not installed, or Muon or eval_tasks are to run on sharded weights.
    """
    wanted = [recipe.report_to] if isinstance(recipe.report_to, str) else recipe.report_to
    trackers = [name for name in wanted if name != "none"]
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in trackers:
        if name not in [*available, "all"]:
            raise UsageError(
                f"report_to: {name} is not installed; here are: {', '.join(available) or 'none'}"
            )
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.bf16 else "fp16" if recipe.fp16 else "no",
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        cpu=recipe.use_cpu,
        log_with=trackers or None,
        project_dir=run.work_dir,
    )
    if recipe.optim == "muon" and accelerator.distributed_type not in PLAIN_TYPES:
        raise UsageError(
            f"optim: muon needs whole matrices, and {accelerator.distributed_type.value} splits them; use "
            "adamw_torch_fused, or plain DDP"
        )
    if run.measure is not None and accelerator.distributed_type not in PLAIN_TYPES:
        raise UsageError(
            f"eval_tasks: need whole weights, and {accelerator.distributed_type.value} splits them; use "
            "plain DDP, or `trueup eval` afterwards"
        )
    if trackers:
        simple = {
            k: v if isinstance(v, int | float | str) else str(v) for k, v in run.recipe.public().items()
        }
        accelerator.init_trackers(recipe.run_name or run.output_dir.name, config=simple)
    return accelerator


def build_model(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerFast) -> GPTForCausalLM:
    """A GPT with fresh weights.

    Raises:
        UsageError: the attention back end is not there.
    """
    config = recipe.gpt_config(
        recipe.max_length,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        return GPTForCausalLM._from_config(config, attn_implementation=recipe.attn_implementation)
    except (ImportError, ValueError) as error:
        raise UsageError(f"attn_implementation: {recipe.attn_implementation}: {error}") from error


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the dropout of one step on one process, unlike those of all others."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
