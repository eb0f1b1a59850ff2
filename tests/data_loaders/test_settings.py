import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from data_loaders.augment import PadCrop, Plain, Standard
from data_loaders.faults import Refusal
from data_loaders.ingest import Ingest
from data_loaders.loader import Data
from data_loaders.settings import Settings, describe, differences, digest, dump, override, parse, parse_text, variants
from data_loaders.sources.csv_file import Csv
from data_loaders.sources.folder import Folder
from data_loaders.splits import Splits

WORDS = ["source.path=labels.csv", "out=data"]
words_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def refused(kind: type[Settings], words: list[str]) -> dict[str, str]:
    """Place -> message of every fault."""
    with pytest.raises(Refusal) as refusal:
        parse(kind, words)
    assert refusal.value.exit_code == 2
    return {fault.where: f"{fault.what} — {fault.fix}" for fault in refusal.value.faults}


def any_of(kind: type[Settings]) -> st.SearchStrategy[Any]:
    """Every settings object of a class that its own rules admit; what has a default may be left out."""

    def build(values: dict[str, Any]) -> Settings | None:
        try:
            return kind(**values)
        except ValidationError:
            return None

    fields = {name: field for name, field in kind.model_fields.items() if name != "kind"}
    drawn = {name: value_of(field.annotation, field.metadata) for name, field in fields.items()}
    required = {name: drawn.pop(name) for name, field in fields.items() if field.is_required()}
    return st.fixed_dictionaries(required, optional=drawn).map(build).filter(lambda settings: settings is not None)


def value_of(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Every value of a field."""
    metadata = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return value_of(parts[0], [*metadata, *parts[1:]])
    if origin in {Union, types.UnionType}:
        return st.one_of([value_of(part, metadata) for part in parts])
    if origin is not None:
        return several_of(origin, parts)
    if issubclass(annotation, Settings):
        return any_of(annotation)
    return one_of(annotation, metadata)


def several_of(origin: Any, parts: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    if origin is Literal:
        return st.sampled_from(parts)
    inner = [value_of(part, []) for part in parts if part is not ...]
    if origin is dict:
        return st.dictionaries(*inner, max_size=3)
    return st.lists(*inner, max_size=3).map(tuple) if ... in parts else st.tuples(*inner)


def one_of(annotation: type, metadata: list[Any]) -> st.SearchStrategy[Any]:
    bound = {n: getattr(m, n) for m in metadata for n in ("ge", "gt", "le", "lt") if getattr(m, n, None) is not None}
    least, greatest = bound.get("ge", bound.get("gt")), bound.get("le", bound.get("lt"))
    patterns = [m.pattern for m in metadata if getattr(m, "pattern", None)]
    plain: dict[Any, Callable[[], st.SearchStrategy[Any]]] = {
        bool: st.booleans,
        int: lambda: st.integers(least, greatest).filter(lambda n: n not in {bound.get("gt"), bound.get("lt")}),
        float: lambda: st.floats(
            least, greatest, exclude_min="gt" in bound, exclude_max="lt" in bound, allow_nan=False, allow_infinity=False
        ),
        str: lambda: st.from_regex(patterns[0]).filter(lambda text: "\n" not in text) if patterns else words_text,
        Path: lambda: words_text.filter(lambda text: "\0" not in text).map(Path),
        types.NoneType: st.none,
    }
    return plain[annotation]()


@given(any_of(Ingest))
def test_what_ingest_dumps_reloads_to_equal_settings(settings):
    assert parse_text(Ingest, dump(settings)) == settings
    assert digest(parse_text(Ingest, dump(settings))) == digest(settings)


@hypothesis_settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(st.data())
def test_what_a_training_run_dumps_reloads_to_equal_settings(data):
    from trainer.config import Config

    settings = data.draw(any_of(Config))
    assert parse_text(Config, dump(settings)) == settings


@pytest.mark.parametrize(
    "name", ["no", "yes", "null", "~", "3e-4", "007", "1_000", "0x10", "2020-01-01", "=", "<<", ""]
)
def test_a_class_may_be_called_anything(tmp_path: Path, name):
    settings = override(parse(Ingest, WORDS), {"classes": (name, "cat")})
    (tmp_path / "a.yaml").write_text(dump(settings))
    assert parse(Ingest, [str(tmp_path / "a.yaml")]).classes == (name, "cat")


def test_text_is_read_as_what_the_setting_is(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        "source: {path: 007, label_column: 3e-4}\nout: 1.0\nclasses: [no, yes, 1.0]\nsplits: {val: 3e-1, seed: 12}\n"
    )
    settings = parse(Ingest, [str(tmp_path / "a.yaml")])
    assert isinstance(settings.source, Csv)
    assert (settings.source.path, settings.source.label_column) == (("007",), "3e-4")
    assert settings.classes == ("no", "yes", "1.0")
    assert settings.splits == Splits(val=0.3, seed=12)
    assert parse(Ingest, [*WORDS, "splits.val=3e-4"]).splits.val == 0.0003
    assert parse(Ingest, [*WORDS, "address="]).address is None


def test_later_words_win_over_earlier_ones_and_files_take_their_turn(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("out: file\nsplits:\n  val: 0.3\n  test: 0.2\n")
    file = str(tmp_path / "a.yaml")
    assert parse(Ingest, [*WORDS, file]).out == Path("file")
    later = parse(Ingest, [file, *WORDS, "splits.val=0.1", "splits.val=0.25"])
    assert later.out == Path("data")
    assert later.splits == Splits(val=0.25, test=0.2)


def test_an_empty_file_and_an_empty_section_change_nothing(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    (tmp_path / "b.yaml").write_text("splits: {}\n")
    words = [*WORDS, str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    assert parse(Ingest, words) == parse(Ingest, WORDS)


@pytest.mark.parametrize(
    "words",
    [
        ["source.kind=folder", "source.path=a", "source.splits=[train]"],
        ["source.path=a", "out=b", "source.splits=[train]", "source.kind=folder"],
        ["source={path: a, splits: [train], kind: folder}"],
        ["source={kind: csv, path: c}", "source.path=a", "source.kind=folder", "source.splits=[train]"],
    ],
)
def test_a_kind_may_stand_before_or_behind_its_settings(words):
    assert parse(Ingest, [*words, "out=b"]).source == Folder(path=Path("a"), splits=("train",))


def test_another_kind_drops_the_settings_of_the_former():
    data = Data(path=Path("d"), augmentation=Standard(flip_horizontal=1.0, rotation=9))
    assert override(data, {"augmentation.kind": "pad_crop"}).augmentation == PadCrop()
    assert override(data, {"augmentation.padding": 1, "augmentation.kind": "pad_crop"}).augmentation == PadCrop(
        padding=1
    )
    assert override(data, {"augmentation.kind": "standard"}) == data
    assert override(data, {"augmentation": Plain()}).augmentation == Plain()


def test_a_change_of_a_default_variant_keeps_its_other_settings():
    settings = override(Data(path=Path("d")), {"augmentation.rotation": 20})
    assert settings.augmentation == Standard(rotation=20)


def test_a_mapping_takes_names_with_dots_and_gives_up_what_is_no_mapping():
    words = [*WORDS, "source.held_out=old.csv", "source.held_out.test=t.csv", "source.held_out.site.b=b.csv"]
    source = parse(Ingest, words).source
    assert isinstance(source, Csv)
    assert source.held_out == {"test": ("t.csv",), "site.b": ("b.csv",)}


def test_a_mapping_of_mappings_is_reached_by_words_and_files(tmp_path: Path):
    class Costs(Settings):
        rows: dict[str, dict[str, float]] = Field(default_factory=dict)

    (tmp_path / "a.yaml").write_text("rows: {a.b: {c: 1}, d: {}}\n")
    rows = parse(Costs, [str(tmp_path / "a.yaml"), "rows.d.e=2", "rows.d.f.g=3"]).rows
    assert rows == {"a.b": {"c": 1}, "d": {"e": 2, "f.g": 3}}


def test_settings_are_frozen_and_override_leaves_them_as_they_were():
    settings = parse(Ingest, WORDS)
    changed = override(settings, {"splits.val": 0.3, "source.held_out.test": "t.csv"})
    assert settings == parse(Ingest, WORDS)
    assert isinstance(changed.source, Csv)
    assert changed.source.held_out == {"test": ("t.csv",)}
    with pytest.raises(ValidationError, match="frozen"):
        settings.out = Path("b")


def test_every_fault_of_files_and_words_is_found_in_one_pass(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "source:\n"
        "  kind: csv\n"
        "  label_colum: dish\n"
        "splits:\n"
        "  val: much\n"
        "workers: -1\n"
        "rejects:\n"
        "  allow: {a: 1}\n"
        "out:\n"
        "  path: here\n"
    )
    found = refused(Ingest, [str(path), "shards.row=3", "shards.pixel_cap=0", "shape", "splits.seed=1.5"])
    assert found.keys() == {
        f"{path}:3:16",
        f"{path}:5:8",
        f"{path}:6:10",
        f"{path}:8:14",
        f"{path}:10:9",
        "shards.row",
        "shards.pixel_cap",
        "shape",
        "splits.seed",
        "source.path",
        "out",
    }
    assert "no setting 'source.label_colum' — did you mean label_column" in found[f"{path}:3:16"]
    assert "did you mean rows" in found["shards.row"]
    assert "not 'much'" in found[f"{path}:5:8"]
    assert "greater than or equal to 0" in found[f"{path}:6:10"]
    assert "has no part" in found[f"{path}:10:9"]
    assert "required" in found["source.path"]
    assert "neither a YAML file nor path=value" in found["shape"]


def test_a_wrong_kind_is_answered_with_the_nearest():
    assert "did you mean folder?" in refused(Ingest, [*WORDS, "source.kind=foldr"])["source.kind"]
    assert "csv" in refused(Ingest, [*WORDS, "source.kind=zebra"])["source.kind"]


@pytest.mark.parametrize("value", ["[csv]", "{csv: 1}", "", "null"])
def test_a_kind_that_is_no_name_is_a_fault_and_no_crash(value):
    assert "no kind" in refused(Ingest, [*WORDS, f"source.kind={value}"])["source.kind"]


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("out: a\nout: b\n", ":2:1", "'out' stands twice"),
        ("source:\n  path: a\n  held_out: {t: a, t: b}\n", ":3:20", "'t' stands twice"),
        ("? [a, b]\n: c\n", ":1:3", "name of a setting"),
        ("source: {held_out: [{[a]: b}]}\n", ":1:22", "name of a setting"),
        ("out: a\n  splits: b\n", ":2:9", "is not YAML"),
        ("out: [a\n", ":2:1", "is not YAML"),
        ("out: *nothing\n", ":1:6", "is not YAML"),
        ("out: a\n---\nout: b\n", ":2:1", "is not YAML"),
        ("out: \x07\n", "", "is not YAML"),
        ("out: &a [*a]\n", "", "is not YAML"),
        ("out: " + "[" * 2000, "", "is not YAML"),
        ("sauce: a\n", ":1:8", "did you mean source?"),
        ("out:\n  - a\n", ":2:3", "out:"),
        ("- out\n", ":1:1", "name: value"),
        ("out\n", ":1:1", "name: value"),
    ],
)
def test_yaml_that_is_wrong_is_told_with_its_place(tmp_path: Path, text, place, said):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    found = refused(Ingest, [str(path)])
    assert said in found[f"{path}{place}"]


@pytest.mark.parametrize("value", ["[", "\x00", "{[a]: b}", "{a: 1, a: 2}", "*x"])
def test_a_value_that_is_not_yaml_is_told_with_its_path(value):
    assert any(where.startswith("source.held_out") for where in refused(Ingest, [*WORDS, f"source.held_out={value}"]))


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes("out: é".encode("latin-1"))
    (tmp_path / "folder.yaml").mkdir()
    paths = [str(tmp_path / name) for name in ("latin.yaml", "folder.yaml", "missing.yaml")]
    found = refused(Ingest, paths)
    assert all("cannot be read" in found[path] for path in paths)


@pytest.mark.parametrize("word", ["=1", ".=1", "source.=1", ".out=1", "out.=1", "source.kind.x=1", "splits.kind=a"])
def test_a_path_that_leads_nowhere_is_a_fault(word):
    assert refused(Ingest, [*WORDS, word]).keys() == {word.partition("=")[0]}


@pytest.mark.parametrize("value", ["nan", "inf", "-.inf", ".nan", "1.0", "-0.1"])
def test_numbers_out_of_bounds_are_refused(value):
    assert "splits.val" in refused(Ingest, [*WORDS, f"splits.val={value}"])


def test_settings_that_do_not_go_together_are_refused_together():
    found = refused(Ingest, [*WORDS, "splits={val: 0.5, test: 0.5}", "source.split_by=a", "source.split_column=b"])
    assert "leaves no row to train on" in found["splits"]
    assert any("name one of them" in what for what in found.values())


def test_the_digest_is_the_same_on_every_machine_and_differs_with_any_setting():
    assert digest(Splits()) == digest(Splits(val=0.1, test=0.1)) == "f6f86ed36a442575"
    assert digest(Splits()) != digest(Splits(seed=1))


def test_differences_are_named_with_both_values():
    a = parse(Ingest, WORDS)
    b = override(a, {"source.held_out.test": "t.csv", "splits.val": 0.2})
    assert list(differences(a, a)) == []
    assert list(differences(a, b)) == [("source.held_out.test", None, ["t.csv"]), ("splits.val", 0.1, 0.2)]


def paths_of(kind: type[Settings], prefix: str = "") -> list[str]:
    found = []
    for name, field in kind.model_fields.items():
        inner = variants(field.annotation)
        found += [path for choice in inner for path in paths_of(choice, f"{prefix}{name}.")]
        found += [prefix + name] if not inner and name != "kind" else []
    return found


def test_describe_lists_every_setting_with_default_type_bounds_and_meaning():
    lines = list(describe(Ingest))
    listed = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("      ")]
    assert sorted(path for path in listed if "kind=" not in path) == sorted(paths_of(Ingest))
    assert "  source.path required  (str | path)" in lines
    assert "  splits.val = 0.1  (float, >= 0.0, < 1.0)" in lines
    assert "  address = null  (str | null)" in lines
    assert "  source.group_columns = []  (tuple[str, …])" in lines
    assert any(line.startswith("  source.kind=csv: Images listed in CSV files") for line in lines)
    meaning = "      Folder of the data set; must not hold one yet, but to append."
    assert lines[lines.index("  out required  (path)") + 1] == meaning
