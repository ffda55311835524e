"""A Ray cluster of this machine alone: `python ray_cluster.py FILE PROCESS_ID`.

It writes where it is to FILE as JSON and ends when that process does, so also when the tests are killed.
"""

import json
import os
import sys
import tempfile
import time
from functools import partialmethod
from pathlib import Path


def main() -> None:
    import ray
    from ray._private import parameter

    # Each node has an agent at one fixed port, so that a second cluster on the machine has none. 0 is any free port.
    parameter.RayParams.__init__ = partialmethod(parameter.RayParams.__init__, dashboard_agent_listen_port=0)
    file, process = Path(sys.argv[1]), int(sys.argv[2])
    # The paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as directory:
        context = ray.init(
            "local",
            num_cpus=4,
            include_dashboard=True,
            dashboard_port=0,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=directory,
        )
        places = {"address": context.address_info["gcs_address"], "dashboard": f"http://{context.dashboard_url}"}
        file.with_suffix(".part").write_text(json.dumps(places))
        file.with_suffix(".part").rename(file)
        while is_alive(process):
            time.sleep(0.3)
        ray.shutdown()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main()
