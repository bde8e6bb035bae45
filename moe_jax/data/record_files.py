"""ArrayRecord files as a source, and the choice of the Arrow files of a saved dataset."""

import collections
import pathlib
from collections.abc import Iterator

from array_record.python import array_record_module

from moe_jax import stopping, strict_json, untrusted
from moe_jax.data import document
from moe_jax.data.document import Document


def array_record(path: pathlib.Path, max_line: int) -> Iterator[tuple[str, Document]]:
    """Yields (key, document) for each record of an ArrayRecord file.

    A record that begins with { is a JSON object, as a line of .jsonl; any other is a text. Errors
    name records by their numbers, which begin with 0.
    """
    if (path.parent / "features.json").exists():
        raise ValueError(f"{path} belongs to a TFDS dataset; prepare it, and give tfds:NAME")
    if (path.parent / "manifest.json").exists():
        raise ValueError(f"{path} has tokens, no text; give prepared:{path.parent.parent}")
    number = 0
    reader = array_record_module.ArrayRecordReader(str(path), "")
    try:
        if not reader.ok():  # such a reader has 0 records
            reader.read()  # raises the reason
            raise RuntimeError
        for number in range(reader.num_records()):
            content = reader.read()
            place = f"{path}: record {number}"
            document.check_length(place, content, max_line)
            try:
                text = content.decode("utf-8-sig")
                is_json = text.startswith("{")
                found = document.from_json(text) if is_json else (text, Document(text, "all"))
            except Exception as error:  # includes RecursionError for a record nested too deeply
                raise document.refusal(place, error) from None
            document.check_length(place, text, max_line)
            yield found
        reader.close()
    except (RuntimeError, IndexError) as error:  # with an empty message if the file is truncated
        stopping.pass_on(error)
        reason = " ".join(str(error).split()) or "it is damaged or truncated"
        raise ValueError(
            f"{path} cannot be read at record {number} ({reason}); replace it"
        ) from error


def of_saved_datasets(paths: list[pathlib.Path]) -> list[pathlib.Path]:
    """The files without those that lie in a folder of `Dataset.save_to_disk` but are not its data,
    such as the cache files of `Dataset.map`.

    Raises: ValueError, with the file, if a file of such a dataset is missing.
    """
    folders = collections.defaultdict[pathlib.Path, list[pathlib.Path]](list)
    for path in paths:
        folders[path.parent].append(path)
    kept = []
    for folder, found in folders.items():
        names = {path.name for path in found if path.suffix == ".arrow"}
        state = folder / "state.json"
        if names and state.is_file():
            names &= _data_files(state)
        kept += [path for path in found if path.suffix != ".arrow" or path.name in names]
    return kept


def _data_files(state: pathlib.Path) -> set[str]:
    """The names in a `state.json` of `Dataset.save_to_disk`."""
    facts = strict_json.read_object(state)
    if any(facts.get(name) for name in ("_indices_files", "_indices_data_files")):
        raise ValueError(f"{state}: it is a selection of rows; flatten its indices and save it")
    try:
        names = {str(entry["filename"]) for entry in facts["_data_files"]}
    except (KeyError, TypeError):
        raise ValueError(f"{state} names no data files; save the dataset again") from None
    for name in sorted(names):
        if pathlib.PurePath(name).name != name or not (state.parent / name).is_file():
            raise ValueError(f"{state} names {untrusted.label(name)}, which is not beside it")
    return names
