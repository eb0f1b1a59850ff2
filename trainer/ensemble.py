"""Several models as one: each member's probabilities are calibrated, brought to the prior of use, and averaged.

Members that learn from undersampled rows each keep others of the majority: balanced bagging (Liu et al. 2009).
"""

import numpy as np
import torch

from data_loaders.faults import Fault, Refusal
from trainer.checkpoint import Trained, load_model
from trainer.config import Config
from trainer.context import Local, device_for
from trainer.decision.calibrators import Temperatures
from trainer.decision.ledger import Ledger
from trainer.loop import finish
from trainer.metrics.catalogue import Floats
from trainer.networks import Ensemble


def combine(config: Config) -> None:
    """Publishes the ensemble whose members are trained, calibrated anew on the validation rows, on this machine: an
    average of calibrated probabilities is too cautious (Rahaman & Thiery 2021)."""
    device = device_for("cpu" if config.cluster.device == "cpu" else "auto")
    torch.set_num_threads(config.cluster.threads * config.cluster.most)
    members = [load_model(member.run_folder / "model", device) for member in config.members()]
    ledger = members[0].ledger
    drawn = np.mean([m.ledger.training_prior for m in members], axis=0)
    model = average(members, ledger.deployment_prior).to(device)
    ledger = config.decision.ledger(ledger.classes, ledger.natural_prior, drawn, ledger.deployment_prior)
    finish(config, config.data.index(), model, ledger, Local(config.run_folder, device), {})


def average(members: list[Trained], prior: Floats) -> Ensemble:
    """The mean of the members' calibrated probabilities where classes occur as in prior, [K].

    Refuses members that are calibrated by more than a temperature, which is all that the network holds of it.
    """
    ensemble = Ensemble([m.model for m in members], len(prior))
    for k, ledger in enumerate(m.ledger for m in members):
        ensemble.temperatures[k] = _temperature(k, ledger)
        ensemble.corrections[k] = torch.from_numpy(np.log(prior) - np.log(ledger.logit_prior))
    return ensemble


def _temperature(k: int, ledger: Ledger) -> float:
    """Of member k."""
    calibrator = ledger.calibrator
    if isinstance(calibrator, Temperatures) and not len(calibrator.by_cell):
        return calibrator.overall
    fault = Fault(f"member {k}", f"has {calibrator}", "train members with calibration.kind=temperature")
    raise Refusal("An ensemble averages models that are calibrated by one temperature each:", [fault], 65)
