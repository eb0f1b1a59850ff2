"""Makes a data set of sharded Arrow files from images listed in a CSV, or lying in folders of classes."""

from collections.abc import Callable, Iterator

from data_loaders.index import read_manifest
from data_loaders.ingest import Ingest, Run, in_processes, ingest
from data_loaders.shards import Shard, Task
from jobs.command import command

EXAMPLE = "python -m jobs.ingest source.kind=csv source.path=labels.csv source.group_columns=[venue] out=datasets/food"


def run(settings: Ingest) -> None:
    path = ingest(settings, on_ray(settings.address) if settings.address else in_processes(settings.workers))
    manifest = read_manifest(path.parent)
    for split, classes in manifest["rows"].items():
        print(f"{split}: " + ", ".join(f"{count:,} {name}" for name, count in classes.items()))
    for split, classes in manifest["rows"].items():
        absent = [name for name, count in classes.items() if not count]
        if absent:
            print(f"take care: {split} has no image of {', '.join(absent)}")
    if manifest["rejected"]["rows"]:
        print(f"dropped {manifest['rejected']['rows']:,} rows, listed in {path.parent / 'rejected.csv'}")
    print(f"data set {manifest['fingerprint']} in {path.parent}")


def on_ray(address: str) -> Run:
    """Runs tasks on a Ray cluster; the images and `out` must lie where every node sees them."""
    import ray

    def run(work: Callable[[Task], Shard], tasks: list[Task]) -> Iterator[Shard]:
        ray.init(address, ignore_reinit_error=True, log_to_driver=False)
        remote = ray.remote(work)
        for result in [remote.remote(task) for task in tasks]:
            yield ray.get(result)

    return run


def main() -> None:
    command(lambda: Ingest, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
