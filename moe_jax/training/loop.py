"""The training loop: steps, metrics read one step late, evaluators, checkpoints, preemption."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import tqdm

from moe_jax import command_line, stopping
from moe_jax import config as configs
from moe_jax.analysis import measures
from moe_jax.data.batches import Batch
from moe_jax.evaluation.evaluators import Scheduled
from moe_jax.parallel import distributed
from moe_jax.training import flops, goodput, guards, pulse
from moe_jax.training.state import Measures, TrainState


@dataclasses.dataclass(frozen=True)
class Parts:
    """The functions that the loop calls, which hide files, meshes and the model, and the costs that
    it writes into its rows."""

    train_step: Callable[[TrainState, Batch], tuple[TrainState, Measures]]
    evaluators: Mapping[str, Scheduled]
    # (step, state, number of steps skipped so far); `saved` with True waits for the files. Both
    # raise if a save has failed.
    save: Callable[[int, TrainState, int], None]
    saved: Callable[[bool], None]
    write: Callable[[dict], None]  # writes a row of metrics.jsonl
    costs: flops.Costs
    batch_of: Callable[[int], int]  # the number of the batch that a step trains on
    largest: Callable[[int], int]  # the maximum over all processes: parallel.distributed.Largest
    pulse: pulse.Pulse
    merged: Callable[[dict], dict] = lambda params: params  # the parameters that are evaluated


def run(
    state: TrainState,
    start: int,
    batches: Iterator[Batch],
    settings: configs.Run,
    parts: Parts,
    skipped: int = 0,
) -> tuple[TrainState, dict]:
    """Trains to `training.last_step`; returns the evaluators' last results too.

    The first `start` steps are already done; `skipped` of them made no update.

    Within a step the order is checkpoint, evaluators, train step: a run restored at that step
    continues with the evaluators and writes the same rows. A signal to one process stops all
    processes at the same step.

    Raises: SystemExit 75 after SIGTERM, SIGHUP or Ctrl-C (a checkpoint is saved first, if any step
      was made; one process alone abandons a running evaluation), or 3 if too many consecutive steps
      were not finite or the parameters are not. guards.Rewind after too many consecutive spikes.
    """
    last = settings.training.last_step
    log = _TrainingLog(settings, parts, start, skipped)
    results: dict = {}
    silent = None if distributed.is_first() else True  # None: silent only without a terminal
    progress = tqdm.tqdm(total=last, initial=start, unit="step", disable=silent, dynamic_ncols=True)
    stop = _Stop()
    begin = parts.pulse.at
    with stopping.requests(stop), progress as bar, parts.pulse.watched():
        for step in range(start, last + 1):
            parts.saved(False)
            stopped_by = parts.largest(stop.number)
            due = step % settings.checkpoint.every_steps == 0 or step == last or stopped_by
            if step > start and due:
                log.flush()
                begin(step, "save")
                parts.save(step, state, log.skipped)
            if stopped_by:
                parts.saved(True)
                _end(stopped_by, step, saved=step > start)
            for evaluator in parts.evaluators.values():
                if step == last or evaluator.is_due(step):
                    log.flush()
                    begin(step, pulse.EVALUATION)
                    try:
                        with log.clock_stopped(), stop.at_once():
                            found = evaluator.evaluate(parts.merged(state.params))
                    except _Stopped:
                        if step > start and not due:
                            parts.save(step, state, log.skipped)
                        parts.saved(True)
                        _end(stop.number, step, saved=step > start)
                    if found.row and (evaluator.is_due(step) or evaluator.logged_at_end):
                        tokens = step * parts.costs.tokens_per_step
                        parts.write({"step": step, "tokens": tokens, **found.row})
                    results |= found.result
            if step < last:
                begin(step, "wait for data")
                # An implicit transfer would make the host wait for the device, or vice versa.
                with jax.transfer_guard("disallow"):
                    batch = log.waiting_for(lambda: next(batches))
                    begin(step, "step" if step > start else "compilation and step")
                    state, step_measures = parts.train_step(state, batch)
                log.flush()
                log.pending = (step + 1, step_measures)
                bar.update()
                bar.set_postfix(log.shown, refresh=False)
        begin(last, "save")
        parts.saved(True)
        stopping.over()  # what is left to do takes seconds
    shares = goodput.shares(parts.pulse.clock.seconds(), log.skipped / last)
    distributed.say(goodput.line(shares))
    return state, {**results, "skipped_steps": log.skipped, "goodput": shares}


class _TrainingLog:
    """Holds the metrics of the running step and writes the metrics of the step before it.

    Reading a metric waits for its step. Because it is read one step late, the device never waits
    for the host.
    """

    def __init__(self, settings: configs.Run, parts: Parts, start: int, skipped: int):
        self.pending: tuple[int, Measures] | None = None
        self.shown: dict[str, str] = {}
        self._settings, self._parts = settings, parts
        self._nonfinite_in_a_row = self._spikes_in_a_row = 0
        self._alarms, self._waited, self._slow_data = guards.Alarms(settings), 0.0, False
        self.skipped = skipped
        self._timed_step, self._since = start, time.monotonic()

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, step_measures), self.pending = self.pending, None
        m = step_measures
        skipped, spiked, diverged = jax.device_get((m.skipped, m.spiked, m.diverged))
        self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if skipped and not spiked else 0
        self._spikes_in_a_row = self._spikes_in_a_row + 1 if spiked else 0
        self.skipped += int(skipped)
        training = self._settings.training
        if skipped:
            what = "a spike of the loss or gradient" if spiked else "loss or gradient not finite"
            distributed.say(f"step {step}: {what}, no update was made ({self.skipped} in this run)")
        if step % training.log_every == 0 or step == training.last_step:
            row = self._row(step, jax.device_get(step_measures))
            self._parts.write(row)
            self._alarms.see(row)
            self.shown = {
                "loss": f"{row['loss']:.3f}",
                "tokens/s": f"{row['tokens_per_second']:,.0f}",
            }
        if 0 < self._settings.guards.rewind_after <= self._spikes_in_a_row:
            raise guards.Rewind(step, self._parts.batch_of(step))
        if self._nonfinite_in_a_row >= training.max_nonfinite_steps:
            first, last = (
                self._parts.batch_of(at) for at in (step - self._nonfinite_in_a_row + 1, step)
            )
            distributed.say(
                f"loss or gradient not finite for {self._nonfinite_in_a_row} steps up to {step}; "
                "their updates were skipped. Lower config.optimizer.learning_rate, or leave the "
                f'batches out by --config.data.skip_batches="(({first},{last}),)", and run again'
            )
            raise SystemExit(command_line.EXIT_NONFINITE)
        if diverged:
            distributed.say(
                f"the update of step {step} made parameters that are not finite; they are not "
                "saved. Lower config.optimizer.learning_rate and run again: it goes on from the "
                "newest checkpoint, or from that of --config.checkpoint.resume_from=STEP"
            )
            raise SystemExit(command_line.EXIT_NONFINITE)

    def waiting_for(self, get: Callable[[], Batch]) -> Batch:
        """The next batch; notes the time if the device had nothing left to do meanwhile."""
        began = time.monotonic()
        batch = get()
        seconds = time.monotonic() - began
        if self.pending is None or _is_ready(self.pending[1].loss):
            self._parts.pulse.clock.waited(seconds)
            self._waited += seconds if self.pending else 0.0
        return batch

    @contextlib.contextmanager
    def clock_stopped(self):
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def _row(self, step: int, values: Any) -> dict:
        costs = self._parts.costs
        seconds = max(time.monotonic() - self._since, 1e-9)
        tokens_per_second = (step - self._timed_step) * costs.tokens_per_step / seconds
        data_wait, self._waited = self._waited / seconds, 0.0
        if data_wait > self._settings.guards.data_wait and seconds > 1 and not self._slow_data:
            self._slow_data = True
            distributed.say(
                f"step {step}: {data_wait:.0%} of the time is spent waiting for batches; put "
                "config.data.cache_dir on a local disk, or give the process more CPU cores"
            )
        self._timed_step, self._since = step, time.monotonic()
        tokens = step * costs.tokens_per_step
        row: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "model_flops": tokens * costs.model_flops_per_token,
            "analytic_flops": tokens * costs.analytic_flops_per_token,
            "loss": values.loss,
            **values.terms,
            "gradient_norm": values.gradient_norm,
            "skipped": int(values.skipped),
            "learning_rate": values.learning_rate,
            "tokens_per_second": tokens_per_second,
            "data_wait": data_wait,
            "mfu": tokens_per_second * costs.model_flops_per_token / costs.peak_flops,
        }
        if values.load_balancing_coefficients_L is not None:
            row["load_balancing_coefficients"] = values.load_balancing_coefficients_L
        if values.router is not None:
            router, factor = self._settings.model.router, self._settings.model.capacity_factor
            sums = measures.Sums(values.router, router, factor, measures.TRAINING)
            row["router"] = measures.rows(sums)
        return row


def _is_ready(x: Any) -> bool:
    return x.is_ready()  # which jax.Array has, but does not declare


class _Stopped(BaseException):
    """Abandons an evaluation; it is no Exception, so that no library catches it."""


class _Stop:
    """A signal's request to stop, which the loop polls between steps."""

    number = 0  # of the signal

    def __init__(self):
        self._at_once = False

    def __call__(self, number: signal.Signals) -> None:
        self.number = number
        if self._at_once and not stopping.importing():  # else the evaluation goes on to its end
            raise _Stopped

    @contextlib.contextmanager
    def at_once(self):
        """A signal in the block raises _Stopped, unless other processes would wait for this one."""
        self._at_once = distributed.process_count() == 1
        try:
            if self.number and self._at_once:
                raise _Stopped
            yield
        finally:
            self._at_once = False


def _end(number: int, step: int, *, saved: bool) -> NoReturn:
    name, then = signal.Signals(number).name, "saved, run again to go on"
    distributed.say(f"stopped by {name} at step {step}; {then if saved else 'run again'}")
    raise SystemExit(stopping.EXIT_PREEMPTED)
