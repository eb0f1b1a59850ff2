"""Makes a data set of sharded Arrow files from images that a CSV lists, or that lie in folders of classes, in Parquet
or Hugging Face files, in WebDataset tars or in a data set of torchvision; or adds those that are new to one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from data_loaders.audit.duplicates import leaks
from data_loaders.index import open_index
from data_loaders.ingest import AHEAD, Ingest, Run, in_processes, ingest
from data_loaders.shards import Done, Task
from data_loaders.splits import TRAIN
from jobs.command import command

EXAMPLE = "python -m jobs.ingest source.kind=csv source.path=labels.csv source.group_columns=[venue] out=datasets/food"


def run(settings: Ingest) -> None:
    made = ingest(settings, on_ray(settings.address) if settings.address else in_processes(settings.workers))
    for split, classes in made.rows.items():
        print(f"{split}: " + ", ".join(f"{count:,} {name}" for name, count in classes.items()))
    for split, classes in made.rows.items():
        absent = [name for name, count in classes.items() if not count]
        if absent:
            print(f"take care: {split} has no image of {', '.join(absent)}")
    for split, rows in leaks(open_index(settings.out), TRAIN).items():
        if rows:
            print(f"take care: {rows:,} images of {split} are in {TRAIN} too; python -m jobs.audit data={settings.out}")
    print("images: " + ", ".join(f"{count:,} {what}" for what, count in made.images.items()))
    if made.rejected.rows:
        print(f"dropped {made.rejected.rows:,} rows, listed in {settings.out / 'rejected.csv'}")
    print(f"data set {made.fingerprint}, generation {made.generation}, in {settings.out}")


def on_ray(address: str) -> Run:
    """Runs tasks on a Ray cluster; the images and `out` must lie where every node sees them."""
    import ray

    def run(work: Callable[[Task], Done], tasks: Iterable[Task]) -> Iterator[Done]:
        ray.init(address, ignore_reinit_error=True, log_to_driver=False)
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
