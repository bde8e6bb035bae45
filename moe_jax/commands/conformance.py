"""Checks the balance losses and updates against the published formulas, and those of a peer.

Examples:
  python scripts/conformance.py
  python scripts/conformance.py --peer=transformers

The expected losses and their gradients with respect to the router's logits are in the package, in
float64. Each loss is computed as in a train step: plainly, over 4 devices, over 2 microbatches,
with padding and with rematerialisation. A cell has the largest error relative to the largest
expected number; "-" is a check that the rule itself, or the number of devices, rules out. The exit
status is 1 if a check of ours fails. A peer's own router and loss are run on the same logits; what
it fails does not change the exit status.
"""

import contextlib
import sys

import jax

from moe_jax import command_line
from moe_jax.conformance import ours, peers, table, vectors


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--peer", choices=peers.PEERS, metavar="NAME", help="the library to check too: %(choices)s"
    )
    peer = parser.parse_args().peer
    with parser.refusing():
        titled = peers.version(peer) if peer else ""
        with contextlib.suppress(RuntimeError):  # jax has already created its devices
            jax.config.update("jax_num_cpu_devices", ours.DEVICES)
        data = vectors.load()
        rules, rules_pass = table.of_rules(
            {rule.name: ours.differences(rule, data) for rule in data.rules}
        )
        updates, updates_pass = table.of_updates(ours.updates(data))
        print(f"{rules}\n\n{updates}")
        if peer:
            print("\n" + table.of_peer(titled, peers.PEERS[peer](data)))
    if not (rules_pass and updates_pass):
        sys.exit(1)
