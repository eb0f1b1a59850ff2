"""Trains a classifier on a Ray cluster (or on this machine alone), and calibrates it. The same words go on from the
newest checkpoint."""

import json
from typing import TYPE_CHECKING

from jobs.command import command

if TYPE_CHECKING:
    from trainer.config import Config

EXAMPLE = "python -m jobs.train jobs/configs/demo_balanced.yaml cluster.workers=2 train.epochs=5"


def settings() -> "type[Config]":
    from trainer.config import Config

    return Config


def run(config: "Config") -> None:
    if config.cluster.on == "ray":
        from trainer.launch import train
    else:
        from trainer.run import train

    done = train(config)
    for warning in json.loads((done.folder / "model" / "facts.json").read_bytes())["warnings"]:
        print(f"take care: {warning}")
    print(f"model in {done.folder / 'model'}")
    if (done.folder / "metrics.parquet").exists():
        print(f"metrics in {done.folder / 'metrics.parquet'}")
    if done.facts.get("tracked"):
        print(f"W&B run in {done.facts['tracked']}")


def main() -> None:
    command(settings, __doc__, EXAMPLE, run)


if __name__ == "__main__":
    main()
