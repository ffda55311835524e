"""The manifests for clusters are what their systems accept, and ask for what the run in them needs.

Pods and the ConfigMap are checked against Kubernetes' own schemas, the Ray cluster by Ray's own reader of KubeRay's
resources. KubeRay's schema is in no package: docs/scaling.md says how it was checked. SLURM's script runs in
`test_slurm.py`.
"""

import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from llmforge.config import load_config, refuse_unavailable
from llmforge.jobs.cluster import Placement

CLUSTER = Path(__file__).parent.parent / "examples" / "cluster"
KUBERNETES = "1.34"


@pytest.fixture(scope="module")
def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    """Its ConfigMap and its RayJob."""
    brought, job = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text(encoding="utf-8"))
    return brought, job


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_kubernetes_accepts_the_pods_and_the_config_map(manifest: Any) -> None:
    brought, job = manifest
    kubernetes_validate.validate(brought, KUBERNETES, strict=True)
    templates = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": group["template"]}
        for group in groups(job)
    ]
    for template in templates:
        kubernetes_validate.validate(template, KUBERNETES, strict=True)
    templates[-1]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGraceSeconds"):
        kubernetes_validate.validate(templates[-1], KUBERNETES, strict=True)
    del templates[-1]["template"]["spec"]["terminationGraceSeconds"]


def test_the_pods_as_ray_reads_them_hold_the_workers(manifest: Any, tmp_path: Path) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as read

    brought, job = manifest
    (tmp_path / "run.yaml").write_text(brought["data"]["run.yaml"], encoding="utf-8")
    loaded = load_config(tmp_path / "run.yaml")
    refuse_unavailable(loaded)
    resource = {"metadata": {"name": "run", "namespace": "default"}, "spec": job["spec"]["rayClusterSpec"]}
    kinds = read(resource)["available_node_types"].values()
    nodes = [kind["resources"] for kind in kinds for _ in range(kind["max_workers"] or 1)]
    # As long as the head is alone, Ray knows of no GPU and of no CPU.
    placement = Placement.of(loaded.config, loaded.config.num_devices, has_gpu=False, cores=0)
    assert placement.each["GPU"] == 1
    assert placement.obstacles(nodes) == []
    assert placement.obstacles(nodes[:-1])[0][0] == "num_devices"
    assert all(kind["min_workers"] == kind["max_workers"] for kind in kinds)


def test_what_a_run_reads_and_writes_is_in_every_pod(manifest: Any, tmp_path: Path) -> None:
    brought, job = manifest
    (tmp_path / "run.yaml").write_text(brought["data"]["run.yaml"], encoding="utf-8")
    config = load_config(tmp_path / "run.yaml").config
    for group in groups(job):
        spec = group["template"]["spec"]
        mounted = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounted.keys() == {volume["name"] for volume in spec["volumes"]}
        for path in (config.output_dir, config.cache_dir, config.model_id, config.train_path):
            assert path.startswith(mounted["shared"] + "/")
        assert mounted["config"] == "/config"
    assert job["spec"]["entrypoint"] == "bash /config/run.sh"
    (volume,) = (v for v in groups(job)[0]["template"]["spec"]["volumes"] if v["name"] == "config")
    assert volume["configMap"]["name"] == brought["metadata"]["name"]


def test_a_job_that_is_tried_again_resumes(manifest: Any, tmp_path: Path) -> None:
    brought, _ = manifest
    config = yaml.safe_load(brought["data"]["run.yaml"])
    run = f"{config['output_dir']}/{config['custom_model_tag']}"
    script = (
        brought["data"]["run.sh"].replace(config["output_dir"], str(tmp_path)).replace("exec llmforge", "exec echo")
    )

    def started() -> str:
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.strip()

    assert f"run={run}\n" in brought["data"]["run.sh"]
    assert started() == "anyscale finetune /config/run.yaml --wait"
    directory = tmp_path / config["custom_model_tag"]
    directory.mkdir()
    (directory / "resolved_config.yaml").touch()
    assert started() == f"anyscale finetune --resume {directory} --wait"
