"""Which rows are ingested, and into which split: listed once to the disk, then decided in bounded memory.

What takes a comparison of all rows (twins, and the places of rows within their strata) is done over files of hashes,
one after the other. In memory are a byte for each row, the strata, and the units.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from data_loaders import durable
from data_loaders.faults import Fault, Refusal
from data_loaders.index import Index, Ints
from data_loaders.progress import Progress
from data_loaders.rejects import Cell, Rejections
from data_loaders.shards import unit_hash
from data_loaders.sources.rows import Rejected, Row, Source
from data_loaders.splits import TRAIN, Splits

BATCH = 2**14
IN_MEMORY = 2**17
"""Keys at a time, about."""
MOST_BITS = 8
"""Of the hash of an id; they say which file it goes to, where there are more keys than that."""
KEY = np.dtype(
    [
        ("id", np.uint64),  # hash of the id, and of id, class and groups
        ("all", np.uint64),
        ("row", np.int64),  # number, below 0 of a row that the data set holds
        ("stratum", np.int32),  # -1 of such a row
        ("given", np.int32),  # number of the split that is given, or that the data set has it in; -1 for none
        ("drawn", np.bool_),  # whether its split is drawn by itself
    ]
)
Keys = np.ndarray
STRATA = 2**17
"""Most of them: beyond, a column of ids was probably taken for one of labels or groups."""
SPOOLED = 200
"""Bytes that a row takes in the files, about."""
HELD = "in the data set"


class Plan:
    """The rows of a source, to be added to those that a data set holds; `folder` is for its files."""

    def __init__(
        self, folder: Path, source: Source, splits: Splits, classes: tuple[str, ...], held: Index | None
    ) -> None:
        self.rejections = Rejections(folder, source.group_names)
        self._folder, self._source, self._splits, self._held = folder, source, splits, held
        self._strata: dict[Cell, int] = {}
        self._units: dict[str, Counter[int]] = defaultdict(Counter)
        """Unit -> rows of each stratum, of those whose split is drawn."""
        self._unit_given: dict[str, tuple[str, str]] = {}
        """Unit -> split that is given for a row of it, and where."""
        self._unit_held = _held_units(held) if held else {}
        self._given: dict[str, int] = {}
        """Split that is given for some row -> its number, of those that the data set has as there."""
        self._numbers = {name: number for number, name in enumerate(held.splits)} if held else {}
        try:
            self.listed = self._list()
            self._key_files = self._divide_keys()
        except Refusal as refusal:
            self.rejections.close()
            faults = [*refusal.faults, *self.rejections.faults]
            raise Refusal(refusal.title, faults, refusal.exit_code, self.rejections.unnamed) from None
        except BaseException:
            self.rejections.close()
            raise
        self._spelling = _spellings(self._label_counts(), classes)
        self.classes = classes or tuple(sorted(set(self._spelling.values())))
        self._class_names = frozenset(self.classes)
        self._left_out = np.zeros(self.listed, np.bool_)
        """Rows that are twins, or that the data set holds."""
        self._twins: dict[int, Fault] = {}
        self.known_cells = Counter[Cell]()
        sizes = self._compare()
        self.known = int(self._left_out.sum()) - len(self._twins)
        """Rows that the data set holds already, just as they are listed; `known_cells` has them by class and groups."""
        self._shares = splits.shares(set(self._given))
        self._unit_split, self._bounds = self._draw(sizes)

    @property
    def new(self) -> int:
        """Rows that are listed and that the data set does not hold."""
        return self.listed - self.known

    def first(self, most: int) -> list[Row]:
        """Some of the rows that are listed, good or not."""
        return list(islice(chain.from_iterable(self._batches()), most))

    def rows(self) -> Iterator[Row]:
        """The good rows, each with its split; the others are rejected on the way."""
        for number, row in enumerate(chain.from_iterable(self._batches())):
            fault = self._twins.get(number)
            if fault is None and self._left_out[number]:
                continue
            fault = fault or self._fault(row)
            if fault is None:
                yield row._replace(split=self._split(row))
            else:
                usual = self._spelling.get(_folded(row.label), row.label)
                self.rejections.add(Rejected(row._replace(label=usual), fault))

    def _list(self) -> int:
        progress, listed, spooled = Progress("list", None, "rows"), 0, 0
        text = ["where", "id", "label", *(f"group {a}" for a in range(len(self._source.group_names))), "split", "unit"]
        schema = pa.schema([*((name, pa.string()) for name in text), *((f"place {n}", pa.int64()) for n in range(3))])
        try:
            with ExitStack() as opened:
                key_file = opened.enter_context((self._folder / "keys").open("wb"))
                sink = opened.enter_context((self._folder / "rows.arrow").open("wb"))
                writer = opened.enter_context(pa.ipc.new_file(sink, schema))
                for keys in self._held_keys():
                    key_file.write(keys.tobytes())
                for rows in self._batches_of_source():
                    keys = self._keys_of(rows, listed)
                    if len(self._strata) > STRATA:
                        what = f"there are more than {STRATA:,} classes in groups"
                        fix = "is source.label_column right? Are source.group_columns groups?"
                        raise Refusal("The rows cannot be divided:", [Fault("source", what, fix)], 65)
                    columns = zip(*((*r[:3], *r.groups, r.split, r.unit, *r.place) for r in rows), strict=True)
                    arrays = [pa.array(c, kind) for c, kind in zip(columns, schema.types, strict=True)]
                    batch = pa.record_batch(arrays, schema=schema)
                    listed, spooled = listed + len(rows), spooled + batch.nbytes + keys.nbytes
                    key_file.write(keys.tobytes())
                    writer.write_batch(batch)
                    progress.show(listed)
        except OSError as wrong:
            raise self._no_room(wrong, spooled / listed if listed else SPOOLED) from wrong
        return listed

    def _divide_keys(self) -> list[Path]:
        """Files of keys in the order of the hashes, but unordered within a file, each small enough for the memory."""
        whole = self._folder / "keys"
        count = whole.stat().st_size // KEY.itemsize
        if count <= IN_MEMORY:
            return [whole]
        bits = min(MOST_BITS, (count // IN_MEMORY).bit_length())
        parts = [self._folder / f"keys-{n:03d}" for n in range(2**bits)]
        with ExitStack() as opened:
            files = [opened.enter_context(path.open("wb")) for path in parts]
            for start in range(0, count, IN_MEMORY):
                keys = np.fromfile(whole, KEY, IN_MEMORY, offset=start * KEY.itemsize)
                number = (keys["id"] >> np.uint64(64 - bits)).astype(np.int64)
                ends = np.cumsum(np.bincount(number, minlength=2**bits))
                for file, part in zip(files, np.split(keys[number.argsort()], ends[:-1]), strict=True):
                    file.write(part.tobytes())
        whole.unlink()
        return parts

    def _no_room(self, wrong: OSError, each: float) -> OSError:
        """Says how many bytes the list of all rows takes, where the disk is full."""
        what = wrong.strerror or str(wrong)
        if wrong.errno in durable.FULL:
            rows = sum(isinstance(item, Row) for item in self._source.rows())
            rows += len(self._held) if self._held else 0
            what += f", the list of {rows:,} rows takes some {rows * each:,.0f} bytes"
        return OSError(wrong.errno, what, wrong.filename or str(self._folder))

    def _batches_of_source(self) -> Iterator[list[Row]]:
        rows: list[Row] = []
        for item in self._source.rows():
            if isinstance(item, Rejected):
                self.rejections.add(item)
                continue
            rows.append(item)
            if len(rows) == BATCH:
                yield rows
                rows = []
        if rows:
            yield rows

    def _keys_of(self, rows: list[Row], first: int) -> Keys:
        place, strata, given = self._splits.place, self._strata, self._given
        keys: list[tuple[int, int, int, int, int, bool]] = []
        for number, row in enumerate(rows, first):
            cell = (row.label, *row.groups)
            stratum = strata.setdefault(cell, len(strata))
            if row.split:
                given.setdefault(row.split, self._numbers.get(row.split, len(self._numbers) + len(given)))
                if row.unit:
                    self._unit_given.setdefault(row.unit, (row.split, f"at {row.where}"))
            elif row.unit:
                self._units[row.unit][stratum] += 1
            drawn = not (row.split or row.unit)
            keys.append((place(row.id), _about(row.id, cell), number, stratum, given.get(row.split, -1), drawn))
        return np.array(keys, KEY)

    def _held_keys(self) -> Iterator[Keys]:
        held = self._held
        if held is None:
            return
        values, rows = list(held.group_values.values()), len(held)
        for start in range(0, rows, BATCH):
            part = slice(start, start + BATCH)
            keys: list[tuple[int, int, int, int, int, bool]] = []
            columns = (c[part].tolist() for c in (held.label, held.in_split, *held.group))
            listed = zip(held.ids[part].to_pylist(), *columns, strict=True)
            for number, (name, label, split, *groups) in enumerate(listed, start - rows):
                cell = (held.classes[label], *(values[a][v] for a, v in enumerate(groups)))
                keys.append((self._splits.place(name), _about(name, cell), number, -1, split, False))
            yield np.array(keys, KEY)

    def _keys(self) -> Iterator[Keys]:
        return (np.fromfile(path, KEY) for path in self._key_files)

    def _batches(self) -> Iterator[Iterator[Row]]:
        with pa.ipc.open_file(self._folder / "rows.arrow") as reader:
            for number in range(reader.num_record_batches):
                where, name, label, *groups, split, unit, a, b, c = reader.get_batch(number).to_pydict().values()
                in_groups = zip(*groups, strict=True) if groups else [()] * len(where)
                places = zip(a, b, c, strict=True)
                yield map(Row._make, zip(where, name, label, in_groups, split, unit, places, strict=True))

    def _label_counts(self) -> Counter[str]:
        """Rows of each label, as it is written."""
        strata = np.zeros(len(self._strata), np.int64)
        for keys in self._keys():
            strata += np.bincount(keys["stratum"][keys["stratum"] >= 0], minlength=len(strata))
        counts = Counter[str]()
        for (label, *_), rows in zip(self._strata, strata.tolist(), strict=True):
            counts[label] += rows
        return counts

    def _compare(self) -> Ints:
        """Finds the rows that are left out; how many of each stratum are drawn, by file of keys, [F, S]."""
        suspects, known_rows = dict[int, int](), np.zeros(len(self._strata), np.int64)
        sizes = np.zeros((len(self._key_files), len(self._strata)), np.int64)
        for number, found in enumerate(self._keys()):
            keys = found[np.lexsort((found["row"], found["id"]))]
            is_first = np.diff(keys["id"], prepend=~keys["id"][:1]) != 0
            again = np.flatnonzero(~is_first)
            first = keys[np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))[again]]
            rows = keys["row"][again]
            given = keys["given"][again]
            known = (first["row"] < 0) & (first["all"] == keys["all"][again])
            known &= (given < 0) | (given == first["given"])
            self._left_out[rows] = True
            known_rows += np.bincount(keys["stratum"][again][known], minlength=len(known_rows))
            suspects |= dict(zip(rows[~known].tolist(), first["row"][~known].tolist(), strict=True))
            sizes[number] = np.bincount(keys["stratum"][is_first & keys["drawn"]], minlength=sizes.shape[1])
        if suspects:
            self._settle(suspects)
        for cell, rows in zip(self._strata, known_rows.tolist(), strict=True):
            if rows:
                self.known_cells[cell] = rows
        bad = [s for (label, *_), s in self._strata.items() if not self._is_class(label)]
        sizes[:, bad] = 0
        return sizes

    def _settle(self, suspects: dict[int, int]) -> None:
        """Says of rows whose id has the hash of an earlier row's what is wrong with them."""
        wanted = {number for number in chain(suspects, suspects.values()) if number >= 0}
        rows = {n: row for n, row in enumerate(chain.from_iterable(self._batches())) if n in wanted}
        for number, first in suspects.items():
            row, earlier = rows[number], self._held_row(first) if first < 0 else _at(rows[first])
            if row.id != earlier.id:
                self._left_out[number] = False  # two ids with one hash
                continue
            if row.unit and not row.split:
                self._units[row.unit][self._strata[row.label, *row.groups]] -= 1
            what, fix = f"{row.id!r} is listed already {earlier.where}", "remove one of the rows"
            if earlier.label != row.label:
                what = f"{row.id!r} is labelled {row.label!r} here and {earlier.label!r} {earlier.where}"
                fix = "keep one of the two rows"
            elif first < 0 and row.groups == earlier.groups:
                what = f"{row.id!r} is of the split {row.split!r} here and of {earlier.split!r} {HELD}"
            elif first < 0:
                mine, its = (", ".join(groups) for groups in (row.groups, earlier.groups))
                what = f"{row.id!r} is in the group {mine} here and {its} {HELD}"
            self._twins[number] = Fault(row.where, what, fix if first >= 0 else "remove the row, or ingest all anew")

    def _held_row(self, number: int) -> Row:
        held = self._held
        assert held is not None
        values = zip(held.group_values.values(), held.group, strict=True)
        groups = tuple(names[of[number]] for names, of in values)
        name = held.id_of(number + len(held))
        return Row(HELD, name, held.classes[held.label[number]], groups, held.splits[held.in_split[number]])

    def _draw(self, sizes: Ints) -> tuple[dict[str, str], dict[int, list[tuple[int, str]]]]:
        """Split of each unit; and of each stratum, the last hash that goes to each split but the last."""
        held = _held_counts(self._held, self._shares) if self._held else {}
        cells = list(self._strata)
        total = {cells[s]: n for s, n in enumerate(sizes.sum(0).tolist()) if n}
        quotas = self._splits.quotas(total, self._shares, held)
        units = {
            unit: Counter({cells[s]: n for s, n in content.items() if n and self._is_class(cells[s][0])})
            for unit, content in self._units.items()
            if unit_hash(unit) not in self._unit_held
        }
        bounds: dict[int, list[tuple[int, str]]] = {}
        looked_up: dict[int, list[tuple[int, int, str]]] = defaultdict(list)  # file -> stratum, place in it, split
        ends = sizes.cumsum(0)
        for cell, quota in quotas.items():
            stratum, rank = self._strata[cell], 0
            bounds[stratum] = []
            for split in list(self._shares)[:-1]:
                rank += quota[split]
                if quota[split]:
                    file = int(np.searchsorted(ends[:, stratum], rank))
                    before = int(ends[file - 1, stratum]) if file else 0
                    looked_up[file].append((stratum, rank - 1 - before, split))
        for number, keys in enumerate(self._keys()):
            if number not in looked_up:
                continue
            drawn = keys[keys["drawn"]]
            drawn = drawn[~self._left_out[drawn["row"]]]
            drawn = drawn[np.lexsort((drawn["id"], drawn["stratum"]))]
            for stratum, place, split in looked_up[number]:
                start = np.searchsorted(drawn["stratum"], stratum)
                bounds[stratum].append((int(drawn["id"][start + place]), split))
        return self._splits.assign(units, self._shares, held), {s: sorted(b) for s, b in bounds.items()}

    def _split(self, row: Row) -> str:
        if row.split:
            return row.split
        if row.unit:
            return self._unit_held.get(unit_hash(row.unit)) or self._unit_split[row.unit]
        place, bounds = self._splits.place(row.id), self._bounds[self._strata[row.label, *row.groups]]
        return next((split for bound, split in bounds if place <= bound), TRAIN)

    def _fault(self, row: Row) -> Fault | None:
        """What is wrong with a row in the light of all the others."""
        if "\0" in "".join((row.id, row.label, *row.groups)):
            return Fault(row.where, "a NUL stands in its id, label or groups", "remove it")
        usual = self._spelling.get(_folded(row.label), row.label)
        if usual != row.label and not self._is_class(row.label):
            what = f"label {row.label!r} differs from {usual!r} only in case or spaces"
            return Fault(row.where, what, "write both alike")
        split, where = self._unit_given.get(row.unit, (row.split, ""))
        if row.unit and row.split and unit_hash(row.unit) in self._unit_held:
            split, where = self._unit_held[unit_hash(row.unit)], HELD
        if split != row.split:
            what = f"{row.unit!r} has rows in the split {split!r} too, {where}"
            return Fault(row.where, what, f"move all rows of {row.unit!r} to one side, or remove these")
        if self._is_class(row.label):
            return None
        if self._held:
            what, fix = f"label {row.label!r} is no class of the data set", "remove the row, or ingest all anew"
        else:
            what, fix = f"label {row.label!r} is not in `classes`", "add it, or remove the row"
        return Fault(row.where, what, fix)

    def _is_class(self, label: str) -> bool:
        return label in self._class_names


def _at(row: Row) -> Row:
    return row._replace(where=f"at {row.where}")


def _about(name: str, cell: Cell) -> int:
    text = "\0".join((name, *cell)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _held_units(held: Index) -> dict[int, str]:
    """Hash of each unit of a data set -> its split."""
    units, first = np.unique(held.unit, return_index=True)
    return {u: held.splits[s] for u, s in zip(units.tolist(), held.in_split[first].tolist(), strict=True) if u}


def _held_counts(held: Index, shares: dict[str, float]) -> dict[Cell, dict[str, int]]:
    """Class and groups -> split that is drawn -> rows of a data set."""
    values, counts = list(held.group_values.values()), dict[Cell, dict[str, int]]()
    order = held.by_cell
    columns = (column.tolist() for column in (order.sizes, order.split, order.label, *order.groups.T))
    for rows, split, label, *groups in zip(*columns, strict=True):
        if held.splits[split] in shares:
            cell = (held.classes[label], *(values[a][v] for a, v in enumerate(groups)))
            counts.setdefault(cell, {})[held.splits[split]] = rows
    return counts


def _spellings(counts: Counter[str], classes: tuple[str, ...]) -> dict[str, str]:
    """Folded label -> the class that is so called, or its most frequent spelling."""
    usual = {_folded(label): label for label in classes}
    for label, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        usual.setdefault(_folded(label), label)
    return usual


def _folded(label: str) -> str:
    return " ".join(label.split()).casefold()
