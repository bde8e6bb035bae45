"""Trains a model as described by a config file.

Examples:
  python scripts/train.py --config=configs/quickstart.py --workdir=runs/dense
  python scripts/train.py --config=configs/quickstart.py --workdir=runs/mine \\
      --config.data.source=path/to/folder --config.training.num_steps=2000

  python scripts/train.py --config=FILE --workdir=DIR \\
      --coordinator=host0:9876 --num_processes=2 --process_id=0

Run the same command again to resume a run that stopped. The config file is Python and is executed.
--list_keys explains all keys of a config, --list_keys=optimizer those of one section.

On several hosts, start the same command on each, with a workdir that all of them share. Under
Slurm's srun, Open MPI, Cloud TPU slices and Kubernetes (GKE) the processes find each other;
elsewhere, give the three flags. --num_processes=1 makes a process run alone under any of these.

Exit status: 0 done, 1 lost another process (run all again to resume), 2 a mistake in the config,
3 losses not finite or spiking, 75 stopped by SIGTERM, SIGHUP or Ctrl-C (run again to resume), 130
ended at once by a second one.
"""

import argparse
import contextlib
import math
import sys
import threading
from collections.abc import Iterator

from moe_jax import command_line, stopping


class ListKeys(argparse.Action):
    """Prints the keys of a config and exits, like --help."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from moe_jax.config import listing

        with parser.refusing():
            print(listing.text(values or ""))
        parser.exit()


def main() -> None:
    from moe_jax import config
    from moe_jax.config import listing

    parser = command_line.Parser(__doc__)
    parser.usage = "%(prog)s --config=FILE --workdir=DIR [--config.SECTION.KEY=VALUE ...]"
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", required=True, help="a Python file with get_config()")
    kept = "where metrics, checkpoints and the result are kept"
    add("--workdir", metavar="DIR", type=command_line.folder, help=kept)
    add("--config.SECTION.KEY", dest="override", metavar="VALUE", help="overrides one key")
    shown = "print all keys of the run with their values, and do not train"
    add("--print_config", action="store_true", help=shown)
    listed = "print all keys, or those of one section, with their defaults and explanations"
    add("--list_keys", nargs="?", metavar="SECTION", action=ListKeys, help=listed)
    limit = "stop after so many hours as SIGTERM does: save, and end with status 75"
    add("--max_hours", type=float, metavar="H", help=limit)
    add = parser.add_argument_group("several processes").add_argument
    add("--coordinator", metavar="HOST:PORT", default="", help="address of process 0")
    add("--num_processes", type=int, help="number of processes in the whole run")
    add("--process_id", metavar="I", type=int, help="index of this process, from 0 to N - 1")
    arguments, overrides = parser.parse_known_args()
    with parser.refusing():
        given = config.parse([f"--config={arguments.config}", *overrides])
        settings = config.resolve(given, workdir=arguments.workdir)
        if arguments.print_config:
            for name, value in listing.resolved(settings).items():
                print(f"{name}={listing.shown(value)}")
            return
        if arguments.workdir is None:
            raise ValueError("--workdir=DIR is missing: the folder for metrics and checkpoints")
        if arguments.max_hours is not None:
            _stop_in(3600 * arguments.max_hours)
        from moe_jax.config import machine
        from moe_jax.parallel import allocator, distributed

        if not machine.has_accelerator():
            allocator.keep_freed_memory()
        distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    with distributed.ending_together(), parser.refusing((config.ConfigError, OSError)):
        with _advising_on_memory(settings):
            result = _with_rewinds(settings, arguments.workdir)
    if distributed.is_first():
        print(
            f"done: {result['steps']} steps, held-out loss {result['loss']:.4f} nats/token, "
            f"{result['bits_per_byte']:.4f} bits/byte over {result['held_out_tokens']:,} tokens "
            f"-> {arguments.workdir}/result.json"
        )
    if not math.isfinite(result["loss"]):
        sys.exit(command_line.EXIT_NONFINITE)


def _with_rewinds(settings, workdir) -> dict:
    """Trains; after a row of spikes it goes back to the newest checkpoint, a few times at most."""
    from moe_jax import train
    from moe_jax.parallel import distributed
    from moe_jax.training import guards

    leave_out_to = -1
    for _ in range(1 + guards.MOST_REWINDS):
        try:
            return train.run(settings, workdir, leave_out_to=leave_out_to)
        except guards.Rewind as rewind:
            leave_out_to = rewind.batch
            distributed.say(str(rewind))
    distributed.say(
        f"the run went back {guards.MOST_REWINDS} times; lower config.optimizer.learning_rate, or "
        "choose an earlier checkpoint by config.checkpoint.resume_from, and run again"
    )
    raise SystemExit(command_line.EXIT_NONFINITE)


def _stop_in(seconds: float) -> None:
    """Sends SIGTERM to this process later. Raises: ValueError for no time, or no finite one."""
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise ValueError(f"--max_hours={seconds / 3600:g} must be a finite number more than 0")
    timer = threading.Timer(seconds, stopping.ask)
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def _advising_on_memory(settings) -> Iterator[None]:
    """Ends with the settings that need less memory if compiling or running needs too much."""
    import jax

    from moe_jax import config

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        training, reason = settings.training, " ".join(str(error).split())[:160]
        raise config.ConfigError(
            f"out of memory ({reason}); try "
            f"--config.training.accumulation_steps={2 * training.accumulation_steps}, "
            "--config.model.remat=full, or more devices for --config.mesh.fsdp; "
            "scripts/dryrun.py --search finds settings that fit"
        ) from error
