"""The training loop: steps, metrics read one step late, evaluation, checkpoints, preemption."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator

import jax

from moe_jax.config import Run
from moe_jax.evaluation.perplexity import Evaluation
from moe_jax.parallel import distributed
from moe_jax.training import metrics
from moe_jax.training.state import TrainState
from moe_jax.training.step import Batch, StepMetrics

EXIT_NONFINITE, EXIT_PREEMPTED = 3, 75


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the loop calls; everything that knows of files, meshes or models is behind these."""

    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    evaluate: Callable[[dict], Evaluation]
    save: Callable[[int, TrainState], None]
    learning_rate: Callable[[int], float]
    writer: metrics.MetricsWriter | metrics.NoMetrics
    tokens_per_step: int
    model_flops_per_token: float
    analytic_flops_per_token: float
    peak_flops: float  # of all devices together
    router_health: Callable[..., dict]  # analysis.routing.health of this model
    largest: Callable[[int], int]  # parallel.distributed.Largest: over all processes


def run(
    state: TrainState, start: int, batches: Iterator[Batch], settings: Run, parts: Parts
) -> tuple[TrainState, Evaluation]:
    """Trains from step `start` to `settings.training.num_steps`; returns the last evaluation too.

    At a step where several are due the order is checkpoint, evaluation, train step: a run restored
    at that step goes on with the evaluation and writes the same rows.

    A signal to one process stops all, at the same step.

    Raises: SystemExit 75 after SIGTERM or Ctrl-C (a checkpoint is saved first), 3 when too many
    steps in a row were not finite.
    """
    last = settings.training.num_steps
    log = _TrainingLog(settings, parts, start)
    every = settings.evaluation.every_steps
    evaluation = None
    with _stop_signals() as stop, metrics.progress(total=last, initial=start) as bar:
        for step in range(start, last + 1):
            stopped_by = parts.largest(stop.requested)
            due = step % settings.checkpoint.every_steps == 0 or step == last or stopped_by
            if step > start and due:
                log.flush()
                parts.save(step, state)
            if stopped_by:
                name = signal.Signals(stopped_by).name
                distributed.say(f"stopped by {name} at step {step}; saved, run again to go on")
                raise SystemExit(EXIT_PREEMPTED)
            if step == last or (every and step % every == 0):
                log.flush()
                with log.clock_stopped():
                    evaluation = parts.evaluate(state.params)
                    parts.writer.write(_validation_row(step, evaluation, parts))
            if step < last:
                # An implicit transfer would make the host wait for the device, or the reverse.
                with jax.transfer_guard("disallow"):
                    state, step_metrics = parts.train_step(state, next(batches))
                log.flush()
                log.pending = (step + 1, step_metrics)
                bar.update()
                bar.set_postfix(log.shown, refresh=False)
    return state, evaluation


class _TrainingLog:
    """Holds the metrics of the step that runs and writes those of the step before it.

    Reading a metric waits for its step; one step late, the device never waits for the reader.
    """

    def __init__(self, settings: Run, parts: Parts, start: int):
        self.pending: tuple[int, StepMetrics] | None = None
        self.shown: dict[str, str] = {}
        self._settings, self._parts = settings, parts
        self._nonfinite_in_a_row = 0
        self._timed_step, self._since = start, time.monotonic()

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, step_metrics), self.pending = self.pending, None
        skipped = bool(jax.device_get(step_metrics.skipped))
        self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if skipped else 0
        training = self._settings.training
        if step % training.log_every == 0 or step == training.num_steps:
            row = self._row(step, jax.device_get(step_metrics))
            self._parts.writer.write(row)
            self.shown = {
                "loss": f"{row['loss']:.3f}",
                "tokens/s": f"{row['tokens_per_second']:,.0f}",
            }
        if self._nonfinite_in_a_row >= training.max_nonfinite_steps:
            distributed.say(
                f"loss or gradient not finite for {self._nonfinite_in_a_row} steps up to {step}; "
                "their updates were skipped. Lower config.optimizer.learning_rate and run again"
            )
            raise SystemExit(EXIT_NONFINITE)

    @contextlib.contextmanager
    def clock_stopped(self):
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def _row(self, step: int, values: StepMetrics) -> dict:
        parts = self._parts
        seconds = max(time.monotonic() - self._since, 1e-9)
        tokens_per_second = (step - self._timed_step) * parts.tokens_per_step / seconds
        self._timed_step, self._since = step, time.monotonic()
        tokens = step * parts.tokens_per_step
        row = {
            "step": step,
            "tokens": tokens,
            "model_flops": tokens * parts.model_flops_per_token,
            "analytic_flops": tokens * parts.analytic_flops_per_token,
            "loss": values.loss,
            **_losses(values),
            "gradient_norm": values.gradient_norm,
            "skipped": int(values.skipped),
            "learning_rate": parts.learning_rate(step - 1),
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * parts.model_flops_per_token / parts.peak_flops,
        }
        if values.tokens_per_expert_LE is not None:
            row["router"] = parts.router_health(
                values.tokens_per_expert_LE, dropped_L=values.dropped_L
            )
        return row


def _losses(values: StepMetrics) -> dict:
    """Those beside the cross-entropy that are on."""
    router = {} if values.router is None else vars(values.router)
    both = {
        **router,
        "load_balancing_coefficients": values.load_balancing_coefficients_L,
        "distillation_loss": values.distillation_loss,
    }
    return {name: value for name, value in both.items() if value is not None}


def _validation_row(step: int, evaluation: Evaluation, parts: Parts) -> dict:
    row = {
        "step": step,
        "tokens": step * parts.tokens_per_step,
        "validation": evaluation.row(),
    }
    if evaluation.tokens_per_expert_LE is not None:
        row["router"] = parts.router_health(evaluation.tokens_per_expert_LE)
    return row


@dataclasses.dataclass
class _Stop:
    requested: int = 0  # the number of the signal


@contextlib.contextmanager
def _stop_signals():
    """Turns SIGTERM (a cloud's notice of preemption) and Ctrl-C into a request the loop sees.

    The second Ctrl-C interrupts at once.
    """
    stop = _Stop()

    def request(number, _):
        stop.requested = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
