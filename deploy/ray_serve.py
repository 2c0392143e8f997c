"""`unimed serve` on Ray Serve: several replicas, each a front with a model worker of its own.

    pip install 'ray[serve]' 'cmoe-kernels[unimed,serve]'
    cd deploy && UNIMED_MODEL=../runs/tiny UNIMED_KEYS=keys.txt serve run ray_serve:app

Ray's proxy listens, on 127.0.0.1:8000 unless its own settings say otherwise, and shares requests out among the replicas. Limits, keys and
routes are those of `unimed serve`; /metrics is that of the replica that answers, so scrape Ray's metrics for sums.
"""

import os
from pathlib import Path

from ray import serve

from unimed.serve.api import application
from unimed.serve.settings import Settings, read_keys

MAX_BATCH, MAX_QUEUE = 16, 64


def front():
    """The application of one replica; Ray calls it there."""
    keys = os.environ.get("UNIMED_KEYS")
    model = Path(os.environ["UNIMED_MODEL"]).resolve()
    return application(Settings(model=model, keys=read_keys(Path(keys) if keys else None), max_batch=MAX_BATCH, max_queue=MAX_QUEUE))


@serve.deployment(
    num_replicas=int(os.environ.get("UNIMED_REPLICAS", "2")),
    max_ongoing_requests=2 * (MAX_BATCH + MAX_QUEUE),
    graceful_shutdown_timeout_s=150,
    ray_actor_options={"num_cpus": float(os.environ.get("UNIMED_CPUS", "1"))},
)
@serve.ingress(front)
class Unimed:
    pass


app = Unimed.bind()
