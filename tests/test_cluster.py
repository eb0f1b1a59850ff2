from pathlib import Path

import pytest
import yaml

FILE = Path(__file__).parent.parent / "cluster.yaml"
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own imports warn


def test_rays_own_validator_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(FILE.read_text())))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"max_worker": 1}, "max_worker"),
        ({"head_node_type": "hed"}, "head_node_type"),
        ({"max_workers": "many"}, "many"),
    ],
)
def test_the_validator_would_have_complained(change, complaint):
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match=complaint):
        validate_config(prepare_config(yaml.safe_load(FILE.read_text()) | change))


def test_the_cluster_is_closed_to_the_outside_and_holds_no_secret():
    text = FILE.read_text()
    tree = yaml.safe_load(text)
    ranges = [r["CidrIp"] for p in tree["provider"]["security_group"]["IpPermissions"] for r in p["IpRanges"]]
    assert "0.0.0.0/0" not in ranges
    assert "--env RAY_AUTH_MODE=token" in tree["docker"]["run_options"]
    starts = " ".join(tree["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in starts
    assert "0.0.0.0" not in starts
    assert "WANDB" not in text
    assert "AWS_SECRET" not in text
