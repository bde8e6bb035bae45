"""The table of packings: ways to put documents into rows, which `packing.py` carries out."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Packing:
    """A way to fill rows. `order` sorts the rows that have room for a document, by their room: the
    document goes into the first; None cuts documents wherever a row is full."""

    cell_size: int  # most records that are packed together
    order: str | None = None


PACKINGS = {
    "concat": Packing(65_536),
    # Packing a cell takes about as long for a million records as for 65,536: it goes by lengths.
    "first_fit": Packing(2**20, order="number"),
    "best_fit": Packing(2**20, order="room"),
}
