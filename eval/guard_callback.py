"""The guards as a callback of Transformers' Trainer, and so of every trainer of TRL and of PPO."""

from dataclasses import replace
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from trueup.eval.guards import Alarm, Guard

logger = logging.get_logger(__name__)


class GuardCallback(TrainerCallback):
    """Shows a guard every line of the log, and says aloud what it says.

    Args:
        on_alarm: `warn` goes on, `stop` ends the training after this step, with a checkpoint.

    Attributes:
        alarms: all alarms of this run, those before a resume included.
    """

    def __init__(self, guard: Guard | None = None, on_alarm: Literal["warn", "stop"] = "warn") -> None:
        self.guard = guard or Guard()
        self.on_alarm = on_alarm
        self.alarms: list[Alarm] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run brings its log: what a healthy start looked like is read from there again."""
        history = self.guard.history
        warmup = max(history.limits.warmup_steps, args.get_warmup_steps(state.max_steps))
        history.limits = replace(history.limits, warmup_steps=warmup)
        for line in state.log_history:
            self.alarms += self.guard.observe(line, line["step"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called on every rank with the same metrics, so that all stop together."""
        begun = self.guard.observe(logs or {}, state.global_step)
        self.alarms += begun
        for alarm in begun if state.is_world_process_zero else []:
            logger.warning(str(alarm))
        if begun and self.on_alarm == "stop":
            control.should_training_stop = control.should_save = True
