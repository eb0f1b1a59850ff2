"""Settings: frozen, typed trees, and the one way to fill them, from YAML files and dotted path=value words.

Later words win over earlier ones. Scalars stay text until the typed tree reads them, so that `3e-4` is a number where
a number is wanted, and a class may be called `no`. Every fault is found in one pass and says where it stands.
"""

import difflib
import hashlib
import json
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from data_loaders.faults import Fault, Refusal

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
S = TypeVar("S", bound="Settings")
Tree = dict[str, Any]


class Settings(BaseModel):
    """Base of all settings: the meaning and unit of a field stand as a string under it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    def faults(self) -> list[Fault]:
        """What is wrong between its parts, each at the dotted path of a setting; asked of the whole tree."""
        return []


class _Dumper(yaml.SafeDumper):
    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Quotes that escape the one character which YAML would otherwise read back as a line break."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\x85" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


class Change(NamedTuple):
    path: tuple[str, ...]
    value: Any
    where: str


def parse(kind: type[S], words: Sequence[str]) -> S:
    """The settings that command-line words ask for: names of YAML files, and path=value."""
    changes: list[Change] = []
    faults: list[Fault] = []
    beside: list[Change] = []  # the words since the last file
    for word in words:
        path, is_change, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and not is_change:
            is_change, value = "=", "true"
        if is_change:
            beside += _from_text(value, path, faults, tuple(path.split(".")))
        elif Path(word).suffix in {".yaml", ".yml"}:
            changes += [*_kinds_first(beside), *_from_file(Path(word), faults)]
            beside = []
        else:
            faults.append(Fault(word, "neither a YAML file nor path=value", "see --help"))
    return _build(kind, {}, [*changes, *_kinds_first(beside)], faults)


def parse_text(kind: type[S], text: str, name: str = "settings") -> S:
    """The settings in YAML text, such as `dump` writes."""
    faults: list[Fault] = []
    return _build(kind, {}, _from_text(text, name, faults, ()), faults)


def override(settings: S, changes: dict[str, Any]) -> S:
    """New settings in which these dotted paths have these values."""
    asked = [Change(tuple(path.split(".")), value, path) for path, value in changes.items()]
    return _build(type(settings), settings.model_dump(), _kinds_first(asked), [])


def dump(settings: Settings) -> str:
    """YAML that `parse` reads back to equal settings."""
    tree = settings.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def digest(settings: Settings) -> str:
    """Hash (16 hex digits) of the values, the same on every machine."""
    text = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(a: Settings, b: Settings) -> Iterator[tuple[str, Any, Any]]:
    """Dotted path and both values of each setting in which a and b differ."""

    def flat(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]

    left, right = (dict(flat(settings.model_dump(mode="json"))) for settings in (a, b))
    for path in sorted(left.keys() | right.keys()):
        if left.get(path) != right.get(path):
            yield path, left.get(path), right.get(path)


def describe(kind: type[Settings], prefix: str = "") -> Iterator[str]:
    """Lines for each setting: path, default, type, bounds and meaning; then every section, with all its variants."""
    sections = {name: variants(field.annotation) for name, field in kind.model_fields.items()}
    for name, field in kind.model_fields.items():
        if name == "kind" or sections[name]:
            continue
        default = "required" if field.is_required() else f"= {_plain(field.get_default(call_default_factory=True))}"
        facts = ", ".join(part for part in (_type_name(field.annotation), *map(_bound, field.metadata)) if part)
        yield f"  {prefix}{name} {default}  ({facts})"
        yield from [f"      {' '.join(field.description.split())}"] if field.description else []
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        for number, choice in enumerate(sections[name]):
            yield from ["", f"{prefix}{name}: {_first_line(field.description or choice.__doc__)}"] if not number else []
            if (tag := kind_of(choice)) is not None:
                said = "  (default)" if isinstance(default, choice) else ""
                yield f"  {prefix}{name}.kind={tag}{said}: {_first_line(choice.__doc__)}"
            yield from describe(choice, f"{prefix}{name}.")


def value_of(text: str) -> Any:
    """What YAML text stands for; scalars stay text until a typed tree reads them. ValueError if it is not YAML."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as wrong:
        raise ValueError("is not YAML") from wrong
    return None if node is None else _value(node)


def variants(annotation: Any) -> list[type[Settings]]:
    """The settings classes that an annotation admits; empty for a plain value."""
    if get_origin(annotation) is Annotated:
        return variants(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [v for part in get_args(annotation) for v in variants(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Settings) else []


def kind_of(variant: type[Settings]) -> str | None:
    """The tag of a variant of a union, or None."""
    field = variant.model_fields.get("kind")
    return get_args(field.annotation)[0] if field else None


def _kinds_first(changes: Iterable[Change]) -> list[Change]:
    """The changes, each `section.kind` ahead of what stands beside it for that section, since a new kind clears it."""
    ordered: list[Change] = []
    for change in changes:
        before = (n for n, earlier in enumerate(ordered, 1) if _clears(earlier.path, change.path))
        ordered.insert(max(before, default=0) if change.path[-1] == "kind" else len(ordered), change)
    return ordered


def _clears(earlier: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """Whether a change at `earlier` sets anew the section that `path` lies in."""
    section = earlier[:-1] if earlier[-1] == "kind" else earlier
    return path[: len(section)] == section


def _build(kind: type[S], tree: Tree, changes: Iterable[Change], faults: list[Fault]) -> S:
    places: dict[tuple[str, ...], str] = {}
    for change in changes:
        places[change.path] = change.where
        _put(tree, [kind], change.path, change, faults)
    settings: Any = None
    try:
        settings = kind.model_validate(tree)
    except ValidationError as wrong:
        faults += [_as_fault(tree, error, places) for error in wrong.errors()]
    else:
        faults += [fault._replace(where=_given(fault.where, places)) for fault in settings.faults()]
    if faults:
        raise Refusal(f"{len(faults)} fault{'s' * (len(faults) > 1)} in the settings:", faults)
    return settings


def _put(node: Tree, choices: list[type[Settings]], path: tuple[str, ...], change: Change, faults: list[Fault]) -> None:
    """Sets one value in the tree, descending by the types, so that a wrong name is found where it stands."""
    name, *rest = path
    by_kind = {kind_of(choice): choice for choice in choices}
    if name == "kind" and not rest and None not in by_kind:
        if not isinstance(change.value, str) or change.value not in by_kind:
            faults.append(Fault(change.where, f"no kind {change.value!r}", nearest(str(change.value), by_kind)))
        elif node.get("kind") != change.value:
            node.clear()  # the settings of the former kind do not carry over
            node["kind"] = change.value
        return
    fields = (by_kind.get(node.get("kind")) or choices[0]).model_fields
    if name not in fields:
        faults.append(Fault(change.where, f"no setting {'.'.join(change.path)!r}", nearest(name, fields)))
        return
    inner = variants(fields[name].annotation)
    if inner and (rest or isinstance(change.value, dict)):
        child = node.get(name)
        if not isinstance(child, dict):
            default = fields[name].get_default(call_default_factory=True)
            child = node[name] = default.model_dump() if isinstance(default, Settings) else _new(inner)
        if rest:
            _put(child, inner, tuple(rest), change, faults)
        else:
            for part, value in sorted(change.value.items(), key=lambda item: item[0] != "kind"):
                _put(child, inner, (part,), Change((*change.path, part), value, change.where), faults)
    elif rest and (depth := _mapping_depth(fields[name].annotation)):
        _put_inside(node, name, rest, depth, change.value)
    elif rest:
        faults.append(Fault(change.where, f"{name!r} is a single value and has no part {'.'.join(rest)!r}"))
    else:
        node[name] = _member(fields[name].annotation, change.value)


def _member(annotation: Any, value: Any) -> Any:
    """The member of a Literal that a text spells, since pydantic reads no number out of a text there; a list of one."""
    if get_origin(annotation) is tuple and Ellipsis in get_args(annotation) and isinstance(value, str):
        return [value]  # one value for a list of them
    members = {str(member): member for member in get_args(annotation)} if get_origin(annotation) is Literal else {}
    return members.get(value, value) if isinstance(value, str) else value


def _put_inside(node: Tree, name: str, rest: list[str], depth: int, value: Any) -> None:
    """Sets a value in mappings within mappings, `depth` of them, whose names are free and may hold dots in the last."""
    if not rest:
        node[name] = value
        return
    former = node.get(name)
    child = node[name] = dict(former) if isinstance(former, dict) else {}
    inner, *rest = rest if depth > 1 else [".".join(rest)]
    _put_inside(child, inner, rest, depth - 1, value)


def _new(choices: list[type[Settings]]) -> Tree:
    tag = kind_of(choices[0])
    return {} if tag is None else {"kind": tag}


def _mapping_depth(annotation: Any) -> int:
    """How many names lead to a value: 1 in dict[str, float], 2 in dict[str, dict[str, float]], 0 elsewhere."""
    if get_origin(annotation) is dict:
        return 1 + _mapping_depth(get_args(annotation)[1])
    return max(map(_mapping_depth, get_args(annotation)), default=0) if get_origin(annotation) is not tuple else 0


def nearest(name: str, known: Iterable[str | None]) -> str:
    """What was probably meant; else all that there is."""
    names = [k for k in known if k]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(names)}"


def _given(path: str, places: dict[tuple[str, ...], str]) -> str:
    """Where the setting at a dotted path was given, or the path itself."""
    return next((where for place, where in places.items() if ".".join(place) == path), path)


def _as_fault(tree: Tree, error: Any, places: dict[tuple[str, ...], str]) -> Fault:
    path: list[str] = []
    node: Any = tree
    for part in error["loc"]:
        if isinstance(node, dict) and part not in node and part == node.get("kind"):
            continue  # pydantic names the variant of a union in the location
        path.append(str(part))
        node = node.get(part) if isinstance(node, dict) else None
    given = next((places[tuple(path[:n])] for n in range(len(path), 0, -1) if tuple(path[:n]) in places), "")
    dotted = ".".join(path) or "settings"
    if error["type"] == "missing":
        return Fault(given or dotted, f"{dotted} is required", f"give {dotted}=…")
    message = error["msg"].removeprefix("Value error, ")
    found = "" if isinstance(error["input"], dict | BaseModel) else f", not {error['input']!r}"
    said = f"{message[:1].lower()}{message[1:]}{found}"
    return Fault(given or dotted, said if (given or dotted) == dotted else f"{dotted}: {said}")


def _from_file(path: Path, faults: list[Fault]) -> list[Change]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as wrong:
        faults.append(Fault(str(path), f"cannot be read: {wrong}"))
        return []
    return _from_text(text, str(path), faults, ())


def _from_text(text: str, name: str, faults: list[Fault], path: tuple[str, ...]) -> list[Change]:
    """Changes that YAML text asks for; `path` is where in the tree the text belongs."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        wrong_names = list(_wrong_names(node, name))
    except yaml.MarkedYAMLError as wrong:
        mark = wrong.problem_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark and not path else name
        faults.append(Fault(place, f"is not YAML: {wrong.problem}"))
        return []
    except (yaml.YAMLError, RecursionError) as wrong:
        faults.append(Fault(name, f"is not YAML: {' '.join(str(wrong).split())}"))
        return []
    if wrong_names:
        faults += wrong_names
        return []
    if path:
        return [Change(path, None if node is None else _value(node), name)]
    if node is not None and not isinstance(node, yaml.MappingNode):
        faults.append(Fault(f"{name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}", "is not name: value"))
        return []
    return list(_leaves(node, name, ())) if node else []


def _wrong_names(node: yaml.Node | None, name: str) -> Iterator[Fault]:
    """Names that stand twice, of which YAML would silently take the last, and names that are not text."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _wrong_names(item, name)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            where = f"{name}:{key.start_mark.line + 1}:{key.start_mark.column + 1}"
            if not isinstance(key, yaml.ScalarNode):
                yield Fault(where, "the name of a setting is a list or a mapping", "write name: value")
            elif key.value in seen:
                yield Fault(where, f"{key.value!r} stands twice", "keep one of the two")
            else:
                seen.add(key.value)
            yield from _wrong_names(value, name)


def _leaves(node: yaml.Node, name: str, path: tuple[str, ...]) -> Iterator[Change]:
    where = f"{name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in sorted(node.value, key=lambda item: item[0].value != "kind"):
            yield from _leaves(value, name, (*path, key.value))
    elif path:
        yield Change(path, _value(node), where)


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key.value: _value(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _plain(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    text = json.dumps(value.model_dump(mode="json") if isinstance(value, Settings) else value, default=str)
    return text.strip('"') or '""'


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(_type_name(part) for part in get_args(annotation))
    if get_origin(annotation) is not None:
        inner = ", ".join("…" if part is Ellipsis else _type_name(part) for part in get_args(annotation))
        return f"{get_origin(annotation).__name__}[{inner}]"
    name = str(annotation.__name__)
    return {"Path": "path", "NoneType": "null"}.get(name, name)


def _bound(constraint: Any) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}
    return ", ".join(f"{sign} {getattr(constraint, n)}" for n, sign in signs.items() if hasattr(constraint, n))


def _first_line(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Path -> value of every leaf of a tree of settings."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {p: v for name, value in tree.items() for p, v in flat(value, f"{prefix}.{name}".strip(".")).items()}
