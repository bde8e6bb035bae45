"""Runs lm-evaluation-harness's own command, which then has the model "moe_jax".

Examples:
  python scripts/harness.py run --model=moe_jax --model_args=checkpoint=path/to/moe --tasks=piqa
  python scripts/harness.py run --model=moe_jax --model_args=checkpoint=runs/mine,limit=1024 \\
      --tasks=my_task --include_path=path/to/tasks --batch_size=8
  python scripts/harness.py ls tasks

All arguments are the harness's, which you install by: pip install 'moe_jax[evaluation]'. The
arguments of the model are `checkpoint` (a run's workdir, RUN@STEP or a Hugging Face folder) and
optionally `tokenizer`, `limit` (the tokens to read at once), `num_experts_per_tok` and
`allow_nonfinite`.
"""

import sys

from moe_jax import command_line, stores
from moe_jax.evaluation import task_lists


def main() -> None:
    parser = command_line.Parser(__doc__)
    if set(sys.argv[1:]) <= {"-h", "--help"}:
        parser.parse_args()
        parser.error("give the harness's arguments, such as: ls tasks")
    with parser.refusing():
        task_lists.check_harness("this")
        from lm_eval import __main__ as command

        from moe_jax.evaluation import harness

        harness.register(stores.subject)
        command.cli_evaluate()
