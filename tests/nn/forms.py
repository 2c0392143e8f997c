"""Small connectors of every form: routers, their inputs and layers, and experts."""

import itertools

SIZES = {"in_features": 20, "out_features": 50, "hidden_features": 70, "num_experts": 3, "resample_rate": 4, "router_features": 90}
FORMS = [
    {"router": r, "router_inputs": i, "expert": e, "router_layers": n}
    for r, i, e, n in itertools.product(("soft", "sparse"), ("task_token", "token", "task"), ("mlp", "linear"), (2, 1))
]
FORMS += [{"router": r, "expert": e} for r, e in itertools.product(("hard", "constant"), ("mlp", "linear"))]
FORMS = [{**f, "tasks": ("a", "b", "c")} for f in FORMS]
