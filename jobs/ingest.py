"""Makes a data set of sharded Arrow files from images that a CSV lists, or that lie in folders of classes, in Parquet
or Hugging Face files, in WebDataset tars or in a data set of torchvision; or adds those that are new to one."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from data_loaders.audit.duplicates import leaks
from data_loaders.faults import Fault, Refusal
from data_loaders.index import open_index
from data_loaders.ingest import AHEAD, Ingest, Run, in_processes, ingest
from data_loaders.manifest import NAME, Manifest
from data_loaders.shards import Done, Task
from data_loaders.splits import TRAIN
from jobs.command import command

EXAMPLE = "python -m jobs.ingest source.kind=csv source.path=labels.csv source.group_columns=[venue] out=datasets/food"


def run(settings: Ingest) -> None:
    made = ingest(settings, on_ray(settings.address) if settings.address else in_processes(settings.workers))
    for split, classes in made.rows.items():
        print(f"{split}: " + ", ".join(f"{count:,} {name}" for name, count in classes.items()))
    for warning in warnings(settings.out, made):
        print(f"take care: {warning}")
    print("images: " + ", ".join(f"{count:,} {what}" for what, count in made.images.items()))
    if made.rejected.rows:
        print(f"dropped {made.rejected.rows:,} rows, listed in {settings.out / 'rejected.csv'}")
    former = made.history[-1].rows if made.history else 0
    print(f"generation {made.generation} has {made.index.rows:,} rows, {made.index.rows - former:,} of them its own")
    print(f"data set {made.fingerprint} in {settings.out}")


def warnings(out: Path, made: Manifest) -> Iterator[str]:
    """What is no fault, and yet may not be meant."""
    for split, classes in made.rows.items():
        if absent := [name for name, count in classes.items() if not count]:
            yield f"{split} has no image of {', '.join(absent)}"
    if "val" not in made.splits:
        yield "there is no split val, by which jobs.train calibrates; data.validation=… names another one"
    for name, values in made.groups.items():
        if alike := [value for value, n in Counter(value.casefold() for value in values).items() if n > 1]:
            yield f"{name} has values that differ only in case: {', '.join(alike)}"
    for split, rows in leaks(open_index(out), TRAIN).items():
        if rows:
            yield f"{rows:,} images of {split} are in {TRAIN} too; python -m jobs.audit data={out} lists them"
    for card in (out / "README.md", out / "croissant.json"):
        if card.exists() and card.stat().st_mtime < (out / NAME).stat().st_mtime:
            yield f"{card} tells of an older generation; python -m jobs.card data={out} writes it anew"


def on_ray(address: str) -> Run:
    """Runs tasks on a Ray cluster; the images and `out` must lie where every node sees them."""
    import ray

    def run(work: Callable[[Task], Done], tasks: Iterable[Task]) -> Iterator[Done]:
        try:
            ray.init(address, ignore_reinit_error=True, log_to_driver=False)
        except ConnectionError as wrong:
            fault = Fault("address", f"no Ray cluster answers at {address!r}", "start one, or leave it out")
            raise Refusal("The ingest cannot begin:", [fault], 75) from wrong
        remote, ahead = ray.remote(work), deque[ray.ObjectRef]()
        for task in tasks:
            ahead.append(remote.remote(task))
            if len(ahead) > AHEAD * int(ray.cluster_resources().get("CPU", 1)):
                yield ray.get(ahead.popleft())
        while ahead:
            yield ray.get(ahead.popleft())

    return run


def main() -> None:
    command(lambda: Ingest, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
