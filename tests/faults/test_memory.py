"""A long run needs no more memory at its end than at its beginning, and compiles its step once."""

import pathlib
import statistics
import threading
import time

import pytest

from tests.faults import runs

STEPS = 2000
FLAGS = [
    f"--config.training.num_steps={STEPS}",
    "--config.training.log_every=10",
    "--config.evaluation.every_steps=100",
    "--config.checkpoint.every_steps=100",
    "--config.checkpoint.keep=2",
]


def resident_bytes(process):
    try:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return None
    kilobytes = [line.split()[1] for line in status if line.startswith("VmRSS")]
    return 1024 * int(kilobytes[0]) if kilobytes else None


@pytest.mark.long
def test_memory_is_flat_and_the_step_compiles_once(config_file, tmp_path, figure):
    workdir, said, sizes = tmp_path / "run", [], {}
    process = runs.start(config_file, workdir, *FLAGS, JAX_LOG_COMPILES="1")
    reader = threading.Thread(target=lambda: said.append(process.stderr.read()))
    reader.start()
    while process.poll() is None:
        time.sleep(0.2)
        size, rows = resident_bytes(process), runs.rows(workdir)
        if size and rows:
            sizes.setdefault(rows[-1]["step"], []).append(size)
    reader.join()
    assert process.returncode == 0, said[0][-2000:]
    early, late = (
        statistics.median(s for step in sizes if low < step <= high for s in sizes[step])
        for low, high in ((STEPS // 4, STEPS // 2), (3 * STEPS // 4, STEPS))
    )
    compilations = said[0].count("Compiling jit(train_step)")
    growth = 100 * (late / early - 1)
    figure(
        f"memory over {STEPS} steps",
        **{"MB in their second quarter": early / 1e6, "MB in their last": late / 1e6},
        **{"% more": growth, "compilations of the step": compilations},
    )
    assert growth < 2
    assert compilations == 1
